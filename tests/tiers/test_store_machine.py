"""`LmdbStore` and `MemoryStore` through the same rules: what one does, the other does, faults and crashes included.

Capacities are a few blocks and a few manifests, so that full is the normal case; keys are shared by two models,
which real keys never are, so that only the fingerprint in the record keeps them apart.
"""

import dataclasses
import hashlib
import itertools
import shutil
import tempfile
from operator import methodcaller
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import event, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.tiers.faulty_lmdb import Fault, faulty_disk
from tests.tiers.medium import evict, place_on_disk, replace_record
from tiers.block import StoreError, chain_key, root_key
from tiers.data_file import UNKNOWN
from tiers.lmdb_store import LmdbStore, _index_entry, scrub
from tiers.manifest import Manifest
from tiers.record import BLANK
from tiers.state_dir import StateDir
from tiers.store import (
    BlockWrite,
    Durability,
    IndexEntry,
    MemoryStore,
    StoreLimits,
    record_bytes_on_disk,
    whole_index,
)

MODELS = (b"a" * 32, b"b" * 32)
PAYLOAD_BYTES = 4000  # with its head more than a page: on pages of its own, as every real one is
SLOTS = 4
RECORD_BYTES = record_bytes_on_disk(496 + PAYLOAD_BYTES)
MIN_FREE = 1000
LIMITS = StoreLimits(
    block_bytes=SLOTS * RECORD_BYTES, manifests=3, manifest_bytes=1500, min_free_bytes=MIN_FREE
)
SHAPE = {"payload_bytes": PAYLOAD_BYTES, "block_tokens": 4, "limits": LIMITS}
POISON = 0xEE


def _chains() -> list:
    """Two chains of three full blocks and a tail."""
    found = []
    for chain in range(2):
        parent = root = root_key(MODELS[0], b"salt")
        for place in range(4):
            tokens = tuple(
                range(chain * 100 + place * 4, chain * 100 + place * 4 + (4 if place < 3 else 2))
            )
            key = chain_key(parent, tokens)
            found.append(IndexEntry(key, root, parent, place, tokens, 0.0))
            parent = key
    return found


BLOCKS = _chains()
RESPONSES = ("r0", "r1", "r2", "r3", "r4")
TENANTS = ("", "tenant")
ITEMS = ("i0", "i1", "i2")
DIGESTS = (b"d0", b"d1")
SESSIONS = ("s0", "s1")

some_blocks = st.lists(st.sampled_from(range(len(BLOCKS))), max_size=SLOTS + 1, unique=True)
some_manifests = st.lists(
    st.builds(
        Manifest,
        response_id=st.sampled_from(RESPONSES),
        tenant=st.sampled_from(TENANTS),
        session=st.sampled_from(SESSIONS),
        parent=st.none(),
        created_at=st.just(1.0),
        stored=st.sampled_from([True, True, False]),
        tokens=st.sampled_from([(1, 2, 3), (1, 2, 3, 4)]),
        sampled_from=st.just(2),
        item_ids=st.lists(st.sampled_from(ITEMS), max_size=2).map(tuple),
        content_digest=st.sampled_from((b"", *DIGESTS)),
        keys=st.just(()),
        body=st.sampled_from((b"small", *[b"x" * 300, b"x" * 500] * 4, b"x" * 1600)),
    ),
    max_size=3,
)
faults = st.tuples(st.integers(1, 40), st.sampled_from(Fault))


def payload(model: bytes, key: bytes, version: int) -> bytes:
    return hashlib.shake_256(model + key + bytes([version])).digest(PAYLOAD_BYTES)


def block_write(entry: IndexEntry, content: bytes = b"", now: float = 0.0) -> BlockWrite:
    """`entry` to be written, or to be read: then its content does not matter."""
    return BlockWrite(
        entry.key, entry.root, entry.parent, entry.depth, entry.tokens, memoryview(content), now
    )


