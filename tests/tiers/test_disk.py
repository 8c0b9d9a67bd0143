"""The disk threads: every command answered once, in order, after the commit; bounded; ended by a stop."""

from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Event
from types import SimpleNamespace

import pytest
import trio

from tests.tiers.faulty_lmdb import Fault, faulty_disk
from tiers.block import Drop, Fetch, Slot, Spill, StoreError, Tier, chain_key, root_key
from tiers.disk import (
    ChainFound,
    DiskReader,
    DiskState,
    DiskWriter,
    Failed,
    Forgotten,
    IndexFailed,
    IndexSlice,
    Landed,
    Persisted,
    PersistFailed,
    Rotten,
    Scrubber,
    Stop,
)
from tiers.lmdb_store import LmdbStore
from tiers.manifest import MAX_BODY_BYTES, Manifest
from tiers.state_dir import StateDir
from tiers.store import MemoryStore, ReaderCheck, StoreLimits, whole_index

FINGERPRINT = b"f" * 32
ROOT = root_key(FINGERPRINT, b"")
PAYLOAD_BYTES = 256
SHAPE = {
    "fingerprint": FINGERPRINT,
    "payload_bytes": PAYLOAD_BYTES,
    "block_tokens": 4,
    "limits": StoreLimits(block_bytes=8 * 4096),
}


def spill(number: int) -> tuple[Spill, memoryview]:
    tokens = (number, number + 1)
    action = Spill(
        chain_key(ROOT, tokens), ROOT, ROOT, 0, tokens, Tier.HOST, Slot(number), Slot(number)
    )
    return action, memoryview(bytes([number]) * PAYLOAD_BYTES)


def drop(number: int) -> Drop:
    action, _ = spill(number)
    return Drop(action.key)


def fetch(number: int) -> Fetch:
    action, _ = spill(number)
    return Fetch(action.key, action.parent, action.tokens, Tier.HOST, Slot(number))


def manifest(name: str, body: bytes = b"") -> Manifest:
    return Manifest(name, "", "s", None, 1.0, True, (1, 2), 1, (), b"", (), body)


def present(store) -> set:
    return {entry.key for entry in whole_index(store)}


def keys(*numbers: int) -> set:
    return {spill(number)[0].key for number in numbers}


class Gate:
    """A store whose writes wait until told: what is queued meanwhile makes one batch."""

    def __init__(self, store) -> None:
        self._store = store
        self.entered = Event()
        self.open = Event()
        self.batches = []

    def write(self, **parts) -> None:
        self.entered.set()
        assert self.open.wait(10)
        self.batches.append({name: len(part) for name, part in parts.items()})
        self._store.write(**parts)

    def __getattr__(self, name):
        return getattr(self._store, name)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Answers:
    """What the disk said, in order."""

    def __init__(self) -> None:
        self._queue = SimpleQueue()

    def __call__(self, reply) -> None:
        self._queue.put(reply)

    def taken(self) -> list:
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]


@contextmanager
def opened(path):
    state = StateDir.open(path)
    store = LmdbStore.open(state, **SHAPE)
    try:
        yield store
    finally:
        store.close()
        state.close()


async def run_to_the_end(*threads) -> None:
    """Run each on a thread of its own until all have stopped."""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for thread in threads:
                nursery.start_soon(trio.to_thread.run_sync, thread.run)


def writer_of(store, answers, **bounds) -> DiskWriter:
    return DiskWriter(store, answers, lambda: 5.0, **bounds)


async def test_what_is_offered_is_durable_when_answered(tmp_path):
    answers = Answers()
    with opened(tmp_path) as store:
        writer = writer_of(store, answers)
        assert writer.offer_blocks([spill(1), spill(2)], manifest("r1"), 7)
        writer.persist(manifest("r2"), None)
        writer.drop(drop(1))
        writer.forget_response("", "r2", 8)
        writer.forget_response("", "never", 9)
        writer.stop()
        await run_to_the_end(writer)
        assert answers.taken() == [
            Landed(spill(1)[0]),
            Landed(spill(2)[0]),
            Persisted(7),
            Persisted(None),
            Landed(drop(1)),
            Forgotten(8, existed=True),
            Forgotten(9, existed=False),
        ]
        assert writer.statistics().pending_bytes == 0
    with opened(tmp_path) as store:
        (entry,) = whole_index(store)
        assert (entry.key, entry.last_used) == (spill(2)[0].key, 5.0)
        assert store.find_response("", "r1") == manifest("r1")
        assert store.find_response("", "r2") is None


