"""A second look at what the tiers gave back: some restored blocks are computed again and compared. Off by default.

Checksums prove that the bytes are those that were stored; a canary shows that they are the KV of these tokens. It is
computed alone, behind the same blocks, into a slot that nobody else sees, while nothing else is to be done.

The two are not equal to the bit: kernels add in another order for another batch. `TOLERANCE` bounds the distance of the
worst token's KV, over all layers, relative to its length. Measured 2026-11 on the tiny float32 models of the tests: at
most 1e-6 for the same tokens, 0.9 and more for another token in the block, 0.3 for another one far before it.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiers.block import BlockKey, TokenIds

log = logging.getLogger(__name__)

TOLERANCE = (
    0.1  # generous: lossy storage and half precision stay below it, other tokens' KV does not
)
MOST_WAITING = 64  # canaries; an engine that is never idle checks the newest, and skips others


@dataclass(frozen=True, slots=True)
class Canary:
    """The last whole block of `tokens`: its KV on the device is to be computed again."""

    root: BlockKey
    tokens: TokenIds
    key: BlockKey


class Canaries:
    """Which restored blocks wait to be checked. `chance` gives numbers in [0, 1)."""

    def __init__(self, fraction: float, chance: Callable[[], float]) -> None:
        self._fraction = fraction
        self._chance = chance
        self._waiting: deque[Canary] = deque(maxlen=MOST_WAITING)
        self._checked = 0
        self._mismatched = 0
        self._skipped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def chosen(self) -> bool:
        """Whether to check a block that was just restored."""
        return self._fraction > 0 and self._chance() < self._fraction

    def add(self, canary: Canary) -> None:
        self._skipped += len(self._waiting) == MOST_WAITING
        self._waiting.append(canary)

    def take(self) -> Canary:
        return self._waiting.popleft()

    def skip(self) -> None:
        """Its blocks are not on the device any more, or there is no slot to spare."""
        self._skipped += 1

    def judge(self, canary: Canary, distance: float) -> bool:
        """Whether the block may stay."""
        self._checked += 1
        if distance <= TOLERANCE:
            return True
        self._mismatched += 1
        log.error(
            "block %s is not what its tokens give: the worst token is off by %.3g of its length",
            canary.key.hex()[:16],
            distance,
        )
        return False

    def report(self) -> dict[str, int]:
        return {
            "checked": self._checked,
            "mismatched": self._mismatched,
            "skipped": self._skipped,
        }
