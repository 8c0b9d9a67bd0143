"""How often a number was how large, in fixed buckets. Pure."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

# Seconds. A turn may take minutes, a token milliseconds, and a turn of the event loop less than that.
TURN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # fmt: skip
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)  # fmt: skip
LOOP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class HistogramReport:
    """`counts` has one place more than `bounds`: for what is above all of them."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        return sum(self.counts)


class Histogram:
    """Bounds ascend, and a number that equals one is within it."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Takes about a microsecond: this may be called for every token."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def report(self) -> HistogramReport:
        return HistogramReport(self._bounds, tuple(self._counts), self._sum)
