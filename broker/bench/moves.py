"""What `homeport bench tiers` measures: blocks moved by the daemon's own code. Its results are totals; tiers.py prints them."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import time
from collections import Counter
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING
from unittest.mock import patch

from broker.bench import raw_disk
from engine.memory import Memory
from tiers import record
from tiers.arena import Arena, Geometry
from tiers.block import Copy, Drop, Fetch, Slot, Spill, Tier, chain_key, root_key
from tiers.codec import codec
from tiers.disk import DiskReader, DiskWriter, Landed
from tiers.lmdb_store import LmdbStore
from tiers.state_dir import StateDir
from tiers.store import StoreLimits, record_bytes_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tiers.block import BlockKey, TokenIds
    from tiers.codec import Codec
    from tiers.disk import ReadCommand
    from tiers.store import Way

_BLOCK_TOKENS = 32
_FINGERPRINT = b"bench tiers".ljust(32, b".")
_ROOT = root_key(_FINGERPRINT, b"")
_DIRECT = ((1, 4 << 20), (4, 4 << 20), (8, 4 << 20), (4, 1 << 20), (8, 1 << 20))  # threads, bytes
_PER_COMMIT = 8  # blocks that are replaced in one transaction: a turn's worth
_PER_OFFER = 64  # blocks handed to the writer at once: one full transaction


@dataclass(frozen=True, slots=True)
class Timed:
    """One move of many bytes."""

    moved_bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.moved_bytes / self.seconds


@dataclass(slots=True)
class Bench:
    """Two arenas, a state directory, and what has been measured so far."""

    place: Path
    layers: int
    blocks: int
    readers: int
    compact: str
    geometry: Geometry = field(init=False)
    codec: Codec = field(init=False)
    device: Arena = field(init=False)
    host: Arena = field(init=False)
    memory: Memory = field(init=False)
    moves: dict[str, list[Timed]] = field(default_factory=dict)  # {row: one per round}
    direct: dict[tuple[int, int], list[Timed]] = field(default_factory=dict)  # one per round
    unchecked: dict[str, list[float]] = field(default_factory=dict)  # {row: seconds}
    ways: dict[str, Counter[Way]] = field(default_factory=dict)  # {row: blocks}
    from_disk: list[float] = field(default_factory=list)  # share of the cold restores' bytes

    def __post_init__(self) -> None:
        self.geometry = Geometry(self.layers, 1, 64, _BLOCK_TOKENS, "float32")
        self.codec = codec(self.compact, self.geometry)
        self.device, self.host = (Arena(self.geometry, self.blocks) for _ in range(2))
        self.device.blocks.normal_()
        self.host.blocks.zero_()  # so that no page is touched for the first time while timed
        arenas = {Tier.DEVICE: self.device, Tier.HOST: self.host}
        self.memory = Memory(arenas, self.geometry.block_tokens)

    @property
    def data(self) -> Path:
        return self.place / "state" / "kv" / "data.mdb"

    @property
    def block_bytes(self) -> int:
        return self.geometry.block_bytes

    @property
    def payload_bytes(self) -> int:
        return self.codec.payload_bytes(self.geometry)

    @property
    def record_bytes(self) -> int:
        return record_bytes_on_disk(record.head_size(_BLOCK_TOKENS) + self.payload_bytes)

    def fill(self) -> None:
        """Everything to the host and to the disk, so that each round finds the same."""
        self._down()
        with self._store() as store:
            self._spill(store)

    def round(self) -> None:
        self._note("memcpy", self.block_bytes, self._memcpy())
        self._note("device -> host", self.block_bytes, self._down())
        self._note("host -> device", self.block_bytes, self._up())
        with self._store() as store:
            self._note("host -> disk", self.payload_bytes, self._spill(store))
        size = self.blocks * self.payload_bytes
        seconds = raw_disk.write_s(self.place / "raw", size)
        self.moves.setdefault("O_DIRECT write", []).append(Timed(size, seconds))
        cold: list[Callable[[], None]] = [
            self._restore_cold,
            functools.partial(self._restore_cold, check=False),
            *(functools.partial(self._read_direct, *how) for how in _DIRECT),
        ]
        # Who is first gains from the disk's own cache, or pays for another's write-back: so take turns.
        first = len(self.from_disk) % len(cold)
        for move in cold[first:] + cold[:first]:
            move()
        raw_disk.cache(self.data)
        self._restore("disk -> device, warm", [True, False, False, True])

    @property
    def best_direct(self) -> tuple[int, int]:
        """Threads and request size that read past the page cache at the best rate: by their medians, not by luck."""
        rates = {how: statistics.median(t.rate for t in ts) for how, ts in self.direct.items()}
        return max(rates, key=lambda how: rates[how])

    def _note(self, row: str, each: int, seconds: float) -> None:
        self.moves.setdefault(row, []).append(Timed(self.blocks * each, seconds))

    # moves; each gives its seconds

    def _memcpy(self) -> float:
        views = [(self.host.view(slot), self.device.view(slot)) for slot in self._slots()]
        began = time.perf_counter()
        for source, target in views:
            target[:] = source
        return time.perf_counter() - began

    def _down(self) -> float:
        return self._copy(Tier.DEVICE, Tier.HOST)

    def _up(self) -> float:
        return self._copy(Tier.HOST, Tier.DEVICE)

    def _copy(self, source: Tier, target: Tier) -> float:
        copies = [Copy(_key(slot), source, slot, target, slot) for slot in self._slots()]
        began = time.perf_counter()
        for copy in copies:
            self.memory.copy(copy)
        return time.perf_counter() - began

    def _spill(self, store: LmdbStore) -> float:
        """As the engine does: a turn's blocks at a time, more than one commit's worth at once."""
        answers: list[object] = []
        writer = DiskWriter(store, answers.append, lambda: 0.0, codec=self.codec)
        spills = [spill(slot, slot) for slot in self._slots()]
        began = time.perf_counter()
        waiting = iter(spills)
        while group := tuple(itertools.islice(waiting, _PER_OFFER)):
            offered = writer.offer_blocks([(one, self.memory.payload(one)) for one in group])
            assert offered, "nothing else waits"
            writer.stop()
            writer.run()
        seconds = time.perf_counter() - began
        assert answers == [Landed(one) for one in spills]
        return seconds

    def _restore(self, row: str, checks: Sequence[bool]) -> None:
        """As often as there are `checks`; of those with and of those without, the mean is noted."""
        seconds: dict[bool, list[float]] = {check: [] for check in checks}
        for check in checks:
            seconds[check].append(self._restored_s(row, check=check))
        for check, spent in seconds.items():
            if check:
                self._note(row, self.payload_bytes, statistics.mean(spent))
            else:
                self.unchecked.setdefault(row, []).append(statistics.mean(spent))

    def _restored_s(self, row: str, *, check: bool) -> float:
        inbox: SimpleQueue[ReadCommand] = SimpleQueue()
        answers: list[object] = []
        fetches = [
            Fetch(_key(slot), _ROOT, _tokens(slot), Tier.DEVICE, slot) for slot in self._slots()
        ]
        believing = nullcontext() if check else patch.object(record, "hasher", _Believing)
        with self._store() as store, believing:
            readers = [
                DiskReader(store, inbox, answers.append, self.codec) for _ in range(self.readers)
            ]
            for fetch in fetches:
                readers[0].fetch(fetch, self.memory.buffer(fetch))
            for reader in readers:
                reader.stop()
            seconds = raw_disk.side_by_side([reader.run for reader in readers])
            self.ways.setdefault(row, Counter()).update(store.statistics().reads)
        assert set(answers) == {Landed(fetch) for fetch in fetches}
        return seconds

    def _restore_cold(self, *, check: bool = True) -> None:
        raw_disk.evict(self.data)
        before = raw_disk.bytes_from_disk()
        self._restore("disk -> device, cold", [check])
        if check:
            read = raw_disk.bytes_from_disk() - before
            self.from_disk.append(read / (self.blocks * self.payload_bytes))

    def _read_direct(self, threads: int, request_bytes: int) -> None:
        seconds = raw_disk.read_s(self.data, threads, request_bytes)
        timed = Timed(self.data.stat().st_size, seconds)
        self.direct.setdefault((threads, request_bytes), []).append(timed)

    def _slots(self) -> list[Slot]:
        return [Slot(slot) for slot in range(self.blocks)]

    def _store(self) -> AbstractContextManager[LmdbStore]:
        return opened(self.place / "state", self, 2 * self.blocks)


@contextmanager
def opened(directory: Path, bench: Bench, blocks: int) -> Iterator[LmdbStore]:
    """A store with room for so many of the bench's blocks."""
    state = StateDir.open(directory)
    try:
        store = LmdbStore.open(
            state,
            fingerprint=_FINGERPRINT,
            payload_bytes=bench.payload_bytes,
            block_tokens=_BLOCK_TOKENS,
            limits=StoreLimits(block_bytes=blocks * bench.record_bytes),
        )
        try:
            yield store
        finally:
            store.close()
    finally:
        state.close()


