"""`LmdbStore` against its medium: wrong bytes, missing bytes, no room, other users, other processes, sudden death."""

import os
import random
import resource
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest

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
from tiers import lmdb_store
from tiers.block import StoreError, chain_key
from tiers.lmdb_store import scrub
from tiers.state_dir import StateDir, StateDirRefused
from tiers.store import (
    BlockWrite,
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
    with store._env.begin(write=True) as txn:
        txn.put(key, change(txn.get(key, db=database)), db=database)


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
        bits += random.Random(0).sample(range(8 * (512 + PAYLOAD_BYTES)), 100)
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
        for size in (0, 1, 143, 144, 511, 512, 513, 512 + PAYLOAD_BYTES - 1):
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
