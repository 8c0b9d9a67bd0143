"""The blocks of one tier that may leave it now, kept in order while the tables change. The only file that knows
sortedcontainers.

Which blocks may leave is the tables' to say (`offer`, `withdraw`); what a block is worth is the policy's. Here they are
only kept, in one sorted list for each tenant: a change costs O(log n) and so does the next victim, whatever is
resident. Choosing among tenants costs a look at each tenant's first. (A heap with stale entries, the usual way, is as
good on average, but skipping the stale ones cost half a second at once among 100,000 blocks.)

Law: a block is here at most once, with the rank that it was last offered with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sortedcontainers import SortedList

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tiers.block import Block, BlockKey
    from tiers.policy import Rank


class VictimOrder:
    """Blocks by worth, within each root."""

    def __init__(self, rank: Callable[[Block], Rank]) -> None:
        self._rank = rank
        self._ranks: dict[Block, Rank] = {}
        self._sorted: dict[BlockKey, Any] = {}  # {root: SortedList of (rank, key)}, never empty
        self._by_key: dict[BlockKey, Block] = {}

    @property
    def ranks(self) -> Mapping[Block, Rank]:
        return self._ranks

    @property
    def roots(self) -> Iterable[BlockKey]:
        """Those that have something to give."""
        return self._sorted.keys()

    def offer(self, block: Block) -> None:
        """The block may leave, and is worth what it is worth now."""
        rank = self._rank(block)
        if self._ranks.get(block) == rank:
            return
        self.withdraw(block)
        self._ranks[block] = rank
        self._by_key[block.key] = block
        self._sorted.setdefault(block.root, SortedList()).add((rank, block.key))

    def withdraw(self, block: Block) -> None:
        rank = self._ranks.pop(block, None)
        if rank is None:
            return
        of_root = self._sorted[block.root]
        of_root.remove((rank, block.key))
        del self._by_key[block.key]
        if not of_root:
            del self._sorted[block.root]

    def first(self, root: BlockKey) -> Block:
        """What is worth least of a root that is among `roots`."""
        return self._by_key[self._sorted[root][0][1]]

    def check(self) -> None:
        entries = sorted((rank, block.key) for block, rank in self._ranks.items())
        assert sorted(entry for of_root in self._sorted.values() for entry in of_root) == entries
        assert all(self._sorted.values())
        for root, of_root in self._sorted.items():
            assert list(of_root) == sorted(of_root)
            assert all(self._by_key[key].root == root for _, key in of_root)