class Growth:
    """A full store that is written over and over, a turn's worth of blocks at a time, victims anywhere in the file."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._directory = bench.place / "turnover"
        self._live = list(range(bench.blocks))
        self._next = len(self._live)
        self._random = random.Random(3)
        with self._store() as store:
            self._write(store, self._live, ())

    @property
    def written(self) -> float:
        """Times its own size."""
        return self._next / len(self._live)

    @property
    def file_over_live(self) -> float:
        file = (self._directory / "kv" / "data.mdb").stat().st_size
        return file / (len(self._live) * self._bench.record_bytes)

    def turn_over(self) -> None:
        """Replace as many blocks as there are."""
        with self._store() as store:
            blocks = len(self._live)
            for begin in range(0, blocks, _PER_COMMIT):
                count = min(_PER_COMMIT, blocks - begin)
                self._random.shuffle(self._live)
                gone, self._live = self._live[:count], self._live[count:]
                fresh = range(self._next, self._next + len(gone))
                self._next += len(gone)
                self._write(store, fresh, gone)
                self._live += fresh

    def _store(self) -> AbstractContextManager[LmdbStore]:
        return opened(self._directory, self._bench, len(self._live))

    def _write(self, store: LmdbStore, fresh: Sequence[int], gone: Sequence[int]) -> None:
        answers: list[object] = []
        bench = self._bench
        writer = DiskWriter(store, answers.append, lambda: 0.0, codec=bench.codec)
        for number in gone:
            writer.drop(Drop(_key(number)))
        spills = [spill(number, Slot(number % bench.blocks)) for number in fresh]
        writer.offer_blocks([(one, bench.device.view(one.source_slot)) for one in spills])
        writer.stop()
        writer.run()
        assert all(isinstance(answer, Landed) for answer in answers), answers


class _Anything(bytes):
    """Equal to every checksum."""

    __slots__ = ()
    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


class _Believing:
    """In place of a record's hasher, to see what that costs."""

    def __init__(self, head: bytes) -> None: ...

    def update(self, data: memoryview) -> None: ...

    def digest(self) -> bytes:
        return _Anything()


def spill(number: int, slot: Slot) -> Spill:
    return Spill(
        key=_key(number),
        root=_ROOT,
        parent=_ROOT,
        depth=0,
        tokens=_tokens(number),
        source=Tier.HOST,
        source_slot=slot,
        disk_slot=Slot(number),
    )


def _tokens(number: int) -> TokenIds:
    return (number,) * _BLOCK_TOKENS


def _key(number: int) -> BlockKey:
    return chain_key(_ROOT, _tokens(number))
