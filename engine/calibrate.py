"""Measuring a machine for `engine.restore` and `engine.draft`, at start: how fast blocks are copied and read, a prompt is
computed, and a drafted token checked.

Copies and reads are measured at every start, the way that they are made later: with whatever checks and decoding belong to
them; reads beside the engine, which does not wait for the disk to be ready, and once its index is there: beside that they
are as much as a hundred times slower, and restores would be refused for it (seen from 1,500 records on). The model takes
too long for that: it is measured when this model has not run on this device before, and remembered in the state directory
with what the run taught. Losing that file loses seconds.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.batch import Batch, Segment
from engine.restore import Rates, ReadsMeasured
from tiers.block import BlockKey, Copy, Slot, StoreError, Tier

if TYPE_CHECKING:
    from pathlib import Path

    from engine.memory import Memory
    from engine.runner import Runner
    from tiers.codec import Codec
    from tiers.store import BlockStore, IndexEntry

log = logging.getLogger(__name__)

BUDGET_S = 0.05  # for copies, and again for each round of reads
ROUNDS = 4  # of reads
SAMPLES = 32  # records that are read
SHORT, LONG = (
    16,
    128,
)  # tokens of the measured prefills: the difference is tokens, the rest is the step
DEPTH = 1024  # tokens before the deep one, as far as they fit
DRAFTED = 7  # tokens behind the one of a measured decode
_STEPS = 5  # of each kind of decode; the fastest counts
KEPT = 16  # calibrations in the file, newest last
_FILE = "calibration.json"
_LEAST = 1e-15  # seconds: rates are positive, whatever a clock says


def measure_copies(memory: Memory, rates: Rates) -> Rates:
    """Between the first slots of device and host, while nothing of value is there."""
    up = Copy(BlockKey(bytes(32)), Tier.HOST, Slot(0), Tier.DEVICE, Slot(0))
    down = Copy(up.key, Tier.DEVICE, Slot(0), Tier.HOST, Slot(0))
    memory.copy_now(down)  # touches the pages of both
    spent: list[float] = []
    while len(spent) < 8 and sum(spent) < BUDGET_S:
        began = time.perf_counter()
        memory.copy_now(up)
        spent.append(time.perf_counter() - began)
    return replace(rates, copy_s=max(_LEAST, min(spent) / memory.block_bytes))


def measure_reads(
    store: BlockStore, stored_as: Codec, block_bytes: int, readers: int
) -> ReadsMeasured | None:
    """A few records as the readers read them; None where there are too few, or they cannot be read.

    The fastest of some rounds counts: whoever else is busy makes reads slower, and a restore that is refused for it teaches
    nothing. One that takes longer than was hoped does.
    """
    try:
        entries = store.index(None, SAMPLES)
    except StoreError as error:
        log.warning("the disk is not measured: %s: %s", error.reason, error)
        return None
    if len(entries) <= readers:
        return None
    samples = itertools.cycle(entries)
    # Each begins with a page, as slots do.
    buffers = [memoryview(mmap.mmap(-1, block_bytes)) for _ in range(readers)]
    read = functools.partial(_read, store, stored_as)
    alone: list[float] = []
    together: list[float] = []  # seconds a block
    until = time.perf_counter() + ROUNDS * BUDGET_S
    with ThreadPoolExecutor(readers) as pool:
        for _ in range(ROUNDS):
            alone += read([next(samples)], buffers[0])
            shares = [[next(samples), next(samples)] for _ in buffers]
            began = time.perf_counter()
            done = sum(map(len, pool.map(read, shares, buffers)))
            ended = time.perf_counter()
            if done:
                together.append((ended - began) / done)
            if ended > until:
                break
    if not alone or not together:
        return None
    per_block = min(together)
    measured = ReadsMeasured(
        latency_s=max(_LEAST, min(alone) - per_block),
        read_s=max(_LEAST, per_block / block_bytes),
    )
    log.info("disk %.2f GB/s after %.1f ms", 1e-9 / measured.read_s, 1e3 * measured.latency_s)
    return measured


def _read(
    store: BlockStore, stored_as: Codec, entries: list[IndexEntry], into: memoryview
) -> list[float]:
    """Seconds of each. A bad record is met again, and forgotten, by a real fetch."""
    spent: list[float] = []
    room = stored_as.room(into)
    for entry in entries:
        began = time.perf_counter()
        try:
            store.read(entry.key, entry.parent, entry.tokens, room)
            stored_as.decode(room, into)
        except StoreError:
            continue
        spent.append(time.perf_counter() - began)
    return spent


def measure_prefill(runner: Runner, *, slots: int, block_tokens: int, rates: Rates) -> Rates:
    """Three prefills of token 0 into the first slots, while nothing of value is there."""
    room = slots * block_tokens
    long = min(LONG, room // 2)
    short = min(SHORT, max(1, long // 2))
    depth = min(DEPTH, room - long)
    _prefill(runner, block_tokens, 0, long)  # warms up, and writes the rows that the deep one sees
    for begin in range(0, depth, long):
        _prefill(runner, block_tokens, begin, min(long, depth - begin))
    brief = _prefill(runner, block_tokens, 0, short)
    whole = _prefill(runner, block_tokens, 0, long)
    deep = _prefill(runner, block_tokens, depth, long)
    token_s = max(_LEAST, (whole - brief) / max(1, long - short))
    return replace(
        rates,
        token_s=token_s,
        step_s=max(_LEAST, brief - short * token_s),
        depth_s=max(_LEAST, (deep - whole) / (long * depth)),
    )


def measure_decode(runner: Runner, *, slots: int, block_tokens: int, rates: Rates) -> Rates:
    """Steps of one token, and of some drafted behind it, on what `measure_prefill` wrote."""
    depth = max(0, min(DEPTH, slots * block_tokens - 1 - DRAFTED))
    drafted = min(DRAFTED, slots * block_tokens - 1)
    times = range(_STEPS)
    plain = min(_prefill(runner, block_tokens, depth, 1) for _ in times)
    if not drafted:
        return replace(rates, decode_s=max(_LEAST, plain))
    more = min(_prefill(runner, block_tokens, depth, 1 + drafted, every=True) for _ in times)
    return replace(
        rates,
        decode_s=max(_LEAST, plain),
        draft_s=max(_LEAST, (more - plain) / drafted),
    )


def _prefill(
    runner: Runner, block_tokens: int, begin: int, count: int, *, every: bool = False
) -> float:
    """Seconds; with the logits of the last token, or of `every` one."""
    table = [Slot(at) for at in range(-(-(begin + count) // block_tokens))]
    segment = Segment(
        start=0,
        count=count,
        context=begin + count,
        table=table,
        logits=count if every else 1,
    )
    batch = Batch([0] * count, list(range(begin, begin + count)), [segment])
    began = time.perf_counter()
    runner.run(batch).sum().item()  # waits for a GPU
    return time.perf_counter() - began


def recall(directory: Path, machine: str) -> Rates | None:
    """What is remembered of a model on a device; None where there is nothing that can be used."""
    found = _load(directory / _FILE).get(machine)
    if not isinstance(found, dict) or found.keys() != Rates().as_dict().keys():
        return None  # none, or from before there were all of them
    try:
        rates = Rates(**{name: float(value) for name, value in found.items()})
    except (TypeError, ValueError):
        return None
    usable = all(0 < value < math.inf for value in rates.as_dict().values())
    return rates if usable else None


def remember(directory: Path, machine: str, rates: Rates) -> None:
    """Replace the file as a whole. A directory that takes nothing costs the next start a measurement, no more."""
    path, new = directory / _FILE, directory / (_FILE + ".new")
    kept = _load(path)
    kept.pop(machine, None)
    kept[machine] = rates.as_dict()
    newest = dict(list(kept.items())[-KEPT:])
    try:
        new.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(new, flags, 0o600), "w") as file:
            json.dump(newest, file, indent=1)
        new.replace(path)
    except OSError as error:
        log.warning("%s is not written: %s", path, error)


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
