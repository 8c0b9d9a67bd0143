"""Fetches on their way to the disk readers: first come, first served, and not more at once than the readers can use.

What is not handed over yet can be withdrawn, and needs no staging memory. A fetch that is handed over is answered,
however long that takes: its slot is the disk's until then.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from tiers.block import BlockKey, Fetch


class Reads:
    """`read` hands one fetch to the readers; at most `most` are there at once."""

    def __init__(self, read: Callable[[Fetch], None], most: int) -> None:
        assert most > 0
        self._read = read
        self._most = most
        self._waiting: deque[Fetch] = deque()
        self._reading = 0

    @property
    def reading(self) -> int:
        return self._reading

    @property
    def waiting(self) -> int:
        """Not handed over yet."""
        return len(self._waiting)

    @property
    def queued(self) -> int:
        """Blocks that a fetch which comes now has to wait for."""
        return self._reading + len(self._waiting)

    def add(self, fetch: Fetch) -> None:
        self._waiting.append(fetch)
        self._hand_over()

    def answered(self) -> None:
        """One of those handed over is done, or has failed."""
        self._reading -= 1
        self._hand_over()

    def withdraw_all_but(self, wanted: Container[BlockKey]) -> list[Fetch]:
        """Take back what was not handed over and nobody wants any more."""
        unwanted = [fetch for fetch in self._waiting if fetch.key not in wanted]
        self._waiting = deque(fetch for fetch in self._waiting if fetch.key in wanted)
        return unwanted

    def _hand_over(self) -> None:
        while self._waiting and self._reading < self._most:
            self._reading += 1
            self._read(self._waiting.popleft())
