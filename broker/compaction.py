"""A long history to a short window: the instructions, the newest questions word for word, and a summary. Pure.

What is compacted here is text that this model reads, so the summary is the model's own: it is asked for one, at the end
of the very prompt that is to be replaced, whose KV is cached. It is as good as the model is. The window is a new base:
its KV is computed once, and everything after continues it.

Laws
    System and developer messages stay. What is unanswered stays, with the calls that it answers.
    Questions stay from the newest backwards, while they fit in their budget; answers, calls and results do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.session import Part
from broker.units import joined, splits_a_call, units
from broker.wire.items import Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.units import Parts
    from broker.wire.items import Item

REQUEST = (
    "Summarise our conversation so far for yourself: everything above will be removed, and only your summary and the "
    "user's messages will be left. Say what was asked for, what was done and found out (names, paths, numbers, "
    "decisions), what failed, and what is still to be done. Do not call tools. Write the summary only."
)
HEADING = "Summary of the conversation before this point:\n"
SHARE = 4  # a quarter of what is compacted may be questions, and as much the summary (guessed)
MIN_SUMMARY_TOKENS, MAX_SUMMARY_TOKENS = 64, 1024  # guessed


@dataclass(frozen=True, slots=True)
class Plan:
    covered: Parts  # what the summary is of
    kept: tuple[Item, ...]  # of the covered: word for word
    rest: Parts  # what comes behind the summary


def plan(parts: Parts, *, budget_tokens: int, count: Callable[[str], int]) -> Plan | None:
    """How to compact a prompt that waits for an answer; None if there is nothing to compact."""
    whole = units(parts)
    said = [place for place, unit in enumerate(whole) if unit.is_said]
    at = said[-1] + 1 if said else 0
    while at > 0 and splits_a_call(whole, at):
        at -= 1
    covered = joined(whole[:at])
    if all(unit.is_head for unit in whole[:at]):
        return None
    return Plan(covered, kept(covered, budget_tokens, count), joined(whole[at:]))


def kept(parts: Parts, budget_tokens: int, count: Callable[[str], int]) -> tuple[Item, ...]:
    """The items that stay as they are."""
    stay: set[int] = set()
    whole = units(parts)
    for place in range(len(whole) - 1, -1, -1):
        [item, *more] = whole[place].part.items or (None,)
        if more or not isinstance(item, Message) or item.role != "user":
            continue
        budget_tokens -= count(item.text)
        if budget_tokens < 0:
            break
        stay.add(place)
    return tuple(
        item
        for place, unit in enumerate(whole)
        if unit.is_head or place in stay
        for item in unit.part.items
    )


def summary_tokens(covered_tokens: int, budget_tokens: int) -> int:
    """How long a summary may be: never about as long as what it is of."""
    most = min(budget_tokens, MAX_SUMMARY_TOKENS, covered_tokens // SHARE)
    return max(most, MIN_SUMMARY_TOKENS)


def is_bare(parts: Parts) -> bool:
    """Whether nothing is left to summarise, in front of the request to do so."""
    return all(unit.is_head for unit in units(parts)[:-1])


def asking(covered: Parts) -> Parts:
    """The covered parts and the request for their summary."""
    return (*covered, Part((Message(None, "user", REQUEST),)))
