"""Which blocks are where, who has how much, and who would go next. The slots' side of the tables.

Laws
    `places` and `arriving` of a block change here only, together with the slots' states.
    A block `stays` in a tier if it is there or on its way there, and not about to leave; `kids` counts, per tier, the
    children that stay. A block is offered as a victim of a tier if and only if it is there, nothing needs it (refs,
    busy), no child of it stays there, and, below the device, its last place is not what children elsewhere hang on.
    A tenant that has more than its share of a tier gives first, whatever its blocks are worth; pinned blocks do not
    leave the host.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tiers.block import Tier
from tiers.policy import SessionClass
from tiers.pool import Pool
from tiers.victims import VictimOrder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tiers.block import Block, BlockKey, Slot
    from tiers.index import Index
    from tiers.policy import Policy, Rank


class Residency:
    """Pools, residents and victim orders of all tiers."""

    def __init__(
        self, index: Index, slots: Mapping[Tier, int], policy: Policy, tenant_share: float
    ) -> None:
        self._index = index
        self._policy = policy
        self._tenant_share = tenant_share
        self.pools = {tier: Pool(slots.get(tier, 0)) for tier in Tier}
        self.residents: dict[Tier, dict[Slot, Block]] = {tier: {} for tier in Tier}
        self._orders = {tier: VictimOrder(self.rank) for tier in Tier}
        self._usage: dict[Tier, Counter[BlockKey]] = {tier: Counter() for tier in Tier}

    # -- slots -------------------------------------------------------------------------------------------------------

    def place(self, block: Block, tier: Tier, slot: Slot) -> None:
        """The slot, HELD by now, has the block's bytes."""
        block.places[tier] = slot
        self.residents[tier][slot] = block
        self._usage[tier][block.root] += 1
        self.recount(block)

    def displace(self, block: Block, tier: Tier) -> Slot:
        slot = block.places.pop(tier)
        del self.residents[tier][slot]
        self._usage[tier][block.root] -= 1
        if not self._usage[tier][block.root]:
            del self._usage[tier][block.root]
        self.recount(block)
        return slot

    def expect(self, block: Block, tier: Tier, slot: Slot) -> None:
        """The slot, ARRIVING by now, will have the block's bytes."""
        block.arriving[tier] = slot
        self.recount(block)

    def expect_no_more(self, block: Block, tier: Tier) -> None:
        if block.arriving.pop(tier, None) is not None:
            self.recount(block)

    # -- who may leave -----------------------------------------------------------------------------------------------

    def recount(self, block: Block) -> None:
        """Where a block stays has changed, or what may leave with it."""
        stays = 0
        for tier in (*block.places, *block.arriving):
            stays |= 1 << tier
        stays = stays & ~block.leaving | block.coming
        changed, block.stays = stays ^ block.stays, stays
        if changed and (parent := self._index.get(block.parent)) is not None:
            for tier in Tier:
                if changed >> tier & 1:
                    parent.kids[tier] += 1 if stays >> tier & 1 else -1
            self.weigh(parent)
        self.weigh(block)

    def weigh(self, block: Block) -> None:
        """Offer a block wherever it may leave, at what it is worth now, and withdraw it everywhere else."""
        offered = 0
        if not block.refs and not block.busy:
            for tier in block.places:
                if not block.kids[tier] and self._may_leave(block, tier):
                    offered |= 1 << tier
                    self._orders[tier].offer(block)
        if withdrawn := block.offered & ~offered:
            for tier in Tier:
                if withdrawn >> tier & 1:
                    self._orders[tier].withdraw(block)
        block.offered = offered

    def _may_leave(self, block: Block, tier: Tier) -> bool:
        """From the device a block may be forgotten with all that continues it; elsewhere that would be a loss."""
        return tier is Tier.DEVICE or len(block.places) > 1 or not self._index.has_children(block)

    def reweigh(self, blocks: Iterable[Block]) -> None:
        """What these are worth has changed."""
        for block in blocks:
            if block.offered:
                self.weigh(block)

    def announce(self, block: Block, tier: Tier) -> None:
        """The block is about to come to a tier: its parent must not go to make room for it."""
        block.coming = 1 << tier
        self.recount(block)

    def announce_end(self, block: Block) -> None:
        block.coming = 0
        self.recount(block)

    def set_aside(self, block: Block, tier: Tier) -> None:
        """Do not offer a block until it is weighed again."""
        self._orders[tier].withdraw(block)
        block.offered &= ~(1 << tier)

    def worst(self, tier: Tier, newcomer: Block | None = None) -> tuple[Block, str] | None:
        """Whom to evict, and why (capacity or quota); None if all that may leave is worth more than the newcomer."""
        order = self._orders[tier]
        heads = {root: order.first(root) for root in order.roots}
        if tier is Tier.HOST:
            heads = {root: head for root, head in heads.items() if not _is_pinned(head)}
        if not heads:
            return None
        greedy = max(heads, key=lambda root: (self._usage[tier][root], root))
        if self._usage[tier][greedy] > self._tenant_share * self.pools[tier].capacity:
            victim, cause = heads[greedy], "quota"
        else:
            victim = min(heads.values(), key=lambda head: (order.ranks[head], head.key))
            cause = "capacity"
        compared = newcomer is not None and (cause == "capacity" or newcomer.root == victim.root)
        if compared and newcomer is not None and self.rank(newcomer) < order.ranks[victim]:
            return None
        return victim, cause

    def rank(self, block: Block) -> Rank:
        """What a block is worth: a pin goes before any policy."""
        return _is_pinned(block), *self._policy.rank(block)

    # -- looking -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare the running counts and orders with a full scan."""
        blocks = self._index.blocks
        for tier, pool in self.pools.items():
            pool.check()
            here = [block for block in blocks if tier in block.places]
            assert {block.places[tier]: block for block in here} == self.residents[tier]
            assert len(here) == len(self.residents[tier])
            assert self._usage[tier] == Counter(block.root for block in here)
            self._orders[tier].check()
            assert self._orders[tier].ranks == scan(blocks, tier, self._index, self.rank)
        for block in blocks:
            children = self._index.children(block)
            for tier in Tier:
                assert block.kids[tier] == sum(child.stays >> tier & 1 for child in children)
                stays = tier in block.places | block.arriving and not block.leaving >> tier & 1
                assert (block.stays >> tier & 1) == stays
                assert (block.offered >> tier & 1) == (block in self._orders[tier].ranks)


def _is_pinned(block: Block) -> bool:
    return block.leases[SessionClass.PINNED] > 0


def scan(
    blocks: Iterable[Block], tier: Tier, index: Index, rank: Callable[[Block], Rank]
) -> dict[Block, Rank]:
    """The law, read off the tables: {block that may leave the tier: its rank}. For tests; costs a walk over all."""
    found = {}
    for block in blocks:
        children = index.children(block)
        staying = any(
            tier in child.places | child.arriving and not child.leaving >> tier & 1
            for child in children
        )
        last = len(block.places) == 1 and children and tier is not Tier.DEVICE
        if tier in block.places and not (block.refs or block.busy or staying or last):
            found[block] = rank(block)
    return found
