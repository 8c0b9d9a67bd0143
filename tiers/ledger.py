"""Why blocks that were known are known no more: so that every token that is computed again has a reason.

new                       never seen, or so long ago that it is forgotten even here
logits                    known, but its logits choose the next token: a prompt's last one
changed                   the session's turn before had other tokens here
evicted_<tier>_<cause>    capacity, quota or superseded: the tier that it left last, and by what;
                          expired: by any of these, after the protection that its client had asked for
deleted                   by its client
verify_failed, io_failed  its bytes were refused, or could not be read
slow, loss                they were there; restoring them took too long, or would have
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from tiers.block import Tier

if TYPE_CHECKING:
    from tiers.block import BlockKey

FRESH = ("new", "logits", "changed")  # what no cache could have had
REASONS = (
    *FRESH,
    *(
        f"evicted_{tier.name.lower()}_{cause}"
        for tier in Tier
        for cause in ("capacity", "quota", "superseded", "expired")
    ),
    "deleted",
    "verify_failed",
    "io_failed",
    "slow",
    "loss",
)
# why a block leaves a tier; it may stay in another
EVICTION_CAUSES = ("capacity", "quota", "demoted", "superseded", "deleted", "rotten")
LEDGER_KEYS = 200_000  # about 30 MB: twice the records of a disk of 140 GB at 1.4 MB a block


class Ledger:
    """{key: reason} of the latest losses, bounded."""

    def __init__(self, capacity: int = LEDGER_KEYS) -> None:
        self._capacity = capacity
        self._reasons: OrderedDict[BlockKey, str] = OrderedDict()

    def note(self, key: BlockKey, reason: str) -> None:
        """A block has left its last place."""
        self._reasons[key] = reason
        self._reasons.move_to_end(key)
        if len(self._reasons) > self._capacity:
            self._reasons.popitem(last=False)

    def clear(self, key: BlockKey) -> None:
        """The block is known again."""
        self._reasons.pop(key, None)

    def why(self, key: BlockKey) -> str | None:
        return self._reasons.get(key)
