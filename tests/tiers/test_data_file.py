"""Reads past LMDB: whatever the place, the page cache or the file system says, the right bytes come or a reason does."""

import errno
import mmap
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from tests.tiers.faulty_lmdb import Fault, faulty_disk
from tests.tiers.medium import evict, overwrite, place_on_disk, replace_record
from tests.tiers.small_store import LIMITS, PAYLOAD_BYTES, block, opened, payload
from tiers import data_file, lmdb_store
from tiers.block import StoreError
from tiers.data_file import UNKNOWN
from tiers.store import Durability, StoreLimits, Way

DIRECT = os.O_DIRECT


def read(store, number: int, begin: int = 1) -> bytes | str:
    """The payload, or why there is none; then nothing that was refused may be left. It is read to `begin` in a page."""
    wanted = block(number)
    into = memoryview(mmap.mmap(-1, 4096 + PAYLOAD_BYTES))[begin : begin + PAYLOAD_BYTES]
    into[:] = b"\xee" * PAYLOAD_BYTES
    try:
        store.read(wanted.key, wanted.parent, wanted.tokens, into)
    except StoreError as error:
        assert set(into) in ({0xEE}, {0xFF})
        return error.reason
    return bytes(into)


def place(store, number: int) -> int:
    with store._env.begin() as txn:
        return lmdb_store._index_entry(
            block(number).key, txn.get(block(number).key, db=store._index)
        ).place


def hint(store, number: int, where: int) -> None:
    """The index says, under a good seal, that the record lies at `where`."""
    key = block(number).key
    with store._env.begin(write=True) as txn:
        entry = bytearray(txn.get(key, db=store._index)[8:])
        fields = list(lmdb_store._INDEX.unpack_from(entry))
        lmdb_store._INDEX.pack_into(entry, 0, *fields[:-1], where)
        txn.put(key, lmdb_store._seal(key, bytes(entry)), db=store._index)


@contextmanager
def reading(preadv=None, opening=None):
    """The system's calls, some of them replaced for whoever reads past LMDB."""
    system = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
    system.preadv = preadv or os.preadv
    system.open = opening or os.open
    with patch.object(data_file, "os", system):
        yield


def never_cached(file, buffers, offset, flags=0):
    if flags & os.RWF_NOWAIT:
        raise BlockingIOError(errno.EAGAIN, "not in the page cache")
    return os.preadv(file, buffers, offset, flags)


def any_direct(path, flags, *given):
    """O_DIRECT that every file system knows: for tests of who asks for it, not of what it is."""
    return os.open(path, flags & ~DIRECT, *given)


def without_direct(path, flags, *given):
    """As a file system that does not know it."""
    if flags & DIRECT:
        raise OSError(errno.EINVAL, "no O_DIRECT here")
    return os.open(path, flags, *given)


def descriptors(path) -> int:
    """How many of this process lead to the data file."""
    data, count = str(path / "kv" / "data.mdb"), 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists them is gone by now
            count += os.readlink(f"/proc/self/fd/{name}") == data
    return count


# the ways


def test_what_was_written_comes_from_the_page_cache_and_what_is_not_there_past_it(tmp_path):
    with reading(opening=any_direct), opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        assert read(store, 1) == payload(1)
        assert store.statistics().reads == {Way.CACHED: 1}
        with reading(never_cached):
            for begin, way in ((0, Way.DIRECT), (512, Way.DIRECT), (64, Way.BOUNCED)):
                before = store.statistics().reads.get(way, 0)
                assert read(store, 1, begin) == payload(1)
                assert store.statistics().reads[way] == before + 1
        assert store.statistics().reads == {Way.CACHED: 1, Way.DIRECT: 2, Way.BOUNCED: 1}


@pytest.mark.parametrize("durability", Durability)
def test_a_record_is_read_past_the_page_cache_before_it_was_ever_synced(tmp_path, durability):
    with opened(tmp_path, durability=durability) as store:
        with reading(never_cached):
            for number in range(20):
                store.write(blocks=[block(number)])
                assert read(store, number, 0) == payload(number)
                assert read(store, number) == payload(number)


