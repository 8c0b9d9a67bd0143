"""`LmdbStore` against its medium: wrong bytes, missing bytes, no room, other users, other processes, sudden death."""

import os
import random
import resource
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import lmdb
import pytest

from tests.tiers.faulty_lmdb import Fault, faulty_disk
from tests.tiers.medium import replace_record
from tests.tiers.small_store import (
    FINGERPRINT,
    LIMITS,
    PAYLOAD_BYTES,
    ROOT,
    block,
    manifest,
    opened,
    payload,
)
from tiers import inspection as inspection_module
from tiers import lmdb_store
from tiers.block import StoreError, chain_key
from tiers.inspection import Damaged, Finding, Inspection, inspecting
from tiers.lmdb_store import LmdbStore, scrub
from tiers.state_dir import StateDir, StateDirRefused
from tiers.store import (
    BlockWrite,
    Durability,
    ForgottenResponse,
    MemoryStore,
    StoreLimits,
    item_name,
    response_name,
    whole_index,
)

TREE = Path(__file__).parents[2]


def read(store, write: BlockWrite) -> bytes:
    into = bytearray(b"\xee" * PAYLOAD_BYTES)
    store.read(write.key, write.parent, write.tokens, memoryview(into))
    return bytes(into)


def recounted(store):
    """The statistics, by a walk over everything."""
    with store._env.begin() as txn:
        return store._statistics_of(txn, store._recount(txn))


def asked(entry) -> BlockWrite:
    """Whatever `read` needs to know of a block that the index names."""
    return BlockWrite(
        entry.key, entry.root, entry.parent, entry.depth, entry.tokens, memoryview(b""), 0.0
    )


def refusal(store, write: BlockWrite) -> str:
    into = bytearray(b"\xee" * PAYLOAD_BYTES)
    with pytest.raises(StoreError) as caught:
        store.read(write.key, write.parent, write.tokens, memoryview(into))
    left = b"\xff" if caught.value.reason == "checksum" else b"\xee"
    assert into == left * PAYLOAD_BYTES
    return caught.value.reason


def raw(store, table: str, key: bytes, change) -> None:
    """Change a value behind the store's back, as a bad disk would."""
    database = getattr(store, f"_{table}")
    with store._env.begin() as txn:
        value = change(txn.get(key, db=database))
    if table == "blocks":
        replace_record(store._env, database, key, value)
        return
    with store._env.begin(write=True) as txn:
        txn.put(key, value, db=database)


def flip(bit: int):
    def flipped(value: bytes) -> bytes:
        changed = bytearray(value)
        changed[bit // 8 % len(value)] ^= 1 << bit % 8
        return bytes(changed)

    return flipped


# wrong bytes


def test_one_flipped_bit_anywhere_in_a_value_is_refused(tmp_path):
    write = block(1)
    with opened(tmp_path) as store:
        store.write(blocks=[write])
        bits = random.Random(0).sample(range(8 * 200), 100)
        bits += random.Random(0).sample(range(8 * (496 + PAYLOAD_BYTES)), 100)
        for bit in bits:
            raw(store, "blocks", write.key, flip(bit))
            assert refusal(store, write) in {
                "magic", "version", "size", "fingerprint", "key", "tokens", "checksum",
            }  # fmt: skip
            raw(store, "blocks", write.key, flip(bit))
        assert read(store, write) == write.payload


def test_the_record_of_one_key_under_another_is_refused(tmp_path):
    """A misdirected write: whole, with a good checksum, in the wrong place."""
    with opened(tmp_path) as store:
        store.write(blocks=[block(1), block(2)])
        with store._env.begin() as txn:
            of_1 = txn.get(block(1).key, db=store._blocks)
        raw(store, "blocks", block(2).key, lambda _: of_1)
        assert refusal(store, block(2)) == "key"
        assert read(store, block(1)) == payload(1)


def test_a_record_cut_short_is_refused(tmp_path):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        for size in (0, 1, 143, 144, 495, 496, 497, 496 + PAYLOAD_BYTES - 1):
            raw(store, "blocks", block(1).key, lambda value, size=size: value[:size])
            assert refusal(store, block(1)) == "size"
            store.write(blocks=[block(1)])


def test_the_blocks_of_another_model_are_neither_listed_nor_read(tmp_path):
    """Not even when the keys agree, which takes a bug elsewhere: the record itself names its model."""
    with opened(tmp_path) as store:
        store.write(blocks=[block(1), block(2)])
    with opened(tmp_path, fingerprint=b"g" * 32) as store:
        assert list(whole_index(store)) == []
        assert refusal(store, block(1)) == "fingerprint"
        assert store.statistics().foreign_blocks == 2
    with opened(tmp_path) as store:
        assert read(store, block(1)) == payload(1)  # and nothing is lost by the visit


def test_records_of_another_model_make_room_until_none_is_left(tmp_path):
    limits = StoreLimits(block_bytes=4 * 8192)
    with opened(tmp_path, limits=limits) as store:
        store.write(blocks=[block(number) for number in (3, 1, 2)])
    with opened(tmp_path, limits=limits, fingerprint=b"g" * 32) as store:
        store.write(blocks=[block(number) for number in (10, 11)])
        assert store.statistics().foreign_blocks == 2
    with opened(tmp_path, limits=limits) as store:
        assert {entry.tokens[0] for entry in whole_index(store)} < {1, 2, 3}
        store.write(blocks=[block(12), block(13)])
        with pytest.raises(StoreError) as caught:  # its own blocks are its owner's to choose
            store.write(blocks=[block(14), block(15)])
        assert caught.value.reason == "capacity"
        assert store.statistics().foreign_blocks == 0


def test_a_record_that_is_replaced_makes_no_room_for_itself(tmp_path):
    limits = StoreLimits(block_bytes=4 * 8192)
    with opened(tmp_path, limits=limits, fingerprint=b"g" * 32) as store:
        store.write(blocks=[block(number) for number in range(4)])
    with opened(tmp_path, limits=limits) as store:
        store.write(blocks=[block(0), block(5)])
        assert store.statistics().block_bytes == limits.block_bytes
        assert store.statistics().blocks == 2


def test_a_damaged_index_entry_costs_its_block_only(tmp_path):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1), block(2)])
    rng = random.Random(1)
    for _ in range(12):
        bit = rng.randrange(8 * 100)
        with opened(tmp_path) as store:
            raw(store, "index", block(1).key, flip(bit))
        with opened(tmp_path) as store:
            assert [entry.key for entry in whole_index(store)] == [block(2).key]
            assert store.statistics().block_bytes == 2 * 8192
            raw(store, "index", block(1).key, flip(bit))
    with opened(tmp_path) as store:
        assert len(list(whole_index(store))) == 2