async def test_the_writer_says_how_long_its_oldest_write_waits_and_what_it_wrote():
    answers, store, clock = Answers(), Gate(MemoryStore(**SHAPE)), Clock()
    writer = writer_of(store, answers, monotonic=clock)
    writer.offer_blocks([spill(0)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, writer.run)
        assert await trio.to_thread.run_sync(store.entered.wait, 10)
        clock.now = 2.5
        writer.offer_blocks([spill(1)])  # younger than what is being written
        assert writer.statistics().lag_s == 2.5
        assert writer.statistics().written_bytes == 0
        store.open.set()
        writer.stop()
    assert writer.statistics().lag_s == 0.0
    assert writer.statistics().written_bytes == 2 * PAYLOAD_BYTES


async def test_what_gathers_while_a_commit_runs_is_one_transaction():
    answers, store = Answers(), Gate(MemoryStore(**SHAPE))
    writer = writer_of(store, answers)
    writer.offer_blocks([spill(0)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, writer.run)
        assert await trio.to_thread.run_sync(store.entered.wait, 10)
        for number in range(1, 5):
            writer.offer_blocks([spill(number)])
        writer.drop(drop(0))
        writer.persist(manifest("r"), 1)
        assert answers.taken() == []  # nothing is said before the commit
        store.open.set()
        writer.stop()
    assert store.batches == [
        {"drops": 0, "blocks": 1, "manifests": 0},
        {"drops": 1, "blocks": 4, "manifests": 1},
    ]
    assert len(answers.taken()) == 7


async def test_batches_are_bounded_and_a_large_offer_is_cut(tmp_path):
    answers, store = Answers(), Gate(MemoryStore(**SHAPE))
    store.open.set()
    writer = writer_of(store, answers, batch_bytes=2 * PAYLOAD_BYTES)
    writer.offer_blocks([spill(number) for number in range(5)], manifest("r"), 3)
    writer.offer_blocks([spill(5)])
    writer.offer_blocks([spill(6)])
    writer.stop()
    await run_to_the_end(writer)
    assert [(batch["blocks"], batch["manifests"]) for batch in store.batches] == [
        (2, 0),
        (2, 0),
        (2, 1),
        (1, 0),
    ]
    landed = [answer.action.tokens[0] for answer in answers.taken() if isinstance(answer, Landed)]
    assert landed == list(range(7))


async def test_drops_and_spills_of_one_key_keep_their_order():
    for order in ("spill drop", "drop spill", "spill drop spill", "spill drop spill drop"):
        store = MemoryStore(**SHAPE)
        answers = Answers()
        writer = writer_of(store, answers)
        for word in order.split():
            if word == "spill":
                writer.offer_blocks([spill(1)])
            else:
                writer.drop(drop(1))
        writer.stop()
        await run_to_the_end(writer)
        assert present(store) == (keys(1) if order.endswith("spill") else set()), order
        assert [type(answer.action) for answer in answers.taken()] == [
            Spill if word == "spill" else Drop for word in order.split()
        ]


async def test_forgetting_keeps_its_place_between_two_manifests():
    store, answers = MemoryStore(**SHAPE), Answers()
    writer = writer_of(store, answers)
    writer.persist(manifest("r"), 1)
    writer.forget_response("", "r", 2)
    writer.persist(manifest("r", b"again"), 3)
    writer.stop()
    await run_to_the_end(writer)
    assert answers.taken() == [Persisted(1), Forgotten(2, existed=True), Persisted(3)]
    assert store.find_response("", "r") == manifest("r", b"again")


async def test_too_many_waiting_bytes_are_refused_and_manifests_never():
    answers, store = Answers(), Gate(MemoryStore(**SHAPE))
    writer = writer_of(store, answers, max_pending_bytes=3 * PAYLOAD_BYTES)
    assert writer.offer_blocks(
        [spill(number) for number in range(5)]
    )  # nothing waits: any size is taken
    assert not writer.offer_blocks([spill(5)], manifest("r"), 1)
    assert writer.offer_blocks([], manifest("r"), 1)
    writer.persist(manifest("s"), 2)
    writer.drop(drop(0))
    assert writer.statistics().refused == 1
    store.open.set()
    writer.stop()
    await run_to_the_end(writer)
    assert Persisted(1) in answers.taken()
    assert present(store) == keys(1, 2, 3, 4)
    assert writer.statistics().pending_bytes == 0
    assert writer.offer_blocks([spill(5)])


async def test_a_spill_without_room_fails_alone():
    """The drop in the same batch must land: it is what makes room for the next spill."""
    answers, store = Answers(), Gate(MemoryStore(**SHAPE))
    store.open.set()
    store.write(blocks=[])
    full = [spill(number) for number in range(8)]
    writer = writer_of(store, answers)
    writer.offer_blocks(full)
    writer.stop()
    await run_to_the_end(writer)
    answers.taken()
    writer.offer_blocks([spill(20), spill(21)])
    writer.drop(drop(0))
    writer.persist(manifest("r"), 1)
    writer.offer_blocks([spill(22)])
    writer.stop()
    await run_to_the_end(writer)
    assert answers.taken() == [
        Failed(spill(20)[0], "capacity"),
        Failed(spill(21)[0], "capacity"),
        Landed(drop(0)),
        Persisted(1),
        Landed(spill(22)[0]),
    ]
    assert present(store) == keys(*range(1, 8), 22)
    assert writer.statistics().pending_bytes == 0


async def test_a_manifest_over_its_limits_fails_alone_and_the_thread_lives_on(tmp_path):
    answers = Answers()
    with opened(tmp_path) as store:
        writer = writer_of(store, answers)
        writer.offer_blocks([spill(1)])
        writer.persist(manifest("big", bytes(MAX_BODY_BYTES + 1)), 1)
        writer.persist(manifest("small"), 2)
        writer.stop()
        await run_to_the_end(writer)
    assert answers.taken() == [Landed(spill(1)[0]), PersistFailed(1, "manifest"), Persisted(2)]


@pytest.mark.parametrize("fault", Fault)
async def test_a_disk_that_fails_at_any_call_answers_each_command_and_serves_again(tmp_path, fault):
    """The n-th call of the disk fails, n = 1, 2, 3, until a run meets no fault."""
    answers, clock = Answers(), Clock()
    with faulty_disk() as faults, opened(tmp_path) as store:
        n = 0
        while n == 0 or faults.fired:
            n += 1
            writer = writer_of(store, answers, monotonic=clock)
            faults.arm(n, fault)
            assert writer.offer_blocks([spill(1)], manifest("r"), 1)
            writer.drop(drop(2))
            writer.forget_response("", "r", 2)
            writer.stop()
            await run_to_the_end(writer)
            faults.disarm()
            spilled, persisted, dropped, forgotten = answers.taken()
            assert spilled in (Landed(spill(1)[0]), *refusals(spill(1)[0]))
            assert persisted in (Persisted(1), PersistFailed(1, "io"), PersistFailed(1, "full"))
            assert dropped in (Landed(drop(2)), *refusals(drop(2)))
            known = isinstance(persisted, Persisted)
            assert isinstance(forgotten, PersistFailed) or forgotten.existed >= known
            clock.now += 10
            assert writer.offer_blocks([spill(1), spill(2)])  # a probe is due
            writer.stop()
            await run_to_the_end(writer)
            assert answers.taken() == [Landed(spill(1)[0]), Landed(spill(2)[0])]
            assert writer.statistics().state is DiskState.OK
            assert present(store) == keys(1, 2)
        assert n > 30


def refusals(action) -> list[Failed]:
    return [Failed(action, "io"), Failed(action, "full")]


async def test_a_degraded_disk_refuses_spills_at_once_probes_and_resumes(caplog):
    class Full(MemoryStore):
        full = True

        def write(self, *, blocks=(), manifests=(), drops=()) -> None:
            if self.full and blocks:
                raise StoreError("full", "no space")
            super().write(blocks=blocks, manifests=manifests, drops=drops)

    store, answers, clock = Full(**SHAPE), Answers(), Clock()
    writer = writer_of(store, answers, monotonic=clock, probe_s=3.0)

    async def settled(*given) -> list:
        """Whether the offer was taken, and what was answered."""
        taken = writer.offer_blocks(*given)
        writer.stop()
        await run_to_the_end(writer)
        return [taken, *answers.taken()]

    assert writer.statistics().state is DiskState.OK
    assert await settled([spill(1)], manifest("a"), 1) == [
        True,
        Failed(spill(1)[0], "full"),
        Persisted(1),  # a manifest needs no block
    ]
    for _ in range(3):
        assert await settled([spill(1)], manifest("b"), 2) == [False]
        assert await settled([], manifest("b"), 2) == [True, Persisted(2)]
    clock.now += 2.9
    assert await settled([spill(1)]) == [False]
    clock.now += 0.1
    assert await settled([spill(1)]) == [True, Failed(spill(1)[0], "full")]
    assert await settled([spill(1)]) == [False]
    found = writer.statistics()
    assert (found.state, found.reason, found.refused) == (DiskState.DEGRADED, "full", 5)
    assert found.failures == {"full": 2}
    assert found.degraded_s == pytest.approx(3.0)
    store.full = False
    clock.now += 3.0
    assert await settled([spill(1)]) == [True, Landed(spill(1)[0])]
    assert writer.statistics().state is DiskState.OK
    assert await settled([spill(2)]) == [True, Landed(spill(2)[0])]
    said = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
    assert said == [
        "the disk tier is degraded: full: no space",
        "the disk tier has resumed after 6 s and 2 failures",
    ]


async def test_what_waits_when_the_disk_fails_is_refused_without_trying(tmp_path):
    class Broken(MemoryStore):
        tried = 0

        def write(self, *, blocks=(), manifests=(), drops=()) -> None:
            self.tried += bool(blocks)
            raise StoreError("io", "broken")

    store, answers = Broken(**SHAPE), Answers()
    writer = writer_of(store, answers, batch_bytes=PAYLOAD_BYTES, monotonic=Clock())
    for number in range(6):
        assert writer.offer_blocks([spill(number)])
    writer.stop()
    await run_to_the_end(writer)
    assert answers.taken() == [Failed(spill(number)[0], "io") for number in range(6)]
    assert store.tried == 1
    assert writer.idle


async def test_a_store_that_a_failure_closed_is_opened_again_without_anything_to_write(tmp_path):
    answers, clock = Answers(), Clock()
    with faulty_disk() as faults, opened(tmp_path) as store:
        writer = writer_of(store, answers, monotonic=clock)
        faults.arm(1, Fault.EIO, lasting=True)
        writer.offer_blocks([spill(1)])
        writer.drop(drop(2))
        writer.stop()
        await run_to_the_end(writer)
        assert answers.taken() == [Failed(spill(1)[0], "io"), Failed(drop(2), "io")]
        assert store._env is None
        faults.disarm()
        clock.now += 4
        writer.stop()
        await run_to_the_end(writer)
        assert present(store) == set()  # read, and found empty


async def test_blocks_over_the_budget_are_no_trouble_of_the_disk():
    answers, store = Answers(), MemoryStore(**SHAPE)
    writer = writer_of(store, answers)
    writer.offer_blocks([spill(number) for number in range(9)])
    writer.offer_blocks([spill(20)])
    writer.stop()
    await run_to_the_end(writer)
    assert {answer.reason for answer in answers.taken() if isinstance(answer, Failed)} == {
        "capacity"
    }
    assert writer.statistics().state is DiskState.OK
    assert present(store) == keys(20)


async def test_a_manifest_at_fault_takes_no_blocks_along(tmp_path):
    answers, store = Answers(), MemoryStore(**SHAPE)
    writer = writer_of(store, answers)
    writer.offer_blocks([spill(1)], manifest("big", bytes(MAX_BODY_BYTES + 1)), 1)
    writer.stop()
    await run_to_the_end(writer)
    assert answers.taken() == [PersistFailed(1, "manifest"), Landed(spill(1)[0])]


async def test_the_readers_are_looked_at_every_minute(caplog):
    class Held(MemoryStore):
        def check_readers(self) -> ReaderCheck:
            return ReaderCheck(90.0, 2)

    answers, clock = Answers(), Clock()
    writer = writer_of(Held(**SHAPE), answers, monotonic=clock)
    for minute, cleared in ((0, 0), (1, 2), (1, 2), (2, 4)):
        clock.now = 60.0 * minute
        writer.persist(manifest("r"), None)
        writer.stop()
        await run_to_the_end(writer)
        assert writer.statistics().cleared_readers == cleared
    assert writer.statistics().oldest_read_s == 90.0
    assert "has not ended for 90 s" in caplog.text


async def test_a_read_that_fails_once_is_read_again_and_a_refused_one_is_not():
    class Shaky(MemoryStore):
        failures = 0
        reads = 0

        def read(self, key, parent, tokens, into) -> None:
            self.reads += 1
            if self.failures:
                self.failures -= 1
                raise StoreError("io", "")
            super().read(key, parent, tokens, into)

    store, answers = Shaky(**SHAPE), Answers()
    writer = writer_of(store, answers)
    writer.offer_blocks([spill(1)])
    writer.stop()
    await run_to_the_end(writer)
    for number, failures, reason, reads in (
        (1, 0, None, 1),
        (1, 1, None, 2),
        (1, 2, "io", 2),
        (2, 0, "missing", 1),
    ):
        answers.taken()
        store.failures, store.reads = failures, 0
        reader = DiskReader(store, SimpleQueue(), answers)
        reader.fetch(fetch(number), memoryview(bytearray(PAYLOAD_BYTES)))
        reader.stop()
        await run_to_the_end(reader)
        expected = Landed(fetch(number)) if reason is None else Failed(fetch(number), reason)
        assert answers.taken() == [expected]
        assert store.reads == reads


class Waits:
    """An inbox that notes how long the scrubber would wait, and ends it after so many waits."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.waits: list[float] = []

    def get(self, timeout: float) -> Stop:
        self.waits.append(timeout)
        self.left -= 1
        if self.left < 0:
            return Stop()
        raise Empty


def scrubber_of(store, answers, writer, inbox, fetches=None) -> Scrubber:
    fetches = fetches or SimpleQueue()
    return Scrubber(store, inbox, answers, writer=writer, fetches=fetches, bytes_per_s=1000.0)


async def test_the_scrubber_reads_everything_at_its_rate_and_reports_what_is_rotten(tmp_path):
    answers = Answers()
    with opened(tmp_path) as store:
        writer = writer_of(store, answers)
        writer.offer_blocks([spill(number) for number in range(5)])
        writer.stop()
        await run_to_the_end(writer)
        answers.taken()
        discarded = []
        rotten, unlisted, orphan = (spill(number)[0].key for number in (1, 2, 3))
        with store._env.begin(write=True) as txn:
            for key, table in ((rotten, store._blocks), (unlisted, store._index)):
                value = bytearray(txn.get(key, db=table))
                value[-1] ^= 4
                txn.put(key, bytes(value), db=table)
            txn.delete(orphan, db=store._index)
        store._acknowledged += 1
        inbox = Waits(12)
        scrubber = scrubber_of(
            store, answers, SimpleNamespace(idle=True, discard=discarded.append), inbox
        )
        scrubber.run()
        size = 496 + PAYLOAD_BYTES
        assert inbox.waits == [60.0, *[size / 1000] * 5, 60.0, *[size / 1000] * 5, 60.0]
        assert discarded == sorted((unlisted, orphan)) * 2
        for key in (*discarded, *keys(0)):
            writer.discard(key)
        found = scrubber.statistics()
        assert (found.records, found.bytes, found.passes) == (10, 10 * size, 2)
        assert found.bad == {"checksum": 2, "index": 4}
        assert answers.taken() == [Rotten(rotten, "checksum")] * 2
        writer.stop()
        await run_to_the_end(writer)
        assert present(store) == keys(0, 1, 4)  # the rotten one is for the tables to drop
        with store._env.begin() as txn:
            assert txn.stat(db=store._blocks)["entries"] == 3
            assert store.statistics() == store._statistics_of(txn, store._recount(txn))


async def test_the_scrubber_stands_back_and_outlives_a_disk_that_cannot_be_read():
    class Unreadable(MemoryStore):
        def examine(self, after):
            raise StoreError("io", "")

    answers, fetches = Answers(), SimpleQueue()
    store = MemoryStore(**SHAPE)
    writer = writer_of(store, answers)
    fetches.put(Stop())
    busy = Waits(3)
    scrubber_of(store, answers, writer, busy, fetches).run()
    assert busy.waits == [60.0, 0.5, 0.5, 0.5]
    writer.offer_blocks([spill(1)])
    busy = Waits(3)
    scrubber_of(store, answers, writer, busy).run()
    assert busy.waits == [60.0, 0.5, 0.5, 0.5]
    broken = Waits(2)
    scrubber_of(Unreadable(**SHAPE), answers, writer_of(store, answers), broken).run()
    assert broken.waits == [60.0, 60.0, 60.0]


async def test_a_scrubber_ends_when_it_is_told(tmp_path):
    answers = Answers()
    store = MemoryStore(**SHAPE)
    scrubber = scrubber_of(store, answers, writer_of(store, answers), SimpleQueue())
    scrubber.stop()
    await run_to_the_end(scrubber)


async def test_several_readers_share_the_work_and_stop_after_it(tmp_path):
    answers = Answers()
    with opened(tmp_path) as store:
        writer = writer_of(store, answers)
        writer.offer_blocks([spill(number) for number in range(8)])
        writer.stop()
        await run_to_the_end(writer)
        answers.taken()
        inbox = SimpleQueue()
        readers = [DiskReader(store, inbox, answers) for _ in range(4)]
        arena = [memoryview(bytearray(b"\xee" * PAYLOAD_BYTES)) for _ in range(9)]
        for number in range(9):
            readers[0].fetch(fetch(number), arena[number])
        for reader in readers:
            reader.stop()
        await run_to_the_end(*readers)
        found = answers.taken()
    assert len(found) == 9
    assert {answer for answer in found if isinstance(answer, Landed)} == {
        Landed(fetch(number)) for number in range(8)
    }
    assert Failed(fetch(8), "missing") in found
    for number in range(8):
        assert arena[number] == spill(number)[1]
    assert arena[8] == b"\xee" * PAYLOAD_BYTES


async def test_readers_answer_for_the_index_and_for_chains(tmp_path):
    answers = Answers()
    with opened(tmp_path) as store:
        writer = writer_of(store, answers)
        writer.offer_blocks([spill(number) for number in range(5)])
        writer.stop()
        await run_to_the_end(writer)
        answers.taken()
        entries = tuple(store.index(None, 5))
        reader = DiskReader(store, SimpleQueue(), answers)
        reader.read_index(None, 3)
        reader.read_index(entries[2].key, 3)
        reader.read_index(None, 5)
        reader.read_index(entries[4].key, 3)
        reader.find_chain(7, ROOT, (3, 4, 9))
        reader.find_chain(8, ROOT, (9, 9))
        reader.stop()
        await run_to_the_end(reader)
        (third,) = [entry for entry in entries if entry.tokens == (3, 4)]
        assert answers.taken() == [
            IndexSlice(entries[:3], entries[2].key),
            IndexSlice(entries[3:], None),
            IndexSlice(entries, entries[4].key),
            IndexSlice((), None),
            ChainFound(7, (third,)),
            ChainFound(8, ()),
        ]


async def test_a_disk_that_cannot_be_read_is_an_answer_too(tmp_path):
    class Unreadable(MemoryStore):
        def index(self, after, limit):
            raise StoreError("io", "")

        def find_chain(self, root, tokens):
            raise StoreError("io", "")

    answers = Answers()
    reader = DiskReader(Unreadable(**SHAPE), SimpleQueue(), answers)
    reader.read_index(None, 3)
    reader.find_chain(7, ROOT, (3, 4, 9))
    reader.stop()
    await run_to_the_end(reader)
    assert answers.taken() == [IndexFailed(None, "io"), ChainFound(7, ())]


async def test_readers_and_the_writer_work_side_by_side(tmp_path):
    """Whatever the writer is doing, a read gives a whole record or a reason; a slot is never half written."""
    answers, reads = Answers(), Answers()
    with opened(tmp_path) as store:
        writer = writer_of(store, answers, batch_bytes=PAYLOAD_BYTES)
        inbox = SimpleQueue()
        readers = [DiskReader(store, inbox, reads) for _ in range(3)]
        slots = [memoryview(bytearray(b"\xee" * PAYLOAD_BYTES)) for _ in range(60)]
        for number in range(60):
            writer.offer_blocks([spill(number % 4)])
            readers[0].fetch(fetch(number % 4), slots[number])
            if number % 5 == 0:
                writer.drop(drop(number % 4))
        for thread in (writer, *readers):
            thread.stop()
        await run_to_the_end(writer, *readers)
    found = reads.taken()
    assert len(found) == 60
    assert all(isinstance(answer, Landed) or answer.reason == "missing" for answer in found)
    assert all(slots[n] in (spill(n % 4)[1], b"\xee" * PAYLOAD_BYTES) for n in range(60))
    assert all(isinstance(answer, Landed) for answer in answers.taken())


async def test_a_bug_ends_the_thread_loudly():
    """Only a StoreError is an answer. Here: a store that breaks its protocol."""

    class Broken(MemoryStore):
        def write(self, **parts) -> None:
            raise ZeroDivisionError

    writer = writer_of(Broken(**SHAPE), Answers())
    writer.offer_blocks([spill(1)])
    with pytest.raises(ZeroDivisionError):
        writer.run()
