"""A model whose KV is a hash chain, and a disk whose answers come when the test says: wrong bytes show as wrong ids.

Row i of a sequence's KV holds s(i) = mix(s(i-1), token i). The next id is a function of *all* rows, read from the arena
through the block table, so one wrong, missing or stale row anywhere changes the output. `oracle` computes the same from
the tokens alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.sampler import Choice
from tiers.block import Drop, Fetch, Spill, StoreError
from tiers.disk import (
    ChainFound,
    DiskState,
    Failed,
    Forgotten,
    IndexSlice,
    Landed,
    Persisted,
    WriterStatistics,
)
from tiers.store import BlockWrite, MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import Batch
    from tiers.arena import Arena
    from tiers.manifest import Manifest

VOCAB = 251
PRIME = 16_777_213  # below 2**24: exact in float32


def mix(state: int, token: int) -> int:
    return (state * 31 + token * 7919 + 12345) % PRIME


def next_id(rows: list[int]) -> int:
    return sum((i + 1) * row for i, row in enumerate(rows)) % PRIME % VOCAB


def states(tokens: list[int] | tuple[int, ...]) -> list[int]:
    rows: list[int] = []
    state = 1
    for token in tokens:
        state = mix(state, token)
        rows.append(state)
    return rows


def oracle(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What a greedy run of `count` tokens answers."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_id(states(tokens)))
    return tuple(tokens[len(prompt) :])


class FakeRunner:
    """Geometry of the arena: one layer, one head, head_dim 1. `batches` records what ran."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.block_tokens = arena.geometry.block_tokens
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> torch.Tensor:
        self.batches.append(batch)
        wanted = []
        for segment in batch.segments:
            past = segment.context - segment.count
            for offset in range(segment.count):
                position = past + offset
                assert batch.positions[segment.start + offset] == position
                state = 1 if position == 0 else self._row(segment.table, position - 1)
                token = batch.tokens[segment.start + offset]
                slot = segment.table[position // self.block_tokens]
                self.arena.blocks[slot, 0, :, 0, position % self.block_tokens, 0] = mix(
                    state, token
                )
            for context in range(segment.context - segment.logits + 1, segment.context + 1):
                rows = [self._row(segment.table, i) for i in range(context)]
                logits = torch.zeros(VOCAB)
                logits[next_id(rows)] = 1.0
                wanted.append(logits)
        return torch.stack(wanted) if wanted else torch.empty(0, VOCAB)

    def _row(self, table, position: int) -> int:
        slot = table[position // self.block_tokens]
        pair = self.arena.blocks[slot, 0, :, 0, position % self.block_tokens, 0]
        assert pair[0] == pair[1]
        return int(pair[0])


class FakeSampler:
    def sample(self, logits: torch.Tensor, requests) -> list[Choice]:
        assert len(requests) == logits.shape[0]
        return [Choice(token) for token in logits.argmax(-1).tolist()]


def _written(spill: Spill, payload: memoryview) -> BlockWrite:
    return BlockWrite(spill.key, spill.root, spill.parent, spill.depth, spill.tokens, payload, 0.0)


class FakeDisk:
    """Writer and reader at once, over a MemoryStore. Nothing is answered until `settle`, in the order it says."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.post: Callable[[object], None] = lambda reply: None
        self.pending: list[Callable[[], object]] = []
        self.fail_fetches = 0
        self.full = False
        self.refuse = False
        self.refuses_blocks = False
        self.bad_fetches: set[int] = set()  # indices into `fetched`
        self.fetched: list[bytes] = []  # keys, in the order of the fetches
        self.stalled: list[Callable[[], object]] | None = None  # fetches that are not answered
        self.slices = 0  # of the index, that were asked for
        self.index_held = False

    def hold_index(self) -> None:
        """The index is never read."""
        self.index_held = True

    def stall(self, which: Callable[[bytes], bool] = lambda key: True) -> None:
        """From now on some fetches are not answered, those that wait included."""
        self.stalled = []
        self.stalls = which
        waiting, self.pending = self.pending, []
        for answer in waiting:
            fetch = getattr(answer, "fetch", None)
            stays = fetch is not None and which(fetch.key)
            (self.stalled if stays else self.pending).append(answer)

    def resume(self) -> None:
        """Answer the late ones as well."""
        self.pending += self.stalled or []
        self.stalled = None

    def offer_blocks(self, items, manifest: Manifest | None, ticket: int | None, *, ready) -> bool:
        if self.refuse:
            return False
        ready()
        for spill, payload in items:
            self.pending.append(lambda spill=spill, payload=payload: self._write(spill, payload))
        if manifest is not None:
            self.persist(manifest, ticket)
        return True

    def statistics(self) -> WriterStatistics:
        state = DiskState.DEGRADED if self.full or self.refuses_blocks else DiskState.OK
        reason = "full" if state is DiskState.DEGRADED else None
        return WriterStatistics(0, 0, 0, 0, state, reason, 0.0, {}, 0.0, 0.0, 0.0, 0, 0.0, 0)

    def persist(self, manifest: Manifest, ticket: int | None) -> None:
        def answer() -> object:
            self.store.write(manifests=(manifest,))
            return Persisted(ticket)

        self.pending.append(answer)

    def drop(self, action: Drop) -> None:
        def answer() -> object:
            self.store.write(drops=(action.key,))
            return Landed(action)

        self.pending.append(answer)

    def reads(self) -> dict[str, int]:
        return {}

    def fetch(self, action: Fetch, into: memoryview) -> None:
        at = len(self.fetched)
        self.fetched.append(action.key)

        def answer() -> object:
            return (
                Failed(action, "checksum") if at in self.bad_fetches else self._read(action, into)
            )

        answer.fetch = action
        stays = self.stalled is not None and self.stalls(action.key)
        (self.stalled if stays else self.pending).append(answer)

    def read_index(self, after, limit: int) -> None:
        self.slices += 1

        def answer() -> object:
            entries = self.store.index(after, limit)
            last = entries[-1].key if len(entries) == limit else None
            return IndexSlice(tuple(entries), last)

        if not self.index_held:
            self.pending.append(answer)

    def find_chain(self, ticket: int, root, tokens) -> None:
        self.pending.append(lambda: ChainFound(ticket, tuple(self.store.find_chain(root, tokens))))

    def forget_response(self, tenant: str, response_id: str, ticket: int) -> None:
        def answer() -> object:
            found = self.store.forget_response(tenant, response_id)
            if found is None:
                return Forgotten(ticket, existed=False)
            return Forgotten(ticket, True, found.keys, found.shared_keys)

        self.pending.append(answer)

    def settle(self, index: int = 0) -> None:
        """Answer one pending action."""
        self.post(self.pending.pop(index % len(self.pending))())

    def _write(self, spill: Spill, payload: memoryview) -> object:
        if self.full:
            return Failed(spill, "full")
        self.store.write(blocks=(_written(spill, payload),))
        return Landed(spill)

    def _read(self, fetch: Fetch, into: memoryview) -> object:
        if self.fail_fetches:
            self.fail_fetches -= 1
            return Failed(fetch, "checksum")
        try:
            self.store.read(fetch.key, fetch.parent, fetch.tokens, into)
        except StoreError as error:
            return Failed(fetch, error.reason)
        return Landed(fetch)
