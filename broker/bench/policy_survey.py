"""What can be said of a trace without a cache, knowing all of it: how much is new, when what is used next, its size.

Pure. Belady's policy and the scale of every report come from here, once for a trace; replays only read it.

The footprint is the scale for capacities: the most that is, at any one time, in use or to be used again. A cache of
that size that knew the future would never compute anything twice, but for the slot that the tables need to copy a tail into;
one that does not know it needs more, because it also keeps what nobody comes back for.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.bench.policy_trace import Turn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.bench.policy_trace import Event

NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Survey:
    """Sizes of blocks and units are counts; a block is `block_units` units, and a chain's last one may be shorter."""

    block_units: int
    turns: int
    prompt_units: int
    fresh_units: int  # what a cache that forgets nothing computes: never seen before, or needed for the logits
    longest_blocks: int  # of one turn's chain, with its answer
    footprint_blocks: int  # see the module
    day_blocks: int  # everything there ever was, each chain's last block once
    # [event]: for a turn, of each block of its chain, in order: the event that uses it next, or NEVER
    next_uses: tuple[tuple[float, ...], ...]


def survey(events: Sequence[Event], block_units: int) -> Survey:
    """Two walks over the trace: one back, for what comes next, and one forward, for what was there before."""
    next_uses = _next_uses(events, block_units)
    seen: set[int] = set()
    prompt_units = fresh_units = longest = turns = footprint = 0
    living = [0] * (len(events) + 1)  # [event]: change of the number of blocks to be used again
    now_living = 0
    whole: set[int] = set()  # last units of whole blocks
    tails = 0
    for number, event in enumerate(events):
        now_living += living[number]
        if not isinstance(event, Turn):
            continue
        turns += 1
        known = bisect_left(event.prompt, x=True, key=lambda unit: unit not in seen)
        prompt_units += len(event.prompt)
        fresh_units += len(event.prompt) - min(known, len(event.prompt) - 1)
        seen.update(event.prompt[known:], event.output)
        ends = block_ends(event, block_units)
        longest = max(longest, len(ends))
        uses = next_uses[number]
        footprint = max(footprint, now_living + len(uses))
        for use in uses:
            if use is not NEVER:
                living[int(use)] -= 1
                now_living += 1
        has_tail = (len(event.prompt) + len(event.output)) % block_units > 0
        whole.update(ends[: len(ends) - has_tail])
        tails += has_tail and uses[-1] is NEVER
    return Survey(
        block_units=block_units,
        turns=turns,
        prompt_units=prompt_units,
        fresh_units=fresh_units,
        longest_blocks=longest,
        footprint_blocks=footprint,
        day_blocks=len(whole) + tails,
        next_uses=next_uses,
    )


def _next_uses(events: Sequence[Event], block_units: int) -> tuple[tuple[float, ...], ...]:
    """A block is known by its last unit, which stands for all before it too."""
    latest: dict[int, float] = {}  # {unit: the event that uses it next}
    found: list[tuple[float, ...]] = []
    for number in reversed(range(len(events))):
        event = events[number]
        if isinstance(event, Turn):
            found.append(tuple(latest.get(unit, NEVER) for unit in block_ends(event, block_units)))
            latest.update(dict.fromkeys(event.prompt, float(number)))
        else:
            found.append(())
    return tuple(reversed(found))


def block_ends(turn: Turn, block_units: int) -> tuple[int, ...]:
    """The last unit of each block of a turn's chain, its answer included."""
    chain = turn.prompt + turn.output
    ends = chain[block_units - 1 :: block_units]
    return ends if len(chain) % block_units == 0 else (*ends, chain[-1])