def test_a_file_system_without_either_gives_the_same_bytes(tmp_path):
    with reading(never_cached, without_direct), opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        assert read(store, 1) == payload(1)
        assert store.statistics().reads == {Way.BUFFERED: 1}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.EOPNOTSUPP, errno.ENOMEM])
@pytest.mark.parametrize("fails", ["O_DIRECT", "short O_DIRECT", "all but plain"])
@pytest.mark.parametrize("begin", [0, 1])
def test_a_way_that_fails_costs_nothing_but_the_next_one(tmp_path, number, fails, begin):
    with reading(opening=any_direct), opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        direct = store._data._direct

        def preadv(file, buffers, offset, flags=0):
            if file == direct and fails == "short O_DIRECT":
                return os.preadv(file, buffers, offset, flags) - 4096
            if file == direct or (flags and fails == "all but plain"):
                raise OSError(number, os.strerror(number))
            return never_cached(file, buffers, offset, flags)

        with reading(preadv):
            assert read(store, 1, begin) == payload(1)
        assert store.statistics().reads == {Way.BUFFERED: 1}


def test_a_disk_of_larger_sectors_is_read_by_whole_pages(tmp_path):
    with reading(opening=any_direct), opened(tmp_path) as store:
        store.write(blocks=[block(1)])

        def preadv(file, buffers, offset, flags=0):
            if file == store._data._direct and any(len(part) % 4096 for part in buffers):
                raise OSError(errno.EINVAL, "not whole sectors")
            return never_cached(file, buffers, offset, flags)

        with reading(preadv):
            assert read(store, 1, 0) == payload(1)
        assert store.statistics().reads == {Way.BOUNCED: 1}


def test_what_the_disk_put_in_its_place_does_not_stay_unless_it_is_believed(tmp_path):
    """A flipped bit, and a request that breaks off after the disk has written half."""
    with reading(opening=any_direct), opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        where, size = place_on_disk(store._env, store._blocks, block(1).key)
        data = tmp_path / "kv" / "data.mdb"
        good = data.read_bytes()[where : where + size]
        for at, reason in ((0, "magic"), (300, "checksum"), (size - 1, "checksum")):
            overwrite(data, where, flipped(good, at))
            with reading(never_cached):
                assert read(store, 1, 0) == reason  # looks at what is left, too
        overwrite(data, where, good)

        def preadv(file, buffers, offset, flags=0):
            never_cached(file, buffers, offset, flags)
            raise OSError(errno.EIO, "half of it")

        with reading(preadv):
            assert read(store, 1, 0) == "io"
        assert read(store, 1, 0) == payload(1)


