"""What was brought to the device because a request for it is likely soon. A guess: it gives way to any request.

A prefetch holds its blocks, on their way and landed, until the sequence that it was made for holds them itself, or
`KEEP_S` have passed: what was brought up is not evicted before it is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiers.cache import Hold
    from tiers.index import Match

KEEP_S = 5.0  # from the first sight of an id to its request's arrival takes milliseconds; generous


@dataclass(frozen=True, slots=True, eq=False)
class _Prefetch:
    hold: Hold
    until: float
    reads_disk: bool


class Prefetches:
    """All of them, oldest first; one for each last block."""

    def __init__(self) -> None:
        self._all: list[_Prefetch] = []

    @property
    def reading(self) -> int:
        """How many restore from disk, or did."""
        return sum(each.reads_disk for each in self._all)

    @property
    def holds(self) -> list[Hold]:
        return [each.hold for each in self._all]

    def next_end(self) -> float:
        return min((each.until for each in self._all), default=math.inf)

    def covers(self, match: Match) -> bool:
        """Whether all whole blocks of a match are held here already."""
        return any(match.blocks[-1] in each.hold.blocks for each in self._all)

    def add(self, hold: Hold, now: float, *, reads_disk: bool) -> None:
        self._all.append(_Prefetch(hold, now + KEEP_S, reads_disk))

    def take_served(self, hold: Hold) -> list[Hold]:
        """Those whose blocks a sequence's hold has taken over."""
        blocks = set(hold.blocks)
        return self._take([each for each in self._all if blocks.issuperset(each.hold.blocks)])

    def take_ended(self, now: float) -> list[Hold]:
        return self._take([each for each in self._all if each.until <= now])

    def take_all(self) -> list[Hold]:
        return self._take(list(self._all))

    def _take(self, taken: list[_Prefetch]) -> list[Hold]:
        self._all = [each for each in self._all if each not in taken]
        return [each.hold for each in taken]
