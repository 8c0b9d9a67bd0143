"""Calibrations are remembered as they were, and what cannot be a calibration is no reason not to start."""

from __future__ import annotations

import json
import math
import stat
import threading

import pytest
import torch

from engine import calibrate
from engine.memory import Memory
from engine.restore import Rates
from tests.engine.fake_model import FakeRunner
from tests.tiers.small_store import PAYLOAD_BYTES, block, opened
from tiers.arena import Arena, Geometry
from tiers.block import Tier
from tiers.codec import AS_IT_IS

RATES = Rates(1e-9, 2e-3, 3e-9, 4e-3, 5e-4, 6e-7)


def test_what_is_remembered_is_recalled_for_that_machine_only_and_private(tmp_path):
    calibrate.remember(tmp_path, "one", RATES)
    calibrate.remember(tmp_path, "two", Rates())
    assert calibrate.recall(tmp_path, "one") == RATES
    assert calibrate.recall(tmp_path, "two") == Rates()
    assert calibrate.recall(tmp_path, "three") is None
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_newest_calibrations_are_kept(tmp_path):
    for number in range(calibrate.KEPT + 2):
        calibrate.remember(tmp_path, str(number), RATES)
    assert calibrate.recall(tmp_path, "1") is None
    assert calibrate.recall(tmp_path, "2") == RATES


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"one": 3}',
        '{"one": {"token_s": 1, "what": 2}}',
        '{"one": {"token_s": "fast"}}',
        '{"one": {"token_s": null}}',
        '{"one": {"token_s": 0}}',
        '{"one": {"token_s": NaN}}',
        '{"one": {"read_s": -1.0}}',
        '{"one": {"read_s": Infinity}}',
        "\udcff",
    ],
)
def test_a_damaged_file_recalls_nothing_and_is_replaced(tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert calibrate.recall(tmp_path, "one") is None
    calibrate.remember(tmp_path, "one", RATES)
    assert calibrate.recall(tmp_path, "one") == RATES
    assert json.loads(path.read_text())


def test_a_link_in_the_way_is_not_followed(tmp_path):
    aim = tmp_path / "aim"
    aim.write_text("mine")
    (tmp_path / "calibration.json.new").symlink_to(aim)
    calibrate.remember(tmp_path, "one", RATES)
    assert aim.read_text() == "mine"
    assert calibrate.recall(tmp_path, "one") == RATES


def test_a_directory_that_takes_nothing_is_survived(tmp_path):
    calibrate.remember(tmp_path / "missing", "one", RATES)
    assert calibrate.recall(tmp_path / "missing", "one") is None


def geometry() -> Geometry:
    return Geometry(layers=1, kv_heads=1, head_dim=1, block_tokens=4, dtype_name="float32")


def is_sound(rates: Rates) -> bool:
    return all(0 < value < math.inf for value in rates.as_dict().values())


def test_copies_and_prefills_are_measured_in_arenas_of_any_size():
    for slots in (4, 5, 64, 600):
        arenas = {tier: Arena(geometry(), slots) for tier in (Tier.DEVICE, Tier.HOST)}
        arenas[Tier.DEVICE].blocks.fill_(torch.nan)
        runner = FakeRunner(arenas[Tier.DEVICE])
        rates = calibrate.measure_copies(Memory(arenas, 4), Rates())
        rates = calibrate.measure_prefill(runner, slots=slots, block_tokens=4, rates=rates)
        assert is_sound(rates)
        assert rates.read_s == Rates().read_s
        deepest = max(segment.context for batch in runner.batches for segment in batch.segments)
        assert deepest <= slots * 4


class Rushed:
    """A store whose first reads take a second each, because of others, and the rest a hundredth."""

    def __init__(self, store, rushed):
        self.index = store.index
        self._store = store
        self._left = rushed
        self._lock = threading.Lock()
        self.now = 0.0

    def read(self, *what):
        with self._lock:
            self.now += 1.0 if self._left > 0 else 0.01
            self._left -= 1
        self._store.read(*what)


@pytest.mark.parametrize("rushed", [0, 9, 20])
def test_a_rush_at_the_start_is_not_taken_for_the_disk(tmp_path, monkeypatch, rushed):
    with opened(tmp_path) as store:
        store.write(blocks=[block(number) for number in range(40)])
        rush = Rushed(store, rushed)
        monkeypatch.setattr(calibrate.time, "perf_counter", lambda: rush.now)
        monkeypatch.setattr(calibrate, "BUDGET_S", 100.0)
        measured = calibrate.measure_reads(rush, AS_IT_IS, PAYLOAD_BYTES, 4)
    assert measured.read_s * PAYLOAD_BYTES == pytest.approx(0.01)


def test_a_slow_disk_is_not_measured_for_ever(tmp_path, monkeypatch):
    with opened(tmp_path) as store:
        store.write(blocks=[block(number) for number in range(40)])
        slow = Rushed(store, 1000)
        monkeypatch.setattr(calibrate.time, "perf_counter", lambda: slow.now)
        measured = calibrate.measure_reads(slow, AS_IT_IS, PAYLOAD_BYTES, 4)
    assert slow.now == 9.0  # one round
    assert measured.read_s * PAYLOAD_BYTES == pytest.approx(1.0)


@pytest.mark.parametrize("records", [0, 3, 40])
def test_reads_are_measured_where_there_is_something_to_read(tmp_path, records):
    with opened(tmp_path) as store:
        store.write(blocks=[block(number) for number in range(records)])
        measured = calibrate.measure_reads(store, AS_IT_IS, PAYLOAD_BYTES, 4)
    assert (measured is None) == (records < 5)
    if measured is not None:
        assert 0 < measured.read_s < math.inf
        assert 0 < measured.latency_s < math.inf