def flipped(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def test_a_record_that_is_in_the_page_cache_in_part_is_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("tiers.hashed_copy._PIECE_BYTES", 1000)
    for whole in range(9):  # calls that give all that was asked for
        calls = []

        def preadv(file, buffers, offset, flags=0, whole=whole, calls=calls):
            if flags:
                calls.append(offset)
            if len(calls) > whole:
                calls.clear()
                return os.preadv(file, [buffers[0][:-1]], offset, flags)  # short
            return os.preadv(file, buffers, offset, flags)

        with opened(tmp_path / str(whole)) as store:
            store.write(blocks=[block(1)])
            with reading(preadv):
                assert read(store, 1) == payload(1)
            assert (Way.CACHED in store.statistics().reads) == (whole == 8)
            assert Way.MAPPED not in store.statistics().reads


def test_where_the_disk_cannot_read_the_map_is_not_asked(tmp_path):
    """It would be a SIGBUS there, and the same one after the next start."""
    with faulty_disk() as faults, opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        faults.arm(1, Fault.EIO, lasting=True, only="preadv")
        faults.calls.clear()
        assert read(store, 1) == "io"
        assert faults.calls["get"] == 1  # of the index
        assert len(faults.fired) == 3  # from the page cache, past it, plainly
        faults.disarm()
        assert read(store, 1) == payload(1)


# the place


@pytest.mark.parametrize("cached", [True, False])
def test_a_place_that_is_wrong_or_absent_costs_time_and_never_bytes(tmp_path, cached):
    with opened(tmp_path) as store, nullcontext() if cached else reading(never_cached):
        store.write(blocks=[block(1), block(2)])
        size = (tmp_path / "kv" / "data.mdb").stat().st_size
        right = place(store, 1)
        wrong = [UNKNOWN, place(store, 2), right + 1, right + 4096, 16, size - 4096, size, 1 << 50]
        for where in wrong:
            hint(store, 1, where)
            before = store.statistics().reads.get(Way.MAPPED, 0)
            assert read(store, 1) == payload(1)
            assert store.statistics().reads[Way.MAPPED] == before + 1
            assert read(store, 2) == payload(2)
        hint(store, 1, right)
        before = store.statistics().reads[Way.MAPPED]
        assert read(store, 1) == payload(1)
        assert store.statistics().reads[Way.MAPPED] == before


def test_a_record_that_is_damaged_at_its_place_is_refused_for_what_lmdb_has(tmp_path):
    """Once, with one reason, whatever was found first."""
    with opened(tmp_path) as store:
        store.write(blocks=[block(1), block(2)])
        where, size = place_on_disk(store._env, store._blocks, block(1).key)
        data = tmp_path / "kv" / "data.mdb"
        good = data.read_bytes()[where : where + size]
        for at, reason in ((0, "magic"), (50, "key"), (495, "checksum"), (size - 1, "checksum")):
            for gone in (False, True):
                overwrite(data, where, flipped(good, at))
                if gone:
                    evict(data)
                assert read(store, 1, 0) == read(store, 1) == reason
                overwrite(data, where, good)
        assert read(store, 1) == payload(1)
        assert Way.MAPPED not in store.statistics().reads


def test_a_whole_record_of_another_key_at_the_place_is_not_believed(tmp_path):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1), block(2)])
        with store._env.begin() as txn:
            of_2 = txn.get(block(2).key, db=store._blocks)
        replace_record(store._env, store._blocks, block(1).key, of_2)
        assert read(store, 1) == "key"


def test_a_block_whose_entry_is_gone_or_damaged_is_what_lmdb_says(tmp_path):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1), block(2)])
        with store._env.begin(write=True) as txn:
            txn.delete(block(1).key, db=store._index)
            txn.put(block(2).key, b"no entry", db=store._index)
        assert read(store, 1) == payload(1)
        assert read(store, 2) == payload(2)
        assert read(store, 3) == "missing"
        assert store.statistics().reads == {Way.MAPPED: 2}


def overwriting(store, breaks_at: int):
    """A `preadv` before whose call of that number block 1 is dropped, and others are written until its page is theirs."""
    where, calls, others = place(store, 1), [], range(10, 30)

    def preadv(file, buffers, offset, flags=0):
        calls.append(offset)
        if len(calls) == breaks_at:
            store.write(drops=[block(1).key])
            for number in others:
                store.write(blocks=[block(number)])
            assert where in {place(store, number) for number in others}
        return os.preadv(file, buffers, offset, flags)

    return preadv


def test_a_page_that_is_used_again_while_it_is_read_gives_no_others_bytes(tmp_path, monkeypatch):
    """Before its head is read, and between any two pieces behind it."""
    monkeypatch.setattr("tiers.hashed_copy._PIECE_BYTES", 1000)
    for breaks_at in range(1, 9):
        with opened(tmp_path / str(breaks_at)) as store:
            store.write(blocks=[block(1)])
            with reading(overwriting(store, breaks_at)):
                assert read(store, 1) == "missing"
            store.write(blocks=[block(1)])
            assert read(store, 1) == payload(1)


def test_readers_and_a_writer_that_reuses_every_page_never_meet_wrong_bytes(tmp_path):
    limits = StoreLimits(block_bytes=12 * 8192)
    rng, done = random.Random(0), threading.Event()
    with opened(tmp_path, limits=limits) as store:

        def read_on(seed: int) -> int:
            rng, found = random.Random(seed), 0
            while not done.is_set():
                number = rng.randrange(40)
                got = read(store, number, rng.choice((0, 1)))
                assert got in ("missing", payload(number))
                found += got != "missing"
            return found

        with ThreadPoolExecutor(3) as pool:
            readers = [pool.submit(read_on, seed) for seed in range(3)]
            try:
                live: list[int] = []
                for step in range(150):
                    rng.shuffle(live)
                    gone, live = live[8:], live[:8]
                    fresh = rng.sample([n for n in range(40) if n not in live], 4)
                    drops = [block(n).key for n in gone if n not in fresh]
                    store.write(blocks=[block(n) for n in fresh], drops=drops)
                    live += fresh
                    if step % 10 == 0:
                        evict(tmp_path / "kv" / "data.mdb")
            finally:
                done.set()
            assert all(reader.result() > 0 for reader in readers)