def outcome(call):
    """What `call` returns, or why it refuses."""
    try:
        return call()
    except StoreError as error:
        return f"refused: {error.reason}"


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.state = StateDir.open(self.path / "state")
        self.disk = faulty_disk()
        self.faults = self.disk.__enter__()
        self.now = 0.0
        self.version = 0
        self.boot = 0

    @initialize(model=st.sampled_from(MODELS), durability=st.sampled_from(Durability))
    def create(self, model, durability) -> None:
        self.model = model
        self.limits = LIMITS
        self.durability = durability
        self.lmdb = self.open()
        self.memory = MemoryStore(fingerprint=model, **SHAPE)

    def teardown(self) -> None:
        if hasattr(self, "lmdb"):
            for way in self.lmdb.statistics().reads:
                event(f"read: {way}")
            self.lmdb.close()
            damaged = (self.path / "state" / "kv.damaged").exists()
            assert not damaged, "a sound environment was put aside"
        self.disk.__exit__(None, None, None)
        self.state.close()
        shutil.rmtree(self.path)

    def both(self, call):
        """The same call to both; the same answer or the same refusal from both."""
        expected, found = (outcome(lambda: call(self.memory)), outcome(lambda: call(self.lmdb)))
        assert found == expected
        return found

    def both_write(self, **parts):
        """As `both`; but below the floor of free space no block is taken, which a memory knows nothing of."""
        if self.faults.free_bytes is None or not parts["blocks"]:
            return self.both(lambda store: store.write(**parts))
        answer = outcome(lambda: self.lmdb.write(**parts))
        assert answer in ("refused: full", "refused: manifest")
        return answer

    def writes(self, numbers):
        self.now += 1
        self.version += 1
        return [
            block_write(
                BLOCKS[number], payload(self.model, BLOCKS[number].key, self.version % 5), self.now
            )
            for number in numbers
        ]

    @rule(blocks=some_blocks, manifests=some_manifests, drops=some_blocks)
    def write(self, blocks, manifests, drops) -> None:
        writes, drop_keys = self.writes(blocks), [BLOCKS[number].key for number in drops]
        answer = self.both_write(blocks=writes, manifests=manifests, drops=drop_keys)
        event(f"write: {answer}, foreign {self.memory.statistics().foreign_blocks > 0}")

    @rule(chain=st.integers(0, 1), manifests=some_manifests)
    def turn(self, chain, manifests) -> None:
        """A whole chain and its manifest, with room made ahead, as the cache does."""
        writes = self.writes(range(chain * 4, chain * 4 + 4))
        own = {entry.key for entry in whole_index(self.memory)} - {write.key for write in writes}
        answer = self.both_write(blocks=writes, manifests=manifests, drops=sorted(own))
        event(f"turn: {answer}")
        if not isinstance(answer, str):
            for write in writes:
                assert self.read(store=self.lmdb, write=write) == write.payload

    @rule(blocks=some_blocks, manifests=some_manifests, drops=some_blocks, fault=faults)
    def write_with_fault(self, blocks, manifests, drops, fault) -> None:
        """Committed means present, failed means absent: the reference is told only of what was acknowledged."""
        writes, drop_keys = self.writes(blocks), [BLOCKS[number].key for number in drops]

        def call(store):
            store.write(blocks=writes, manifests=manifests, drops=drop_keys)

        self.faults.free_bytes = None
        self.with_fault(fault, call)

    @rule(tenant=st.sampled_from(TENANTS), response=st.sampled_from(RESPONSES), fault=faults)
    def forget_with_fault(self, tenant, response, fault) -> None:
        self.with_fault(fault, lambda store: store.forget_response(tenant, response))

    def with_fault(self, fault, call) -> None:
        self.faults.arm(*fault)
        answer = outcome(lambda: call(self.lmdb))
        self.faults.disarm()
        fired = self.faults.fired
        event(f"fault in {fired[0] if fired else 'nothing'}: {answer}")
        if fired:
            assert answer in ("refused: full", "refused: io")
        else:
            assert answer == outcome(lambda: call(self.memory))
        if fired == ["commit"] and fault[1] is Fault.LATE:  # it landed, and nobody was told
            outcome(lambda: call(self.memory))
        if self.lmdb._env is None:  # not even opening it again went well
            self.heal()

    def heal(self) -> None:
        """A write opens a broken environment again. One of nothing also drops what is another model's beyond the capacity."""
        if self.lmdb._broken:
            self.both(lambda store: store.write())

    @rule(full=st.booleans())
    def fill_the_disk(self, full) -> None:
        self.faults.free_bytes = MIN_FREE if full else None

    @rule()
    def lose_the_page_cache(self) -> None:
        """What is read next comes from the disk."""
        evict(self.path / "state" / "kv" / "data.mdb")

    @rule(tenant=st.sampled_from(TENANTS), response=st.sampled_from(RESPONSES))
    def forget(self, tenant, response) -> None:
        event(f"forget: {self.both(lambda store: store.forget_response(tenant, response))}")

    @rule(number=st.sampled_from(range(len(BLOCKS))), wrong=st.sampled_from(range(len(BLOCKS))))
    def ask_for_another(self, number, wrong) -> None:
        key, parent = BLOCKS[number].key, BLOCKS[number].parent
        buffer = bytearray([POISON]) * PAYLOAD_BYTES
        answer = self.both(
            lambda store: store.read(key, parent, BLOCKS[wrong].tokens, memoryview(buffer))
        )
        assert wrong == number or isinstance(answer, str)
        assert answer is None or set(buffer) in ({POISON}, {BLANK[0]})

    @precondition(lambda self: self.memory._blocks)
    @rule(pick=st.integers(0, SLOTS - 1), bit=st.integers(0, 8 * (496 + PAYLOAD_BYTES) - 1))
    def damage(self, pick, bit) -> None:
        """A bit of a record flips on the medium: a foreign record keeps it unnoticed, our own refuses to be read."""
        self.heal()
        keys = sorted(self.memory._blocks)
        if not keys:  # all were another model's, and beyond the capacity
            return
        key = keys[pick % len(keys)]
        stored = self.memory._blocks[key]
        flipped = bytearray(stored.record)
        flipped[bit // 8] ^= 1 << bit % 8
        self.memory._blocks[key] = dataclasses.replace(stored, record=bytes(flipped))
        replace_record(self.lmdb._env, self.lmdb._blocks, key, bytes(flipped))

    @rule(
        model=st.sampled_from(MODELS),
        slots=st.sampled_from([SLOTS, SLOTS, SLOTS - 2]),
        durability=st.sampled_from(Durability),
        boots=st.integers(0, 1),
    )
    def reopen(self, model, slots, durability, boots) -> None:
        event("same model" if model == self.model else "another model")
        self.lmdb.close()
        self.boot += boots  # what was closed in order is there whatever happened since
        self.open_as(model, slots, durability)

    @rule(
        model=st.sampled_from(MODELS),
        durability=st.sampled_from(Durability),
        boots=st.integers(0, 1),
    )
    def crash(self, model, durability, boots) -> None:
        """Of the process, or of the machine: what was acknowledged is there, or was never promised to be."""
        written = self.lmdb._marked_open
        self.lmdb._detach()
        self.boot += boots
        if boots and self.durability is Durability.PROCESS and written:
            self.memory = MemoryStore(fingerprint=model, **SHAPE)
            event("crash: discarded")
        else:
            event("crash: kept")
        self.open_as(model, SLOTS, durability)

    def open_as(self, model, slots, durability) -> None:
        self.model = model
        self.durability = durability
        self.limits = dataclasses.replace(LIMITS, block_bytes=slots * RECORD_BYTES)
        self.lmdb = self.open()
        self.memory.reopen(fingerprint=model, limits=self.limits)

    def open(self) -> LmdbStore:
        shape = {**SHAPE, "limits": self.limits}
        how = {"durability": self.durability, "boot": str(self.boot)}
        return LmdbStore.open(self.state, fingerprint=self.model, **how, **shape)

    @precondition(lambda self: self.now)
    @rule()
    def scrubbed(self) -> None:
        """The offline scrub finds exactly the damage, and the online one the same."""
        looked_at, after = [], None
        while (found := self.both(lambda store, after=after: store.examine(after))) is not None:
            looked_at.append(found)
            after = found.key
        self.lmdb.close()
        bad = {step.name for step in scrub(self.state, str(self.boot)) if step.reason}
        self.lmdb = self.open()
        assert bad == {
            key.hex() for key, stored in self.memory._blocks.items() if self.damaged(stored)
        }
        assert bad == {found.key.hex() for found in looked_at if found.reason}
        assert {found.key for found in looked_at} == set(self.memory._blocks)
        event(f"scrub: {len(bad)} bad")

    @rule(number=st.sampled_from(range(len(BLOCKS))))
    def discard(self, number) -> None:
        self.both(lambda store: store.discard(BLOCKS[number].key))

    def damaged(self, stored) -> bool:
        versions = {payload(stored.fingerprint, stored.entry.key, version) for version in range(5)}
        good = MemoryStore(fingerprint=stored.fingerprint, **SHAPE)
        good._blocks[stored.entry.key] = stored
        return self.read(store=good, write=stored.entry) not in versions

    def read(self, *, store, write):
        buffer = bytearray([POISON]) * PAYLOAD_BYTES
        refusal = outcome(
            lambda: store.read(write.key, write.parent, write.tokens, memoryview(buffer))
        )
        if refusal is None:
            return bytes(buffer)
        assert set(buffer) in ({POISON}, {BLANK[0]})
        return refusal

    @invariant()
    def every_block_reads_alike_and_is_of_this_model(self) -> None:
        for entry in BLOCKS:
            key, asked = entry.key, block_write(entry)
            found = self.read(store=self.lmdb, write=asked)
            assert found == self.read(store=self.memory, write=asked)
            if not isinstance(found, str):
                assert found in {payload(self.model, key, version) for version in range(5)}

    @invariant()
    def a_place_is_where_lmdb_has_the_record(self) -> None:
        """Through commits, reuse, reopening and crashes. `read` would also work without, and nobody would notice."""
        env = self.lmdb._env
        for key in self.memory._blocks:
            with env.begin() as txn:
                entry = _index_entry(key, txn.get(key, db=self.lmdb._index))
            assert (entry.place, entry.record_bytes) == place_on_disk(env, self.lmdb._blocks, key)
            assert entry.place != UNKNOWN

    @invariant()
    def the_index_names_the_same_blocks(self) -> None:
        expected = self.memory.index(None, 100)
        for limit in (1, 2, 3, 100):
            assert list(whole_index(self.lmdb, limit)) == expected
        assert [entry.key for entry in expected] == sorted(entry.key for entry in expected)
        assert {dataclasses.replace(entry, last_used=0.0) for entry in expected} <= set(BLOCKS)

    @invariant()
    def a_chain_is_what_the_index_says_as_far_as_it_goes(self) -> None:
        there = {entry.key for entry in self.memory.index(None, 100)}
        for chain in (BLOCKS[:4], BLOCKS[4:]):
            tokens = tuple(token for entry in chain for token in entry.tokens)
            for asked in (tokens, (*tokens, 7, 7, 7), tokens[:-1], (*tokens[:12], 7), tokens[:9]):
                found = self.lmdb.find_chain(chain[0].root, asked)
                assert found == self.memory.find_chain(chain[0].root, asked)
                held = list(itertools.takewhile(lambda entry: entry.key in there, chain))
                fits = [e for e in held if e.tokens == asked[4 * e.depth :][: len(e.tokens)]]
                assert [entry.key for entry in found] == [entry.key for entry in fits]
            assert self.lmdb.find_chain(root_key(MODELS[0], b"other"), tokens) == []

    @invariant()
    def totals_agree_and_keep_to_the_limits(self) -> None:
        with self.lmdb._env.begin() as txn:
            counted = self.lmdb._statistics_of(txn, self.lmdb._recount(txn))
            found = self.lmdb._statistics_of(txn, self.lmdb._load_totals(txn))
        assert found == counted
        assert found == self.memory.statistics()
        assert self.lmdb._broken or found == self.lmdb.statistics()
        assert found.block_bytes <= LIMITS.block_bytes
        assert found.manifests <= LIMITS.manifests
        assert found.manifest_bytes <= LIMITS.manifest_bytes

    @invariant()
    def every_lookup_finds_the_same_manifest(self) -> None:
        for tenant in TENANTS:
            for response in RESPONSES:
                found = self.both(methodcaller("find_response", tenant, response))
                asked = (tenant, response, True)
                assert found is None or (found.tenant, found.response_id, found.stored) == asked
            for item in ITEMS:
                found = self.both(methodcaller("find_item", tenant, item))
                assert found is None or (found.tenant == tenant and item in found.item_ids)
            for digest in DIGESTS:
                found = self.both(methodcaller("find_content", tenant, digest))
                assert found is None or (found.tenant, found.content_digest) == (tenant, digest)
            for session in SESSIONS:
                newest = self.both(methodcaller("find_session", tenant, session))
                every = self.both(methodcaller("responses_of", tenant, session))
                if isinstance(newest, Manifest):
                    assert (newest.tenant, newest.session) == (tenant, session)
                    assert newest.response_id in every


TestStores = StoreMachine.TestCase
TestStores.settings = settings(max_examples=settings().max_examples // 10, stateful_step_count=20)