def test_a_block_without_an_index_entry_takes_room_until_it_is_discarded(tmp_path):
    limits = StoreLimits(block_bytes=2 * 8192)
    with opened(tmp_path, limits=limits) as store:
        store.write(blocks=[block(1), block(2)])
        with store._env.begin(write=True) as txn:
            txn.delete(block(1).key, db=store._index)
    with opened(tmp_path, limits=limits) as store:
        with pytest.raises(StoreError) as caught:
            store.write(blocks=[block(3)])
        assert caught.value.reason == "capacity"
        store.discard(block(2).key)  # that one is as it should be
        store.discard(block(1).key)
        assert recounted(store) == store.statistics()
        store.write(blocks=[block(3)])
        assert {entry.key for entry in whole_index(store)} == {block(2).key, block(3).key}


def test_a_damaged_manifest_is_refused_and_a_misplaced_one_too(tmp_path):
    with opened(tmp_path) as store:
        store.write(manifests=[manifest(1), manifest(2), manifest(3)])
        raw(store, "manifests", response_name("t", "r1"), flip(8 * 100))
        with store._env.begin() as txn:
            of_2 = txn.get(response_name("t", "r2"), db=store._manifests)
        raw(store, "manifests", response_name("t", "r3"), lambda _: of_2)
        raw(store, "names", item_name("t", "item3"), lambda _: response_name("t", "r2"))
        for lookup in (
            lambda: store.find_response("t", "r1"),
            lambda: store.find_item("t", "item1"),
            lambda: store.find_content("t", manifest(1).content_digest),
            lambda: store.find_response("t", "r3"),
            lambda: store.find_item("t", "item3"),
        ):
            with pytest.raises(StoreError) as caught:
                lookup()
            assert caught.value.reason == "manifest"
        assert store.find_response("t", "r2") == manifest(2)


def test_damaged_ages_never_stop_manifests_from_coming_and_going(tmp_path):
    with opened(tmp_path) as store:
        store.write(manifests=[manifest(number) for number in range(10)])
        for age in range(0, 10, 2):
            raw(store, "ages", age.to_bytes(8, "big"), flip(age * 37 + 64))
        raw(store, "manifests", response_name("t", "r3"), flip(8 * 60))
    with opened(tmp_path) as store:
        assert store.statistics().manifests == 10
        for number in range(10, 50):
            store.write(manifests=[manifest(number)])
        assert store.statistics().manifests == LIMITS.manifests
        assert all(
            store.find_item("t", f"item{number}") == manifest(number) for number in range(30, 50)
        )
        assert store.find_response("t", "r5") is None


def test_the_scrub_names_what_is_bad_and_why(tmp_path):
    with opened(tmp_path) as store:
        store.write(blocks=[block(n) for n in range(5)], manifests=[manifest(1), manifest(2)])
        raw(store, "blocks", block(0).key, flip(8 * 1000))
        raw(store, "index", block(1).key, flip(99))
        raw(store, "manifests", response_name("t", "r2"), flip(8 * 99))
        with store._env.begin(write=True) as txn:
            txn.delete(block(2).key, db=store._blocks)
            txn.delete(block(3).key, db=store._index)
    state = StateDir.open(tmp_path)
    steps = list(scrub(state))
    state.close()
    assert [step.done for step in steps] == list(range(1, 8))
    assert [step.total for step in steps] == [6] * 6 + [7]  # block 3 comes as a surprise
    assert {step.name: step.reason for step in steps if step.reason} == {
        block(0).key.hex(): "checksum",
        block(1).key.hex(): "index",
        block(2).key.hex(): "missing",
        block(3).key.hex(): "index",
        response_name("t", "r2").hex(): "manifest",
    }


def test_an_empty_state_directory_is_scrubbed_in_no_steps(tmp_path):
    state = StateDir.open(tmp_path)
    assert list(scrub(state)) == []
    state.close()
    assert not (tmp_path / "kv").exists()