# descriptors and buffers


def test_the_files_descriptors_come_and_go_with_the_environment(tmp_path):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        held = descriptors(tmp_path)
        assert held >= 2
    assert descriptors(tmp_path) == 0
    with faulty_disk() as faults:
        with opened(tmp_path) as store:
            for n in range(1, 40):
                faults.arm(n, Fault.EIO)
                try:
                    store.write(blocks=[block(2)], drops=[block(3).key])
                    store.write(drops=[block(2).key])
                except StoreError:
                    pass
                faults.disarm()
                store.write()
                assert read(store, 1) == payload(1)
                assert descriptors(tmp_path) == held
        assert descriptors(tmp_path) == 0


@pytest.mark.parametrize("which", [0, 1])
def test_a_store_whose_file_cannot_be_opened_for_reading_leaves_nothing_open(tmp_path, which):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
    opens = []

    def opening(path, flags, *given):
        opens.append(path)
        if len(opens) > which:
            raise OSError(errno.EMFILE, "too many")
        return os.open(path, flags, *given)

    with reading(opening=opening), pytest.raises(StoreError) as caught, opened(tmp_path):
        pass
    assert caught.value.reason == "io"
    assert descriptors(tmp_path) == 0
    with opened(tmp_path) as store:
        assert read(store, 1) == payload(1)


def test_readers_at_once_have_a_buffer_each_and_later_ones_use_them_again(tmp_path):
    used, together = [], threading.Barrier(2)  # parts of memory that is read to

    def preadv(file, buffers, offset, flags=0):
        got = never_cached(file, buffers, offset, flags)
        used.append(buffers[0].obj)
        together.wait(10)
        return got

    with reading(preadv, any_direct), opened(tmp_path) as store:
        store.write(blocks=[block(1), block(2)])
        for _ in range(3):
            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(lambda number: read(store, number), (1, 2)))
            assert found == [payload(1), payload(2)]
        assert store.statistics().reads == {Way.BOUNCED: 6}
    assert all(one is not other for one, other in zip(used[::2], used[1::2], strict=True))
    assert len({id(buffer) for buffer in used}) == 2


def test_an_environment_that_is_put_aside_is_held_by_nobody(tmp_path):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        with store._env.begin(write=True) as txn:
            txn.put(b"format", b"another", db=store._meta)
    with opened(tmp_path) as store:
        assert store.statistics().blocks == 0
        aside = str(tmp_path / "kv.other-format" / "data.mdb")
        assert aside not in {
            os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
        }


def test_a_reader_that_reads_past_lmdb_is_waited_for_when_the_environment_is_opened_again(tmp_path):
    """A descriptor that is closed under a reader may be another file's by the time that it is read."""
    entered, leave = threading.Event(), threading.Event()

    def preadv(file, buffers, offset, flags=0):
        entered.set()
        assert leave.wait(10)
        return os.preadv(file, buffers, offset, flags)

    with faulty_disk() as faults, opened(tmp_path, limits=LIMITS) as store:
        store.write(blocks=[block(1)])
        with reading(preadv), ThreadPoolExecutor(2) as pool:
            reader = pool.submit(read, store, 1)
            assert entered.wait(10)
            assert store.check_readers().oldest_s > 0
            faults.arm(1, Fault.EIO, only="commit")
            with pytest.raises(StoreError):
                store.write(blocks=[block(2)])
            faults.disarm()
            held = store._data
            writer = pool.submit(store.write, blocks=[block(2)])
            with pytest.raises(TimeoutError):
                writer.result(0.2)
            assert store._data is held
            leave.set()
            assert reader.result() == payload(1)
            writer.result()
        assert store._data is not held
        assert read(store, 2) == payload(2)
