"""Where a prompt stopped being the one before, and which part of the request did it. Pure.

A prefix cache is worth what the client keeps of its prefix. An agent that puts the time into its instructions, or
sorts its tools anew, computes everything again and never learns why: this says so.

Laws
    A prompt that begins with the tokens before it, or that they begin with, does not diverge.
    Parts are named as the client wrote them. `instructions` and `tools` are blamed when they changed, whatever else did:
    they come first in every prompt.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.session import Part

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.recall import Recalled
    from broker.wire.items import Item
    from tiers.block import TokenIds

    Parts = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Divergence:
    """`at` is the first token that differs; `part` the request's field at fault: `tools`, `input[3]`, ..."""

    at: int
    part: str


def diverged_at(before: TokenIds, now: TokenIds) -> int | None:
    """The first position where both have a token and they differ."""
    both = min(len(before), len(now))
    if before[:both] == now[:both]:
        return None
    # Halving, because comparing slices costs a hundredth of comparing tokens one by one here.
    same, differs = 0, both
    while differs - same > 1:
        middle = (same + differs) // 2
        if before[same:middle] == now[same:middle]:
            same = middle
        else:
            differs = middle
    return same


def item_at(
    position: int, said: Recalled, history: tuple[Part, ...], length: Callable[[Parts], int]
) -> str:
    """The item of the client's `input` that holds a prompt's token.

    `length` gives the tokens of a prompt of some parts only; it is asked for a logarithm of their number.
    """
    cuts: list[tuple[int, Parts]] = []  # (item, the parts before it)
    before = history
    for part, start in zip(said.parts, said.starts, strict=True):
        inside = 1 if part.sampled is not None else len(part.items)
        cuts += [(start + n, _with(before, part.items[:n])) for n in range(inside)]
        before = (*before, part)
    found = bisect.bisect_right(cuts, position, key=lambda cut: length(cut[1]))
    return f"input[{cuts[found - 1][0]}]" if found else "input"


def _with(parts: Parts, items: tuple[Item, ...]) -> Parts:
    return (*parts, Part(items)) if items else parts