# finding what there is


def chain(*lengths: int) -> list[BlockWrite]:
    """Blocks behind one another; those of fewer than four tokens are tails of the same parent."""
    found, parent, first = [], ROOT, 0
    for length in lengths:
        tokens = tuple(range(first, first + length))
        key = chain_key(parent, tokens)
        content = memoryview(bytes(PAYLOAD_BYTES))
        found.append(BlockWrite(key, ROOT, parent, first // 4, tokens, content, 1.0))
        if length == 4:
            parent, first = key, first + 4
    return found


@pytest.mark.parametrize("kind", ["lmdb", "memory"])
def test_a_prompt_finds_its_whole_blocks_and_the_longest_tail(tmp_path, kind):
    writes = chain(4, 4, 1, 3)
    with opened(tmp_path) as store:
        if kind == "memory":
            store = MemoryStore(
                fingerprint=FINGERPRINT, payload_bytes=PAYLOAD_BYTES, block_tokens=4, limits=LIMITS
            )
        store.write(blocks=writes)

        def found(*tokens: int) -> list[tuple[int, int]]:
            entries = store.find_chain(ROOT, tokens)
            assert all(entry.root == ROOT for entry in entries)
            return [(entry.depth, len(entry.tokens)) for entry in entries]

        assert found(*range(20)) == [(0, 4), (1, 4), (2, 3)]
        assert found(*range(10)) == [(0, 4), (1, 4), (2, 1)]
        assert found(*range(8), 99) == [(0, 4), (1, 4)]
        assert found(*range(8)) == [(0, 4), (1, 4)]
        assert found(*range(7)) == [(0, 4)]
        assert found() == found(99) == []
        store.write(drops=[writes[0].key])
        assert found(*range(20)) == []  # what cannot be reached is not offered


def test_the_index_is_read_in_slices_past_records_of_other_models(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_store, "_SLICE", 3)
    with opened(tmp_path, fingerprint=b"g" * 32) as store:
        store.write(blocks=[block(number) for number in range(30)])
    with opened(tmp_path) as store:
        store.write(blocks=[block(number) for number in range(30, 50)])
        expected = sorted(block(number).key for number in range(30, 50))
        for limit in (1, 2, 3, 7, 20, 21):
            assert [entry.key for entry in whole_index(store, limit)] == expected
        assert len(store.index(None, 7)) == 7
        assert store.index(expected[-1], 7) == []
        assert [entry.key for entry in store.index(bytes(32), 100)] == expected


def test_a_forgotten_response_names_its_keys_and_those_of_its_parent(tmp_path):
    keys = [block(number).key for number in range(3)]
    parent = replace(manifest(1), keys=tuple(keys[:2]))
    child = replace(manifest(2), keys=tuple(keys), parent="r1")
    for parents, shared in (([parent], keys[:2]), ([], []), ([replace(parent, stored=False)], [])):
        with opened(tmp_path) as store:
            store.forget_response("t", "r1")
            store.write(manifests=[*parents, child])
            assert store.forget_response("t", "r2") == ForgottenResponse(tuple(keys), tuple(shared))
            assert store.forget_response("t", "r2") is None


def test_a_session_is_found_by_its_newest_response_and_forgotten_one_by_one(tmp_path):
    """More of them than one slice of the table, stored and not."""
    longest = replace(manifest(7), tokens=tuple(range(900)))
    others = [replace(manifest(n), session="other") for n in (101, 102)]
    with opened(tmp_path, limits=replace(LIMITS, manifests=100, manifest_bytes=1 << 20)) as store:
        for number in range(70):
            store.write(manifests=[replace(manifest(number), stored=number % 2 == 0)])
        store.write(manifests=[longest, *others])
        assert store.find_session("t", "s") == longest
        assert store.find_session("", "s") is None
        every = store.responses_of("t", "s")
        assert every[0] == "r7"
        assert sorted(every) == sorted(f"r{number}" for number in range(70))
        for response in every:
            assert store.forget_response("t", response) is not None
        assert store.responses_of("t", "s") == []
        assert store.find_session("t", "s") is None
        assert store.find_session("t", "other") == others[1]


def test_an_environment_in_another_format_is_put_aside(tmp_path, caplog):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        with store._env.begin(write=True) as txn:
            txn.drop(store._env.open_db(b"meta", txn=txn))
    with opened(tmp_path) as store:
        assert list(whole_index(store)) == []
    assert (tmp_path / "kv.other-format").is_dir()
    assert not (tmp_path / "kv.damaged").exists()
    assert "format" in caplog.text


# missing bytes


def filled(path) -> None:
    """Many small transactions, so that pages of every kind lie everywhere in the file."""
    with opened(path) as store:
        for number in range(0, 60, 4):
            store.write(
                blocks=[block(n) for n in range(number, number + 4)],
                manifests=[manifest(number)],
                drops=[block(n).key for n in range(max(0, number - 20), max(0, number - 16))],
            )


def test_a_truncated_file_never_stops_or_kills_the_start(tmp_path):
    """Reading past the end of the file is a SIGBUS: unguarded, this test would not fail but end the test run."""
    filled(tmp_path)
    data = tmp_path / "kv" / "data.mdb"
    whole = data.read_bytes()
    for part in range(8):
        data.write_bytes(whole[: len(whole) * part // 8 + part])
        data.chmod(0o600)
        with opened(tmp_path) as store:
            for entry in whole_index(store):
                assert read(store, asked(entry)) == payload(entry.tokens[0])
            store.write(blocks=[block(100)], manifests=[manifest(100)])
            assert read(store, block(100)) == payload(100)
    assert (tmp_path / "kv.damaged").is_dir()


def test_a_file_that_is_legally_short_is_kept(tmp_path):
    """Free pages at the end were never needed: a crash may leave the file without them."""
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        store.write(blocks=[block(n) for n in range(2, 30)])
        store.write(drops=[block(n).key for n in range(2, 30)])
        for _ in range(8):
            store.write(manifests=[manifest(1)])
    data = tmp_path / "kv" / "data.mdb"
    size = data.stat().st_size
    os.truncate(data, size - 4096)
    with opened(tmp_path) as store:
        assert read(store, block(1)) == payload(1)
        assert store.find_response("t", "r1") == manifest(1)
        store.write(blocks=[block(n) for n in range(2, 30)])
        assert all(read(store, block(n)) == payload(n) for n in range(2, 30))
    assert not (tmp_path / "kv.damaged").exists()


def test_a_store_whose_free_pages_are_lost_is_put_aside(tmp_path):
    """It reads well and would refuse every write, for ever: worse than starting empty."""
    filled(tmp_path)
    data = tmp_path / "kv" / "data.mdb"
    content = bytearray(data.read_bytes())
    # Two meta pages; the one with the larger transaction id counts. Its first table is that of the free pages.
    meta = max(0, 4096, key=lambda page: int.from_bytes(content[page + 144 : page + 152], "little"))
    root = int.from_bytes(content[meta + 80 : meta + 88], "little")
    content[root * 4096 : (root + 1) * 4096] = bytes(4096)
    data.write_bytes(content)
    with opened(tmp_path) as store:
        store.write(blocks=[block(100)])
        assert read(store, block(100)) == payload(100)
    assert (tmp_path / "kv.damaged").is_dir()


@pytest.mark.parametrize("what", ["garbage", "empty", "no tables", "engine 1.0"])
def test_what_is_no_environment_of_ours_is_put_aside(tmp_path, what, caplog):
    kv = tmp_path / "kv"
    kv.mkdir(mode=0o700)
    if what == "garbage":
        (kv / "data.mdb").write_bytes(random.Random(0).randbytes(50_000))
    if what == "empty":
        (kv / "data.mdb").write_bytes(b"")
    if what in ("no tables", "engine 1.0"):
        lmdb.open(str(kv), lib_version=int(what == "engine 1.0"), max_dbs=5, mode=0o700).close()
    for file in kv.iterdir():
        file.chmod(0o600)
    tmp_path.chmod(0o700)
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
    with opened(tmp_path) as store:
        assert read(store, block(1)) == payload(1)
    if what != "empty":  # an empty file is a new environment to lmdb, without our tables
        assert "damaged" in caplog.text
    assert (tmp_path / "kv.damaged").is_dir()


def test_a_crash_while_creating_leaves_no_trace(tmp_path):
    half = tmp_path / "kv.new"
    half.mkdir(mode=0o700)
    (half / "data.mdb").write_bytes(b"half")
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
    assert not half.exists()
    assert not (tmp_path / "kv.damaged").exists()


# no room


def test_a_full_map_refuses_the_write_and_keeps_the_rest(tmp_path):
    limits = StoreLimits(block_bytes=1 << 30)
    with opened(tmp_path, limits=limits, map_bytes=400 << 10) as store:
        written = []
        with pytest.raises(StoreError) as caught:
            for number in range(1000):
                store.write(blocks=[block(number)], manifests=[manifest(number)])
                written.append(number)
        assert caught.value.reason == "full"
        assert len(written) > 10
        assert {entry.tokens[0] for entry in whole_index(store)} == set(written)
        assert all(read(store, block(number)) == payload(number) for number in written)
        store.write(drops=[block(number).key for number in written[:10]])
        store.write(drops=[])  # what transaction n frees, n + 1 cannot use yet
        store.write(blocks=[block(2000)])
        assert read(store, block(2000)) == payload(2000)


def test_a_disk_that_takes_no_more_bytes_refuses_and_recovers(tmp_path):
    """A real failing write, by the file size limit. LMDB must leave the old state readable and take the next write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        size = (tmp_path / "kv" / "data.mdb").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9000, hard))
        try:
            with pytest.raises(StoreError) as caught:
                store.write(
                    blocks=[block(number) for number in range(2, 30)], manifests=[manifest(1)]
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.reason == "io"
        assert {entry.key for entry in whole_index(store)} == {block(1).key}
        assert store.find_response("t", "r1") is None
        store.write(blocks=[block(number) for number in range(2, 30)], manifests=[manifest(1)])
    with opened(tmp_path) as store:
        assert all(read(store, block(number)) == payload(number) for number in range(1, 30))


def test_the_file_stays_near_the_capacity_under_churn(tmp_path):
    limits = StoreLimits(block_bytes=32 * 8192, manifests=10)
    with opened(tmp_path, limits=limits) as store:
        for number in range(200):
            drops = [block(number - 28).key] if number >= 28 else []
            store.write(blocks=[block(number)], manifests=[manifest(number)], drops=drops)
    assert (tmp_path / "kv" / "data.mdb").stat().st_size < 1.3 * limits.block_bytes + 40 * 4096


def test_a_smaller_capacity_than_last_time_lets_the_store_shrink(tmp_path):
    with opened(tmp_path) as store:
        store.write(blocks=[block(n) for n in range(6)])
    with opened(tmp_path, limits=StoreLimits(block_bytes=3 * 8192)) as store:
        assert store.block_slots == 3
        assert len(list(whole_index(store))) == 6
        store.write(drops=[block(0).key], manifests=[manifest(1)])
        store.write(blocks=[block(7)], drops=[block(1).key])  # no larger than before
        with pytest.raises(StoreError) as caught:
            store.write(blocks=[block(8)])
        assert caught.value.reason == "capacity"
        store.write(drops=[block(n).key for n in range(2, 5)])
        store.write(blocks=[block(8)])
        assert store.statistics().block_bytes == 3 * 8192


def test_below_the_floor_of_free_space_no_block_is_taken_and_all_else_goes_on(tmp_path):
    limits = StoreLimits(block_bytes=1 << 20, min_free_bytes=1 << 30)
    with faulty_disk() as faults, opened(tmp_path, limits=limits) as store:
        store.write(blocks=[block(1)])
        for free in ((1 << 30) - 1, (1 << 30) + 8191):  # the block itself counts
            faults.free_bytes = free
            with pytest.raises(StoreError) as caught:
                store.write(blocks=[block(2)])
            assert caught.value.reason == "full"
        store.write(manifests=[manifest(1)], drops=[block(1).key])
        assert store.find_response("t", "r1") == manifest(1)
        faults.free_bytes = (1 << 30) + 8192
        store.write(blocks=[block(2)])
        assert [entry.key for entry in whole_index(store)] == [block(2).key]


def held(store) -> tuple[set[int], set[str]]:
    """Which blocks and which manifests there are; all of them whole."""
    blocks = {entry.tokens[0] for entry in whole_index(store)}
    assert all(read(store, block(number)) == payload(number) for number in blocks)
    responses = {f"r{number}" for number in range(5) if store.find_response("t", f"r{number}")}
    assert all(store.find_item("t", f"item{name[1:]}") for name in responses)
    return blocks, responses


def outcome(call) -> object:
    """What `call` returns, or the reason of its refusal. Nothing else may escape."""
    try:
        return call()
    except StoreError as error:
        return error.reason


@pytest.mark.parametrize(
    ("fault", "lasting"),
    [*((fault, False) for fault in Fault), (Fault.EIO, True), (Fault.ENOSPC, True)],
)
def test_whatever_call_fails_what_was_acknowledged_is_there_and_writing_goes_on(
    tmp_path, fault, lasting
):
    """The n-th I/O call fails, n = 1, 2, 3, until a run meets no fault; or all from the n-th on."""
    with faulty_disk() as faults, opened(tmp_path) as store:
        store.write(blocks=[block(0), block(3)], manifests=[manifest(0)])
        before, after = ({0, 3}, {"r0"}), ({1, 2, 3}, {"r1"})
        n = 0
        while n == 0 or faults.fired:
            n += 1
            faults.arm(n, fault, lasting=lasting)
            answers = [
                outcome(
                    lambda: store.write(
                        blocks=[block(1), block(2)],
                        manifests=[manifest(1)],
                        drops=[block(0).key],
                    )
                ),
                outcome(lambda: store.forget_response("t", "r0") and None),
                outcome(lambda: store.discard(block(99).key)),
                outcome(lambda: store.examine(None) and None),
                outcome(lambda: store.find_chain(ROOT, block(3).tokens) and None),
                outcome(lambda: store.check_readers() and None),
                outcome(lambda: read(store, block(3)) and None),
            ]
            faults.disarm()
            assert set(answers) <= {None, "io", "full"}
            another_way = not lasting and set(faults.fired) <= {"preadv", "posix_fadvise"}
            assert any(answers) == (bool(faults.fired) and not another_way)
            store.write()  # opens the environment again, if a write failed
            blocks, responses = held(store)
            written, forgotten = answers[0] is None, answers[1] is None
            assert blocks == (after if written else before)[0] or (
                fault is Fault.LATE and blocks == after[0]
            )
            assert ("r1" in responses) == (blocks == after[0])
            assert not (forgotten and "r0" in responses)
            assert recounted(store) == store.statistics()
            store.write(
                blocks=[block(0)],
                manifests=[manifest(0)],
                drops=[block(1).key, block(2).key],
            )
            store.forget_response("t", "r1")
            assert held(store) == before
            assert recounted(store) == store.statistics()
        assert n > 40
        made = {
            "begin",
            "commit",
            "get",
            "put",
            "delete",
            "cursor",
            "stat",
            "reader_check",
            "preadv",
        }
        assert made <= set(faults.calls)
    with opened(tmp_path) as store:
        assert held(store) == before
    assert not (tmp_path / "kv.damaged").exists()


@pytest.mark.parametrize(
    ("fault", "durability"),
    [
        (Fault.EIO, Durability.POWER),
        (Fault.LATE, Durability.POWER),
        (Fault.ENOSPC, Durability.PROCESS),
    ],
)
def test_whatever_call_fails_at_open_or_close_nothing_is_lost(tmp_path, fault, durability):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)], manifests=[manifest(1)])
    n = 0
    fired = ["nothing yet"]
    while fired:
        n += 1
        with faulty_disk() as faults:
            state = StateDir.open(tmp_path)
            faults.arm(n, fault)
            store = outcome(lambda state=state: open_store(state, durability))
            if not isinstance(store, str):
                assert outcome(lambda store=store: held(store)) in ("io", ({1}, {"r1"}))
                store.close()
            fired = list(faults.fired)
            faults.disarm()
            state.close()
        with opened(tmp_path, durability=durability) as store:
            assert held(store) == ({1}, {"r1"})
            store.write(blocks=[block(2)])
            store.write(drops=[block(2).key])
    assert n > 20
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["homeport.lock", "kv"]


def open_store(state, durability) -> LmdbStore:
    return LmdbStore.open(
        state,
        fingerprint=FINGERPRINT,
        payload_bytes=PAYLOAD_BYTES,
        block_tokens=4,
        limits=LIMITS,
        durability=durability,
    )


def test_a_store_whose_disk_stays_broken_refuses_until_it_heals_and_reads_meanwhile_do_not_hang(
    tmp_path,
):
    with faulty_disk() as faults, opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        faults.arm(1, Fault.EIO, lasting=True)
        for _ in range(3):
            assert outcome(lambda: store.write(blocks=[block(2)])) == "io"
            assert outcome(lambda: read(store, block(1))) == "io"
        faults.disarm()
        assert outcome(lambda: read(store, block(1))) == "io"  # closed, until the next write
        store.write(blocks=[block(2)])
        assert held(store)[0] == {1, 2}


def test_it_is_not_opened_again_under_a_reader(tmp_path, monkeypatch):
    """lmdb closed under a reader is a crash. And a reader that never leaves must not stop the writer for ever."""
    monkeypatch.setattr(lmdb_store, "_READERS_LEAVE_S", 0.05)
    with faulty_disk() as faults, opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        with store._reading() as snapshot:
            faults.arm(1, Fault.EIO, only="commit")
            assert outcome(lambda: store.write(blocks=[block(2)])) == "io"
            with pytest.raises(StoreError, match="a read does not end"):
                store.write(blocks=[block(2)])
            assert snapshot.get(block(1).key, store._blocks)[496:] == payload(1)
            assert store.check_readers().oldest_s > 0.05
        store.write(blocks=[block(2)])
        assert held(store)[0] == {1, 2}
        assert store.check_readers().oldest_s == 0


def test_readers_go_on_while_the_environment_is_opened_again_and_again(tmp_path):
    with faulty_disk() as faults, opened(tmp_path) as store:
        store.write(blocks=[block(1)])

        def read_on(_) -> None:
            while not done.wait(0.001):  # spinning, they would keep the writer from the interpreter
                assert outcome(lambda: read(store, block(1))) == payload(1)

        done = Event()
        with ThreadPoolExecutor(2) as pool:
            readers = pool.map(read_on, range(2))
            try:
                for number in range(8):
                    faults.arm(1, Fault.LATE if number % 2 else Fault.EIO, only="commit")
                    assert outcome(lambda: store.write(blocks=[block(2)])) == "io"
                    store.write(drops=[block(2).key])
            finally:
                done.set()
            list(readers)  # raises what they raised
        assert faults.calls["open environment"] == 1 + 1 + 8  # created, opened, and again


def test_an_environment_that_came_back_as_another_is_not_believed(tmp_path):
    """After a failed write it must stand at that write or the one before: anything else is a lie of the disk."""
    with faulty_disk() as faults, opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        for _ in range(2):  # transactions that the store knows nothing of
            raw(store, "index", block(1).key, flip(1))
        faults.arm(1, Fault.EIO)
        assert outcome(lambda: store.write(blocks=[block(2)])) == "io"
        with pytest.raises(StoreError, match="stands at transaction"):
            store.write(blocks=[block(2)])


def test_opening_makes_the_same_calls_whatever_is_stored(tmp_path):
    calls = []
    for count in (0, 1, 60):
        with opened(tmp_path / str(count)) as store:
            for number in range(count):
                store.write(blocks=[block(number)], manifests=[manifest(number % 20)])
        with faulty_disk() as faults, opened(tmp_path / str(count)) as store:
            assert store.statistics().blocks == count
            calls.append(faults.calls)
    assert calls[0] == calls[1] == calls[2]


def test_damaged_totals_are_counted_anew(tmp_path, caplog):
    with opened(tmp_path) as store:
        store.write(blocks=[block(n) for n in range(3)], manifests=[manifest(1), manifest(2)])
        store.write(drops=[block(1).key])
        expected = store.statistics()
        raw(store, "meta", b"totals", flip(99))
        store.write(drops=[block(7).key])  # while it is open
        assert store.statistics() == recounted(store) == expected
        raw(store, "meta", b"totals", flip(99))
    with opened(tmp_path) as store:
        assert store.statistics() == expected
        store.write(manifests=[manifest(3)])
        assert store.find_item("t", "item3") == manifest(3)
    assert "counting anew" in caplog.text


# reading and writing at once


def test_finished_readers_give_their_slots_back(tmp_path):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)], manifests=[manifest(1)])

        def some_reads(_) -> None:
            for _ in range(50):
                assert read(store, block(1)) == payload(1)
                assert refusal(store, block(2)) == "missing"
                assert store.find_item("t", "item1") == manifest(1)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(some_reads, range(8)))
        assert store._env.info()["num_readers"] <= 5  # the most ever taken at once
        assert "(no active readers)" in store._env.readers()


def test_durability_is_not_traded_for_speed(tmp_path):
    with opened(tmp_path) as store:
        flags = store._env.flags()
        assert flags["sync"]
        assert flags["metasync"]
        assert not flags["writemap"]
        assert flags["lock"]
        assert store._env.info()["map_size"] >= 4 << 30


# other users and other processes


def test_nobody_else_may_look_in(tmp_path):
    path = tmp_path / "state"
    with opened(path) as store:
        store.write(blocks=[block(1)])
        found = {
            entry.relative_to(tmp_path).as_posix(): stat.S_IMODE(entry.stat().st_mode)
            for entry in [path, *path.rglob("*")]
        }
    assert found == {
        "state": 0o700,
        "state/homeport.lock": 0o600,
        "state/kv": 0o700,
        "state/kv/data.mdb": 0o600,
        "state/kv/lock.mdb": 0o600,
        "state/kv/mark": 0o600,
    }


def test_a_directory_others_could_look_into_is_closed_to_them(tmp_path):
    with opened(tmp_path / "state"):
        pass
    (tmp_path / "state").chmod(0o755)
    (tmp_path / "state" / "kv" / "data.mdb").chmod(0o644)
    with opened(tmp_path / "state"):
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "state" / "kv" / "data.mdb").stat().st_mode) == 0o600


@pytest.mark.parametrize("where", ["", "kv", "kv/data.mdb", "homeport.lock"])
def test_a_symlink_is_refused(tmp_path, where):
    state = tmp_path / "state"
    with opened(state):
        pass
    inside = state / where if where else state
    inside.rename(tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateDirRefused, match="symbolic link"):
        with opened(state):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("where", ["", "kv", "kv/data.mdb"])
def test_what_belongs_to_another_user_is_refused(tmp_path, where):
    with opened(tmp_path / "state"):
        pass
    os.chown(tmp_path / "state" / where, 12345, 12345)
    with pytest.raises(StateDirRefused, match="12345"):
        with opened(tmp_path / "state"):
            pass


def test_a_directory_that_others_may_write_is_refused_and_left_alone(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(StateDirRefused, match="chmod 700"):
        StateDir.open(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o777


def test_a_second_instance_is_refused_and_told_who_is_there(tmp_path):
    with opened(tmp_path):
        with pytest.raises(StateDirRefused, match=f"pid {os.getpid()}"):
            StateDir.open(tmp_path)
    with opened(tmp_path):
        pass


# how it was left


def crashed(store) -> None:
    """End as a process does that is killed: nothing is said to anybody."""
    store._detach()


def test_a_clean_end_is_believed_and_any_other_is_walked(tmp_path, monkeypatch):
    walks = []
    really = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *given, **named: walks.append(1) or really(*given, **named)
    )
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
    with opened(tmp_path):
        pass
    assert not walks
    with opened(tmp_path) as store:
        crashed(store)
    with opened(tmp_path) as store:
        assert held(store)[0] == {1}
    assert len(walks) == 1
    os.utime(tmp_path / "kv" / "data.mdb")  # somebody wrote to it since, or copied it back
    with opened(tmp_path):
        pass
    (tmp_path / "kv" / "mark").unlink()
    with opened(tmp_path):
        pass
    (tmp_path / "kv" / "mark").write_bytes(b"\xff what is this")
    with opened(tmp_path) as store:
        assert held(store)[0] == {1}
    assert len(walks) == 4
    with opened(tmp_path):
        pass
    assert len(walks) == 4


@pytest.mark.parametrize("last", Durability)
@pytest.mark.parametrize("ends", ["clean", "crash"])
@pytest.mark.parametrize("boot", ["same", "other", ""])
def test_unsynced_writes_are_believed_only_under_the_boot_that_wrote_them(
    tmp_path, last, ends, boot, caplog
):
    with opened(tmp_path, durability=last, boot="same") as store:
        assert store._env.flags()["sync"] == (last is Durability.POWER)
        store.write(blocks=[block(1)], manifests=[manifest(1)])
        if ends == "crash":
            crashed(store)
    gone = last is Durability.PROCESS and ends == "crash" and boot != "same"
    with opened(tmp_path, boot=boot) as store:
        assert held(store) == ((set(), set()) if gone else ({1}, {"r1"}))
        store.write(blocks=[block(2)])
    assert ("written without syncs" in caplog.text) == gone
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["homeport.lock", "kv"]


def test_a_store_that_had_a_failure_is_walked_at_the_next_start(tmp_path):
    with faulty_disk() as faults:
        with opened(tmp_path) as store:
            store.write(blocks=[block(1)])
            faults.arm(1, Fault.EIO)
            assert outcome(lambda: store.write(blocks=[block(2)])) == "io"
            store.write(blocks=[block(2)])
        assert (tmp_path / "kv" / "mark").read_text().startswith("open power")
    with opened(tmp_path) as store:
        assert held(store)[0] == {1, 2}
    assert (tmp_path / "kv" / "mark").read_text().startswith("clean")


def pages_of(path) -> dict[int, str]:
    """{page: kind} of the pages that the walk must find sound: not those inside a value."""
    content = (path / "kv" / "data.mdb").read_bytes()
    kinds = {1: "branch", 2: "leaf"}
    return {
        page: kinds[flags]
        for page in range(2, len(content) // 4096)
        if (flags := int.from_bytes(content[page * 4096 + 10 : page * 4096 + 12], "little"))
        in kinds
        and int.from_bytes(content[page * 4096 : page * 4096 + 8], "little") == page
    }


def test_zeroed_pages_never_kill_the_start_after_a_crash(tmp_path):
    """lmdb aborts the process on some of them, so each is found by another, which does not map the file."""
    limits = StoreLimits(block_bytes=1 << 30)
    with opened(tmp_path / "whole", limits=limits) as store:
        for number in range(0, 150, 50):
            store.write(
                blocks=[block(n) for n in range(number, number + 50)], manifests=[manifest(number)]
            )
        crashed(store)
    whole = (tmp_path / "whole" / "kv" / "data.mdb").read_bytes()
    pages = pages_of(tmp_path / "whole")
    assert {"branch", "leaf"} == set(pages.values())
    put_aside = 0
    for page, kind in random.Random(3).sample(sorted(pages.items()), 25):
        path = tmp_path / f"{kind}{page}"
        shutil.copytree(tmp_path / "whole", path)
        data = path / "kv" / "data.mdb"
        data.write_bytes(whole[: page * 4096] + bytes(4096) + whole[(page + 1) * 4096 :])
        with opened(path, limits=limits) as store:
            for entry in whole_index(store):
                assert read(store, asked(entry)) == payload(entry.tokens[0])
            store.write(blocks=[block(500)])
        put_aside += (path / "kv.damaged").exists()
        shutil.rmtree(path)
    assert put_aside > 5  # the others were free pages


def test_the_walk_runs_beside_the_start_and_ends_with_it(tmp_path):
    with opened(tmp_path) as store:
        store.write(blocks=[block(1)])
        crashed(store)
    state = StateDir.open(tmp_path)
    with inspecting(state) as inspection:
        assert inspection.finding is Finding.UNCLEAN
        store = LmdbStore.open(
            state,
            fingerprint=FINGERPRINT,
            payload_bytes=PAYLOAD_BYTES,
            block_tokens=4,
            limits=LIMITS,
            inspection=inspection,
        )
        assert held(store)[0] == {1}
        crashed(store)
    with inspecting(state) as inspection:  # whatever fails meanwhile: no process is left behind
        walk = inspection._walk
    assert walk.returncode is not None
    state.close()


def test_a_walk_that_dies_or_never_ends_is_damage(tmp_path, monkeypatch):
    state = StateDir.open(tmp_path)
    (tmp_path / "kv").mkdir(mode=0o700)
    (tmp_path / "kv" / "data.mdb").write_bytes(b"")
    for code, words in (
        ("import os; os.abort()", "ended with -6"),
        ("import time; time.sleep(60)", "takes too long"),
    ):
        monkeypatch.setattr(inspection_module, "_WALK_S", 0.5 if "sleep" in code else 30.0)
        walk = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        with pytest.raises(Damaged, match=words):
            Inspection(tmp_path / "kv", Finding.UNCLEAN, walk).join()
        assert walk.returncode is not None
    state.close()


# sudden death


def test_kill_9_while_writing_loses_nothing_that_was_acknowledged(tmp_path):
    """Twelve lives in one directory. Acknowledged: there and whole. In flight: all or nothing. Dropped: gone."""
    rng = random.Random(5)
    following = 0
    for _ in range(12):
        command = [sys.executable, "-m", "tests.tiers.small_store", str(tmp_path), str(following)]
        with subprocess.Popen(command, cwd=TREE, stdout=subprocess.PIPE, text=True) as child:
            for _ in range(rng.randrange(1, 6)):
                acknowledged = int(child.stdout.readline())
            child.kill()
            acknowledged = max([acknowledged, *map(int, child.stdout.read().split())])
        with opened(tmp_path) as store:
            found = {entry.tokens[0] for entry in whole_index(store)}
            for number in found:
                assert read(store, block(number)) == payload(number)
            in_flight = acknowledged + 4
            newest = in_flight if in_flight in found else acknowledged
            assert found == set(range(max(0, newest - 36), newest + 4))
            assert store.find_response("t", f"r{newest}") == manifest(newest)
            assert store.find_response("t", f"r{newest + 4}") is None
            assert store.statistics().blocks == len(found)
        assert not (tmp_path / "kv.damaged").exists()
        following = newest + 4
    assert following >= 12 * 4


def test_asking_lmdb_for_its_numbers_makes_no_new_names(tmp_path):
    """A name that is interned for an answer alone is forgotten with it, and costs the interpreter's table a place."""
    held = {id(name) for name in lmdb_store.NUMBERS}
    with opened(tmp_path) as store, store._env.begin() as txn:
        for answer in (store._env.stat(), store._env.info(), txn.stat(store._blocks)):
            assert {id(name) for name in answer} <= held
