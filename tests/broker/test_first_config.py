"""The file that `homeport init` writes: good on any machine, and its arithmetic can be checked by hand."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.access import check_exposure
from broker.config import GIB, MIB, Config, digest_as_written, load, merge, parse
from broker.disk_rate import Rates
from broker.first_config import Chosen, Found, config_text, fit, remarks
from broker.forecast import Machine, Shape, forecast
from broker.machine import FileSystem, Memory, OpenFiles

LLAMA = Shape("llama", layers=32, kv_heads=8, head_dim=128, context=131072)


def found(
    *,
    memory=64 * GIB,
    available=None,
    gpu=None,
    gpu_free=None,
    free=200 * GIB,
    total=500 * GIB,
    shape=None,
    weights=None,
    files=20_000,
    kind="ext4",
    rates=None,
    driver=False,
):
    card = gpu and SimpleNamespace(name="Card", total_bytes=gpu, free_bytes=gpu_free or gpu)
    return Found(
        cores=8,
        memory=Memory(memory, False, available, 0, None),
        open_files=OpenFiles(files, files),
        devices=SimpleNamespace(gpu=card, reason=None if card else "no driver", driver=driver),
        file_system=FileSystem(kind, total, free),
        rates=rates,
        shape=shape,
        weights_bytes=weights,
    )


def chosen(model=None, state_dir="/var/lib/homeport"):
    key, operator = digest_as_written("a"), digest_as_written("b")
    return Chosen(Path(state_dir), model, key, operator, "1.2.3", "2026-01-02")


def loaded(machine, choice=None):
    text = config_text(machine, choice or chosen())
    return merge(Config(), parse(text, "written"), "written"), text


def test_on_a_cpu_memory_is_shared_between_the_model_the_device_tier_and_the_host_tier():
    sizes = fit(found(memory=64 * GIB))
    # 48 GiB less 1 for the daemon and 0.5 of weights; the device tier stops at 16 full contexts of 180 MiB
    assert sizes.device == 16 * 180 * MIB
    assert sizes.host == 43 * GIB
    assert sizes.device + sizes.host <= 64 * GIB * 3 // 4 - GIB - 540_000_000
    assert (sizes.disk, sizes.min_free) == (126 * GIB, 10 * GIB)


def test_what_others_use_now_is_not_counted_on():
    sizes = fit(found(memory=64 * GIB, available=8 * GIB))
    assert sizes.device + sizes.host < 7 * GIB


def test_on_a_gpu_the_device_tier_is_what_weights_and_a_forward_leave():
    machine = found(
        memory=512 * GIB, gpu=80 * GIB, gpu_free=79 * GIB, shape=LLAMA, weights=16 * GIB
    )
    sizes = fit(machine)
    assert sizes.device == (79 - 16 - 5) * GIB
    assert sizes.host == 383 * GIB
    config, text = loaded(machine)
    assert config.engine.step_tokens == 8192
    assert "58 GiB / 131,072 = about 475,136 tokens = 14.5 sessions of 32,768." in text
    assert loaded(found(gpu=12 * GIB))[0].engine.step_tokens == 2048


@given(
    memory=st.integers(64 * MIB, 4096 * GIB),
    available=st.none() | st.integers(0, 4096 * GIB),
    gpu=st.none() | st.integers(GIB, 200 * GIB),
    free=st.integers(0, 100_000 * GIB),
    weights=st.none() | st.integers(0, 300 * GIB),
    files=st.none() | st.integers(1, 1 << 20),
    shape=st.sampled_from([None, LLAMA]),
    model=st.none() | st.text(min_size=1).filter(lambda one: one.isprintable() or "\x7f" in one),
    rates=st.none() | st.just(Rates(1e9, 2e9, True)),
)
def test_on_every_machine_the_file_loads_is_safe_and_takes_no_more_than_there_is(
    memory, available, gpu, free, weights, files, shape, model, rates
):
    machine = found(
        memory=memory, available=available, gpu=gpu, free=free, total=free + GIB,
        weights=weights, files=files, shape=shape, rates=rates,
    )  # fmt: skip
    config, _ = loaded(machine, chosen(model, "/srv/with \"quotes\" and \\ and 'ü'"))
    check_exposure(config)
    sizes, element = fit(machine), 2
    assert config.tiers.device.capacity == sizes.device
    assert config.tiers.host.capacity == sizes.host
    assert config.tiers.disk.capacity == sizes.disk <= free
    assert sizes.device >= (shape or Shape()).token_bytes(element) * config.engine.block_tokens
    in_memory = sizes.host + (0 if gpu else sizes.device)
    least = (shape or Shape()).token_bytes(element) * config.engine.block_tokens
    assert in_memory <= max(memory * 3 // 4, 17 * least)
    assert config.model.path == model
    assert config.server.state_dir == Path("/srv/with \"quotes\" and \\ and 'ü'")
    assert files is None or config.server.max_connections <= max(files, 1)
    assert len(config.auth.keys) == len(config.auth.operators) == 1


def test_the_sizes_that_are_written_are_round_and_the_arithmetic_beside_them_is_right():
    _, text = loaded(found(memory=32 * GIB))
    assert re.findall(r'^capacity = "(.*)"', text, re.MULTILINE) == ["2880MiB", "19GiB", "126GiB"]
    for size, token, tokens, sessions, each in re.findall(
        r"# ([\d.]+) GiB / ([\d,]+) = about ([\d,]+) tokens = ([\d.]+) sessions of ([\d,]+)\.", text
    ):
        token, tokens, each = (int(one.replace(",", "")) for one in (token, tokens, each))
        assert tokens == pytest.approx(
            float(size) * GIB / token, rel=1e-3
        )  # the size is shown rounded
        assert float(sessions) == pytest.approx(tokens / each, rel=0.01)


def test_the_file_says_how_the_machine_looked_and_how_long_a_session_takes_from_disk():
    rates = Rates(1.5 * GIB, 2 * GIB, True)
    _, text = loaded(found(rates=rates))
    assert "writes 1.5 GiB/s, reads 2 GiB/s (past the page cache)" in text
    assert "Such a session is 180 MiB: 0.088 s to read" in text
    assert "no GPU: no driver" in text


def test_it_warns_of_nothing_where_there_is_enough():
    machine = found(memory=64 * GIB, free=400 * GIB)
    said = forecast(loaded(machine)[0], Shape(), Machine(400 * GIB, 64 * GIB))
    assert not [line for line in said if line.startswith("warning")]


def test_too_few_open_files_lower_the_connections():
    config, text = loaded(found(files=256))
    assert config.server.max_connections == 128
    assert "ulimit -n" in text
    assert "max_connections" not in loaded(found(files=1024))[1]


def test_a_model_is_named_by_the_end_of_its_path():
    for path, name in (
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
        ("/m/Some.gguf", "some"),
        ("/m/x/", "x"),
        ("/", "model"),
    ):
        config, _ = loaded(found(shape=LLAMA), chosen(path))
        assert (config.model.path, config.model.name) == (path, name)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (found(kind="nfs4", shape=LLAMA), "nfs4"),
        (found(kind="tmpfs", shape=LLAMA), "nothing survives"),
        (found(kind="overlay", shape=LLAMA), "volume"),
        (found(), "not here yet"),
        (found(shape=LLAMA, driver=True), "torch sees no GPU"),
    ],
)
def test_what_the_operator_should_know_is_said(machine, words):
    (said,) = remarks(machine)
    assert words in said
    assert list(remarks(found(shape=LLAMA))) == []


def test_written_digests_are_read_as_the_keys_they_stand_for(tmp_path):
    (tmp_path / "c.toml").write_text(config_text(found(), chosen()))
    assert load([tmp_path / "c.toml"]).auth.keys == load([], ["auth.keys=['a']"]).auth.keys
