"""`LmdbStore` and `MemoryStore` through the same rules: what one does, the other does, faults and reopening included.

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
import lmdb
import pytest
from hypothesis import event, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.tiers.faulty_lmdb import ERRORS, Countdown, FaultyEnv
from tiers.block import StoreError, chain_key, root_key
from tiers.lmdb_store import LmdbStore, scrub
from tiers.manifest import Manifest
from tiers.state_dir import StateDir
from tiers.store import (
    BlockWrite,
    IndexEntry,
    MemoryStore,
    StoreLimits,
    record_bytes_on_disk,
    whole_index,
)

MODELS = (b"a" * 32, b"b" * 32)
PAYLOAD_BYTES = 700
SLOTS = 4
RECORD_BYTES = record_bytes_on_disk(512 + PAYLOAD_BYTES)
LIMITS = StoreLimits(block_bytes=SLOTS * RECORD_BYTES, manifests=3, manifest_bytes=1500)
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

some_blocks = st.lists(st.sampled_from(range(len(BLOCKS))), max_size=SLOTS + 1, unique=True)
some_manifests = st.lists(
    st.builds(
        Manifest,
        response_id=st.sampled_from(RESPONSES),
        tenant=st.sampled_from(TENANTS),
        session=st.just("s"),
        parent=st.none(),
        created_at=st.just(1.0),
        stored=st.sampled_from([True, True, False]),
        tokens=st.just((1, 2, 3)),
        sampled_from=st.just(2),
        item_ids=st.lists(st.sampled_from(ITEMS), max_size=2).map(tuple),
        content_digest=st.sampled_from((b"", *DIGESTS)),
        keys=st.just(()),
        body=st.sampled_from((b"small", *[b"x" * 300, b"x" * 500] * 4, b"x" * 1600)),
    ),
    max_size=3,
)
faults = st.builds(Countdown, st.integers(1, 12), st.sampled_from(ERRORS))


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
        self.now = 0.0
        self.version = 0

    @initialize(model=st.sampled_from(MODELS))
    def create(self, model) -> None:
        self.model = model
        self.limits = LIMITS
        self.lmdb = self.open()
        self.memory = MemoryStore(fingerprint=model, **SHAPE)

    def teardown(self) -> None:
        if hasattr(self, "lmdb"):
            self.lmdb.close()
        self.state.close()
        shutil.rmtree(self.path)

    def both(self, call):
        """The same call to both; the same answer or the same refusal from both."""
        expected, found = (outcome(lambda: call(self.memory)), outcome(lambda: call(self.lmdb)))
        assert found == expected
        return found

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
        answer = self.both(
            lambda store: store.write(blocks=writes, manifests=manifests, drops=drop_keys)
        )
        event(f"write: {answer}, foreign {self.memory.statistics().foreign_blocks > 0}")

    @rule(chain=st.integers(0, 1), manifests=some_manifests)
    def turn(self, chain, manifests) -> None:
        """A whole chain and its manifest, with room made ahead, as the cache does."""
        writes = self.writes(range(chain * 4, chain * 4 + 4))
        own = {entry.key for entry in whole_index(self.memory)} - {write.key for write in writes}
        answer = self.both(
            lambda store: store.write(blocks=writes, manifests=manifests, drops=sorted(own))
        )
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

        self.with_fault(fault, call)

    @rule(tenant=st.sampled_from(TENANTS), response=st.sampled_from(RESPONSES), fault=faults)
    def forget_with_fault(self, tenant, response, fault) -> None:
        self.with_fault(fault, lambda store: store.forget_response(tenant, response))

    def with_fault(self, fault, call) -> None:
        healthy = self.lmdb._env
        self.lmdb._env = FaultyEnv(healthy, fault)
        answer = outcome(lambda: call(self.lmdb))
        self.lmdb._env = healthy
        event(f"fault {fault.fired}: {answer}")
        if fault.fired:
            assert answer in ("refused: full", "refused: io")
        else:
            assert answer == outcome(lambda: call(self.memory))

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
        assert answer is None or buffer == bytes([POISON]) * PAYLOAD_BYTES

    @precondition(lambda self: self.memory._blocks)
    @rule(pick=st.integers(0, SLOTS - 1), bit=st.integers(0, 8 * (512 + PAYLOAD_BYTES) - 1))
    def damage(self, pick, bit) -> None:
        """A bit of a record flips on the medium: a foreign record keeps it unnoticed, our own refuses to be read."""
        keys = sorted(self.memory._blocks)
        key = keys[pick % len(keys)]
        stored = self.memory._blocks[key]
        flipped = bytearray(stored.record)
        flipped[bit // 8] ^= 1 << bit % 8
        self.memory._blocks[key] = dataclasses.replace(stored, record=bytes(flipped))
        with self.lmdb._env.begin(write=True) as txn:
            txn.put(key, bytes(flipped), db=self.lmdb._blocks)

    @rule(model=st.sampled_from(MODELS), slots=st.sampled_from([SLOTS, SLOTS, SLOTS - 2]))
    def reopen(self, model, slots) -> None:
        event("same model" if model == self.model else "another model")
        self.lmdb.close()
        self.model = model
        self.limits = dataclasses.replace(LIMITS, block_bytes=slots * RECORD_BYTES)
        self.lmdb = self.open()
        self.memory.reopen(fingerprint=model, limits=self.limits)

    def open(self) -> LmdbStore:
        shape = {**SHAPE, "limits": self.limits}
        return LmdbStore.open(self.state, fingerprint=self.model, **shape)

    @precondition(lambda self: self.now)
    @rule()
    def scrubbed(self) -> None:
        """The offline scrub finds exactly the damage."""
        self.lmdb.close()
        bad = {step.name for step in scrub(self.state) if step.reason}
        self.lmdb = self.open()
        assert bad == {
            key.hex() for key, stored in self.memory._blocks.items() if self.damaged(stored)
        }
        event(f"scrub: {len(bad)} bad")

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
        assert buffer == bytes([POISON]) * PAYLOAD_BYTES
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
        found = self.lmdb.statistics()
        assert found == self.memory.statistics()
        assert found == self.lmdb._take_stock().statistics()
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


TestStores = StoreMachine.TestCase
TestStores.settings = settings(max_examples=settings().max_examples // 10, stateful_step_count=20)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_a_write_that_fails_at_any_call_leaves_nothing_and_the_next_one_works(tmp_path, error):
    """The n-th I/O call fails, n = 1, 2, 3, until a run meets no fault."""
    state = StateDir.open(tmp_path)
    store = LmdbStore.open(state, fingerprint=MODELS[0], **SHAPE)
    healthy = store._env
    old = Manifest("r0", "", "s", None, 1.0, True, (1,), 0, ("i0",), b"d0", (), b"old")
    new = dataclasses.replace(old, body=b"new")
    key, dropped = BLOCKS[0].key, BLOCKS[4].key
    first = block_write(BLOCKS[4], bytes(PAYLOAD_BYTES), 1.0)
    second = block_write(BLOCKS[0], b"\1" * PAYLOAD_BYTES, 2.0)
    store.write(blocks=[first], manifests=[old])
    before = (set(whole_index(store)), store.find_response("", "r0"), store.find_item("", "i0"))
    reason = "full" if error in (lmdb.MapFullError, lmdb.DiskError) else "io"
    calls = 0
    fault = None
    while fault is None or fault.fired:
        calls += 1
        fault = Countdown(calls, error)
        store._env = FaultyEnv(healthy, fault)
        answer = outcome(lambda: store.write(blocks=[second], manifests=[new], drops=[dropped]))
        store._env = healthy
        assert answer == (f"refused: {reason}" if fault.fired else None)
        if fault.fired:
            after = (
                set(whole_index(store)),
                store.find_response("", "r0"),
                store.find_item("", "i0"),
            )
            assert after == before
    assert calls > 10
    assert {entry.key for entry in whole_index(store)} == {key}
    assert store.find_item("", "i0") == new
    store.close()
    state.close()
