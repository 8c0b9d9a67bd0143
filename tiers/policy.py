"""Who goes first when a tier is full. Pure: classes, limits and an order; no tables and no clock.

The order: by session class, least recently used first inside a class, a tail before its head. Structure comes before
rank: a block is offered only after every child of it in the same tier, so a head that several sessions share is an
anchor for as long as one of them is there. What a running sequence holds, and what a copy in flight reads or writes,
is never offered, and neither is anything before it in its chain.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from tiers.block import Block


class SessionClass(enum.IntEnum):
    """What the session that last used a block is doing. Smaller is evicted sooner."""

    CLOSED = 0  # superseded, or its connection is gone
    HUMAN_WAIT = 1  # answered with text: the next turn waits for a person
    TOOL_WAIT = 2  # answered with a tool call: the next turn is seconds away
    BURST = 3  # an open socket in the middle of a loop
    PINNED = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """When a session's bytes move down by themselves. Seconds on the caller's clock; infinity is never."""

    host_after_s: float  # idle this long: device -> host
    disk_after_s: float  # idle this long: disk only, and the lease ends
    max_lag_s: float  # a block is written behind no later than this after it was computed


Rank = tuple[int, float, int]


def session_class(block: Block) -> SessionClass:
    """The best class among the leases that cover a block."""
    for of_lease in reversed(SessionClass):
        if block.leases[of_lease]:
            return max(of_lease, block.resting)
    return block.resting


def rank(block: Block) -> Rank:
    """Smaller is worth less."""
    return session_class(block), block.last_used, -block.depth


class Victims:
    """The evictable ones of one tier's blocks, the one worth least first.

    Looks at refs and busy when a block's turn comes; places may have changed since, and are the caller's to check.
    """

    def __init__(self, blocks: Collection[Block]) -> None:
        self._children = Counter(block.parent for block in blocks)  # {key: children still to come}
        self._parents = {block.key: block for block in blocks if block.key in self._children}
        self._heap = [
            (rank(block), block.key, block) for block in blocks if block.key not in self._children
        ]
        heapq.heapify(self._heap)

    def take(self, below: Rank | None = None) -> Block | None:
        """The next victim; None when no more is left, or only what is worth more than `below`."""
        while self._heap and (below is None or self._heap[0][0] <= below):
            _, _, block = heapq.heappop(self._heap)
            if block.refs or block.busy:
                continue
            self._children[block.parent] -= 1
            parent = self._parents.get(block.parent)
            if parent is not None and not self._children[block.parent]:
                heapq.heappush(self._heap, (rank(parent), parent.key, parent))
            return block
        return None
