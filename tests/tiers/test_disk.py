"""The disk threads: every command answered once, in order, after the commit; bounded; ended by a stop."""

from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event

import lmdb
import pytest
import trio

from tests.tiers.faulty_lmdb import Countdown, FaultyEnv
from tiers.block import Drop, Fetch, Slot, Spill, StoreError, Tier, chain_key, root_key
from tiers.disk import (
    ChainFound,
    DiskReader,
    DiskWriter,
    Failed,
    Forgotten,
    IndexFailed,
    IndexSlice,
    Landed,
    Persisted,
    PersistFailed,
)
from tiers.lmdb_store import LmdbStore
from tiers.manifest import MAX_BODY_BYTES, Manifest
from tiers.state_dir import StateDir
from tiers.store import MemoryStore, StoreLimits, whole_index

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
        Failed(spill(20)[0], "full"),
        Failed(spill(21)[0], "full"),
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


async def test_a_failing_disk_answers_each_command_and_serves_again_when_it_heals(tmp_path):
    answers = Answers()
    with opened(tmp_path) as store:
        healthy = store._env
        for calls in range(1, 25):
            store._env = FaultyEnv(healthy, Countdown(calls, lmdb.Error))
            writer = writer_of(store, answers)
            writer.offer_blocks([spill(1)], manifest("r"), 1)
            writer.forget_response("", "r", 2)
            writer.stop()
            await run_to_the_end(writer)
            first, second, third = answers.taken()
            assert first in (Landed(spill(1)[0]), Failed(spill(1)[0], "io"))
            assert second == (Persisted(1) if isinstance(first, Landed) else PersistFailed(1, "io"))
            assert third in (
                PersistFailed(2, "io"),
                Forgotten(2, existed=isinstance(first, Landed)),
            )
        store._env = healthy
        assert third == Forgotten(2, existed=True)


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
