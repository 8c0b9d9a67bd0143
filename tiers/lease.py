"""What finished sequences leave behind for their sessions, and when to look at it again.

A lease keeps no refs: its blocks may be evicted. It raises their class while it lives, and says how far down they have
been told to go. What the broker asked for (`asked`) decays with idleness; a client's TTL and a pin raise it for a time. While a sequence continues it, and holds
what it shares with it, the rest is worth least: a compaction leaves a whole chain behind.

Laws
    A lease keeps no block alive: those at its end that are known no more are let go of now and then (`TieredCache.tick`),
    and with the last of them the lease ends.
    `block.leases` counts, per class, the leases that cover a block; they change here only.
    Every lease with a finite `due` is found by `pop_due` once that time has come, and exactly once for each schedule.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiers.block import Tier
from tiers.policy import SessionClass

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from tiers.block import Block, BlockKey

_STALE = 64  # so many replaced schedules, and as many as there are leases, are not worth a clearance (guessed)


@dataclass(eq=False, slots=True)
class Lease:
    """One finished sequence's chain, tail included. Compared by identity."""

    id: int
    root: BlockKey
    session: str
    blocks: tuple[Block, ...]  # without those at its end that are known no more
    idle_since: float
    tail: BlockKey | None  # what the chain ended in; None: it was empty
    keep_until: float = 0.0  # a client's TTL
    asked: SessionClass = SessionClass.BURST
    first: bool = False  # its session's first turn: nobody has come back yet
    successors: int = 0  # running sequences that continue it
    session_class: SessionClass = SessionClass.BURST  # in effect now
    target: Tier = Tier.DEVICE  # the tier that it has been told to move down to so far
    due: float = math.inf  # when to look at it next


class Leases:
    """All of them, by id. An id that is not known belongs to a lease that has ended."""

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}
        self._due: list[
            tuple[float, int]
        ] = []  # heap of (when, id); entries of an older schedule are stale
        self._pinned: set[Lease] = set()

    @property
    def all(self) -> Collection[Lease]:
        return self._leases.values()

    def get(self, lease_id: int | None) -> Lease | None:
        return None if lease_id is None else self._leases.get(lease_id)

    def add(self, lease: Lease) -> None:
        assert lease.id not in self._leases
        self._leases[lease.id] = lease
        self._cover(lease)

    def reclass(self, lease: Lease, to: SessionClass) -> None:
        self._uncover(lease)
        lease.session_class = to
        self._cover(lease)

    def _cover(self, lease: Lease) -> None:
        for block in lease.blocks:
            block.leases[lease.session_class] += 1
        if lease.session_class is SessionClass.PINNED:
            self._pinned.add(lease)

    def _uncover(self, lease: Lease) -> None:
        for block in lease.blocks:
            block.leases[lease.session_class] -= 1
        self._pinned.discard(lease)

    def pinned(self) -> set[Block]:
        """What leases of class PINNED cover and is still somewhere. Costs a walk over those leases."""
        return {block for lease in self._pinned for block in lease.blocks if block.places}

    def end(self, lease: Lease, resting: SessionClass) -> None:
        """From now on the blocks that no other lease covers are of class `resting`."""
        del self._leases[lease.id]
        self._uncover(lease)
        for block in lease.blocks:
            if not any(block.leases):
                block.resting = resting

    def let_go(self, is_known: Callable[[Block], bool]) -> list[Lease]:
        """Drop the blocks at chains' ends that are known no more; the leases that have none left. Walks over all."""
        empty = []
        for lease in self.all:
            length = len(lease.blocks)
            while length and not is_known(lease.blocks[length - 1]):
                length -= 1
            if length < len(lease.blocks):
                lease.blocks = lease.blocks[:length]
            if not length:
                empty.append(lease)
        return empty

    def schedule(self, lease: Lease, due: float) -> None:
        lease.due = due
        if due < math.inf:
            heapq.heappush(self._due, (due, lease.id))
        if len(self._due) > 2 * len(self._leases) + _STALE:
            self._due = [(one.due, one.id) for one in self.all if one.due < math.inf]
            heapq.heapify(self._due)

    def next_due(self) -> float:
        while self._due and self._is_stale(*self._due[0]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else math.inf

    def pop_due(self, now: float) -> Lease | None:
        if self.next_due() > now:
            return None
        lease = self._leases[heapq.heappop(self._due)[1]]
        lease.due = math.inf
        return lease

    def _is_stale(self, due: float, lease_id: int) -> bool:
        return lease_id not in self._leases or self._leases[lease_id].due != due

    def check(self, blocks: Iterable[Block]) -> None:
        covered = Counter(
            (block, lease.session_class) for lease in self.all for block in lease.blocks
        )
        assert self._pinned == {x for x in self.all if x.session_class is SessionClass.PINNED}
        for block in blocks:
            assert block.leases == [covered[block, of] for of in SessionClass]
        scheduled = set(self._due)
        assert all(
            lease.due == math.inf or (lease.due, lease.id) in scheduled for lease in self.all
        )
