"""Learning what the disk holds from before the start: in slices, while the engine serves.

The service is ready before anything is read. One slice at a time is asked for, and adopted by the tables in one turn of
the loop: as fast as the disk reads when nothing runs, and between two steps when something does. A prompt that comes
before the end has its own chain looked up first, so that it finds everything although most is not known yet.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiers.block import BlockKey

# Entries of one slice. Reading and adopting one takes some 50 us (measured 2026-11 on two busy cores), so a slice is some
# milliseconds between two steps, and 100,000 records are read in about as many seconds as an idle engine has turns.
WHILE_RUNNING = 200
WHILE_IDLE = 1000
RETRY_S = 5.0  # how soon a disk that could not read its index is asked again; guessed


class Adoption:
    """Which slice is next. `complete` once all was read; a store without records is complete at once."""

    def __init__(self, records: int) -> None:
        self.complete = records == 0
        self._after: BlockKey | None = None
        self._asked = False
        self._retry_at = -math.inf

    def due(self) -> float:
        """When a slice can be asked for; infinity while one is under way, or there is none."""
        return math.inf if self.complete or self._asked else self._retry_at

    def ask(self) -> BlockKey | None:
        """Behind which key to read on."""
        assert not self.complete
        assert not self._asked
        self._asked = True
        return self._after

    def read(self, last: BlockKey | None) -> None:
        """A slice has been read up to `last`; None: that was all."""
        self._asked = False
        self._after = last
        self.complete = last is None

    def failed(self, now: float) -> None:
        self._asked = False
        self._retry_at = now + RETRY_S
