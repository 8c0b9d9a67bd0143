"""The blocks of one tier that may leave it now, kept in order while the tables change.

Which blocks may leave is the tables' to say (`offer`, `withdraw`); what a block is worth is the policy's. Here they are
only kept, one heap for each tenant: an entry whose rank is not its block's latest is stale, and skipped when it comes
up. A change costs O(log n) and so does the next victim, whatever is resident; choosing among tenants costs a look at
each tenant's first.

Laws
    A block is here at most once with a valid rank: the one it was last offered with.
    Stale entries are at most as many as valid ones, and a few.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tiers.block import Block, BlockKey
    from tiers.policy import Rank

_FEW = 64  # stale entries that are not worth a clean-up


class VictimOrder:
    """Blocks by worth, within each root."""

    def __init__(self, rank: Callable[[Block], Rank]) -> None:
        self._rank = rank
        self._ranks: dict[Block, Rank] = {}
        # {root: heap of (rank, key, tie-break, block)}
        self._heaps: dict[BlockKey, list[tuple[Rank, BlockKey, int, Block]]] = {}
        self._sizes: Counter[BlockKey] = Counter()  # {root: valid entries}
        self._ties = itertools.count()

    @property
    def ranks(self) -> Mapping[Block, Rank]:
        return self._ranks

    @property
    def roots(self) -> Iterable[BlockKey]:
        """Those that have something to give."""
        return self._sizes.keys()

    def offer(self, block: Block) -> None:
        """The block may leave, and is worth what it is worth now."""
        rank = self._rank(block)
        before = self._ranks.get(block)
        if before == rank:
            return
        self._ranks[block] = rank
        heap = self._heaps.setdefault(block.root, [])
        heapq.heappush(heap, (rank, block.key, next(self._ties), block))
        if before is None:
            self._sizes[block.root] += 1
        elif len(heap) > 2 * self._sizes[block.root] + _FEW:
            self._clean(block.root)

    def withdraw(self, block: Block) -> None:
        if self._ranks.pop(block, None) is None:
            return
        self._sizes[block.root] -= 1
        if not self._sizes[block.root]:
            del self._sizes[block.root], self._heaps[block.root]
        elif len(self._heaps[block.root]) > 2 * self._sizes[block.root] + _FEW:
            self._clean(block.root)

    def first(self, root: BlockKey) -> Block:
        """What is worth least of a root that is among `roots`."""
        heap = self._heaps[root]
        while self._ranks.get(heap[0][3]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][3]

    def _clean(self, root: BlockKey) -> None:
        valid = {
            entry[3]: entry for entry in self._heaps[root] if self._ranks.get(entry[3]) == entry[0]
        }
        self._heaps[root] = list(valid.values())
        heapq.heapify(self._heaps[root])

    def check(self) -> None:
        """Assert that every valid entry can be found, and nothing much else is kept."""
        for root, heap in self._heaps.items():
            valid = {entry[3] for entry in heap if self._ranks.get(entry[3]) == entry[0]}
            assert len(valid) == self._sizes[root] > 0
            assert len(heap) <= 2 * self._sizes[root] + _FEW + 1
        assert sum(self._sizes.values()) == len(self._ranks)
