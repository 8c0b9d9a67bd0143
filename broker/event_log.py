"""What a background response has said so far, for readers who come late or come back. Pure: no clock, no waiting.

Laws
    `after(n)` is every kept frame with a number above n, in order: numbers count up by one.
    What was dropped is dropped from the front, and a reader who needs it is told so, never handed a gap.
"""

from __future__ import annotations

from collections import deque
from itertools import islice


class EventLog:
    """Frames as bytes, each with its event's sequence number."""

    __slots__ = ("_first", "_frames", "bytes")

    def __init__(self) -> None:
        self.bytes = 0
        self._first = 0  # number of the oldest kept frame
        self._frames: deque[bytes] = deque()

    @property
    def next(self) -> int:
        """The number of the frame that comes next."""
        return self._first + len(self._frames)

    def append(self, frame: bytes) -> None:
        self._frames.append(frame)
        self.bytes += len(frame)

    def holds_after(self, number: int) -> bool:
        """Whether nothing behind `number` was dropped."""
        return number + 1 >= self._first

    def after(self, number: int) -> list[bytes]:
        assert self.holds_after(number), "those frames are gone"
        return list(islice(self._frames, number + 1 - self._first, None))

    def drop_oldest(self) -> int:
        """Make room; returns the bytes that became free."""
        frame = self._frames.popleft()
        self._first += 1
        self.bytes -= len(frame)
        return len(frame)
