"""Samples of two sides, and what they say about one another. Pure.

Laws
    A ratio is of medians. Beside it stand the least and the most of the rounds' own ratios, because the two sides of a
    round were measured within a minute of one another and saw the same machine.
    A gain is how many times as good the first side is, whichever way the unit goes; a share is its value over the
    other's.
    A turn that ended early is scaled to the length that was asked for by its own decode rate, and counted.
"""

from __future__ import annotations

import enum
import statistics
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Unit(enum.Enum):
    SECONDS = "s"
    MILLISECONDS = "ms"
    RATE = "tok/s"
    MEMORY = "MiB"

    @property
    def more_is_better(self) -> bool:
        return self is Unit.RATE


class Ratio(enum.Enum):
    GAIN = "times as good"
    SHARE = "ratio"


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of one side in one round. Token counts as that side told them."""

    row: str
    side: str
    round: int
    value: float
    unit: Unit = Unit.SECONDS
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    scaled: bool = False


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        known = sorted(values)
        return cls(statistics.median(known), known[0], known[-1])

    def __str__(self) -> str:
        if self.least == self.most:
            return number(self.median)
        return f"{number(self.median)} ({number(self.least)}-{number(self.most)})"


@dataclass(frozen=True, slots=True)
class Compared:
    """One row: both sides' values, and their ratio. A side that was not measured, and so the ratio, is None."""

    row: str
    unit: Unit
    one: Spread | None
    other: Spread | None
    ratio: Spread | None
    tokens: tuple[
        str, str, str
    ]  # prompt, cached, output of the median samples; "one/other" where they differ
    scaled: int


def compare(
    samples: Sequence[Sample], one: str, other: str, ratio: Ratio = Ratio.GAIN
) -> list[Compared]:
    """Rows in the order in which they were first sampled."""
    rows: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.side in (one, other):
            rows[sample.row].append(sample)
    return [_compared(row, of_row, one, other, ratio) for row, of_row in rows.items()]


def _compared(row: str, samples: list[Sample], one: str, other: str, ratio: Ratio) -> Compared:
    unit = samples[0].unit
    mine = [sample for sample in samples if sample.side == one]
    theirs = [sample for sample in samples if sample.side == other]
    return Compared(
        row=row,
        unit=unit,
        one=_spread(mine),
        other=_spread(theirs),
        ratio=_ratio(mine, theirs, unit, ratio),
        tokens=_tokens(mine, theirs),
        scaled=sum(sample.scaled for sample in samples),
    )


def _spread(samples: list[Sample]) -> Spread | None:
    return Spread.of(sample.value for sample in samples) if samples else None


def _ratio(mine: list[Sample], theirs: list[Sample], unit: Unit, ratio: Ratio) -> Spread | None:
    if not mine or not theirs:
        return None
    medians = _over(_median(mine), _median(theirs), unit, ratio)
    both = {sample.round for sample in mine} & {sample.round for sample in theirs}
    of_rounds = [
        _over(
            _median([sample for sample in mine if sample.round == each]),
            _median([sample for sample in theirs if sample.round == each]),
            unit,
            ratio,
        )
        for each in both
    ]
    return Spread(medians, min(of_rounds, default=medians), max(of_rounds, default=medians))


def _over(mine: float, theirs: float, unit: Unit, ratio: Ratio) -> float:
    if ratio is Ratio.SHARE or unit.more_is_better:
        return mine / theirs
    return theirs / mine


def _median(samples: list[Sample]) -> float:
    return statistics.median(sample.value for sample in samples)


def _tokens(mine: list[Sample], theirs: list[Sample]) -> tuple[str, str, str]:
    told = [
        [_typical([getattr(sample, kind) for sample in side]) for side in (mine, theirs) if side]
        for kind in ("prompt_tokens", "cached_tokens", "output_tokens")
    ]
    prompt, cached, output = ("/".join(dict.fromkeys(each)) for each in told)
    return prompt, cached, output


def _typical(counts: list[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return str(statistics.median_low(known)) if known else "-"


def lines(
    compared: Sequence[Compared], one: str, other: str, ratio: Ratio = Ratio.GAIN
) -> list[tuple[str, ...]]:
    """The table's cells, its head first."""
    head = ("", "unit", one, other, ratio.value, "prompt", "cached", "output")
    return [
        head,
        *(
            (
                each.row,
                each.unit.value,
                *(
                    "-" if cell is None else str(cell)
                    for cell in (each.one, each.other, each.ratio)
                ),
                *each.tokens,
            )
            for each in compared
        ),
    ]


def number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value == 0:
        return "0"
    digits = 2 - _magnitude(abs(value))
    return f"{value:.{max(0, digits)}f}"


def _magnitude(value: float) -> int:
    return int(f"{value:.2e}".partition("e")[2])


def whole_turn_s(ttft_s: float, total_s: float, said: int, wanted: int) -> tuple[float, bool]:
    """A turn's seconds for as many tokens as were wanted, and whether that had to be scaled.

    An answer of one token has no decode rate to scale by, and stays as it is."""
    if said >= wanted or said <= 1:
        return total_s, False
    return ttft_s + (total_s - ttft_s) * (wanted - 1) / (said - 1), True


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def gaps_inside(arrivals: Sequence[float], begin: float, end: float) -> list[float]:
    """The gaps of one stream that begin and end in a time."""
    return [late - early for early, late in pairwise(arrivals) if begin <= early and late <= end]


def gaps_touching(arrivals: Sequence[float], begin: float, end: float) -> list[float]:
    """The gaps of one stream of which any part is in a time."""
    return [late - early for early, late in pairwise(arrivals) if early < end and late > begin]
