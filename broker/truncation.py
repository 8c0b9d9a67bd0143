"""`truncation: "auto"`: the oldest turns go until the rest fits. Pure.

Laws
    System and developer messages stay, wherever they are; so does the last thing that the user asked.
    Whole turns go, from one question to the next; inside the last turn, whole rounds of calls and their results. A
    result never stays without its call.
    What goes depends on the history alone and moves in steps of a quarter of the limit: while a conversation grows
    inside a step its prompts begin alike, so its prefix is cached, which dropping turn by turn would break each time.
    What is left out is left out of the prompt only: the history keeps it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.units import joined, splits_a_call, units

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.units import Parts, Unit

_STEPS = 4  # guessed


@dataclass(frozen=True, slots=True)
class Truncated:
    parts: Parts
    dropped_items: int
    dropped_tokens: int


def truncate(
    parts: Parts, *, limit_tokens: int, length: Callable[[Parts], int]
) -> Truncated | None:
    """The parts without the oldest turns, in at most `limit_tokens`; None if even the last turn is too long.

    `length` gives the tokens of the prompt of some parts; it is asked for a logarithm of their number.
    """
    whole = units(parts)
    total = length(joined(whole))
    if total <= limit_tokens:
        return Truncated(parts, 0, 0)
    step = max(1, limit_tokens // _STEPS)
    steps = -(-(total - limit_tokens) // step)
    cuts = [at for at in range(len(whole)) if _may_begin(whole, at)]

    def size(at: int) -> int:
        return length(joined(_behind(whole, at)))

    for most in (total - steps * step, limit_tokens):
        found = bisect.bisect_left(cuts, -most, key=lambda at: -size(at))
        if found < len(cuts):
            kept = _behind(whole, cuts[found])
            dropped = sum(len(u.part.items) for u in whole) - sum(len(u.part.items) for u in kept)
            return Truncated(joined(kept), dropped, total - size(cuts[found]))
    return None


def _behind(whole: tuple[Unit, ...], at: int) -> tuple[Unit, ...]:
    """What stays if everything before `at` goes."""
    asked = _last_asked(whole)
    return tuple(
        unit for place, unit in enumerate(whole) if place >= at or unit.is_head or place == asked
    )


def _may_begin(whole: tuple[Unit, ...], at: int) -> bool:
    asked = _last_asked(whole)
    if splits_a_call(whole, at):
        return False
    if asked is not None and at > asked + 1:
        return whole[at].is_said
    return whole[at].is_asked


def _last_asked(whole: tuple[Unit, ...]) -> int | None:
    return max((place for place, unit in enumerate(whole) if unit.is_asked), default=None)
