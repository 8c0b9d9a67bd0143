"""What one sequence has of the tables, and a copy that is on its way.

    tokens   0 ................. len(blocks) * block_tokens ......... + len(pending)
             |  blocks: shared, immutable  |  private slots: only ours  |
                     | hole |              0 ...... len(pending) ...... len(private) * block_tokens

A hole is a matched block whose bytes did not come: the sequence computes its tokens into a slot of its own, and goes
on behind it with what did come.

Laws
    Only `TieredCache` changes a hold. Every block in it carries one of its refs, from acquire to release.
    `table` is valid once RUNNING, as far as the first hole without a slot; from then on a block stays in its slot.
    What is to be computed is computed in order: `todo`, then from `matched_tokens` on.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiers.block import Block, BlockKey, Slot, Tier


class HoldState(enum.Enum):
    ACQUIRED = "acquired"  # refs are taken, nothing moves yet
    LOADING = "loading"
    RUNNING = "running"  # everything is on the device
    RELEASED = "released"


@dataclass(eq=False, slots=True)
class Hold:
    """Compared by identity."""

    root: BlockKey
    blocks: list[Block]
    partial: Block | None  # referenced until `load`
    partial_rows: int
    # (where it was found, tokens) of each matched block, the partial one last
    found: list[tuple[Tier, int]]  # 0 tokens for a hole
    block_tokens: int
    supersedes: int | None  # the lease that this sequence continues
    state: HoldState = HoldState.ACQUIRED
    holes: list[int] = field(default_factory=list)  # indices into `blocks` still to be computed
    hole_slots: list[Slot] = field(default_factory=list)  # device slots lent for the first holes
    hole_rows: int = 0  # tokens of the first hole that are computed already
    # {why: tokens} that were known and will be computed all the same
    missed: Counter[str] = field(default_factory=Counter)
    # {block: why its bytes did not come}, until RUNNING
    failures: dict[Block, str] = field(default_factory=dict)
    private: list[Slot] = field(default_factory=list)  # device slots after those of `blocks`
    pending: list[int] = field(default_factory=list)  # tokens in the private slots
    flight: Flight | None = None  # the copy that brings the partial's bytes into private[0]
    landed: int = 0  # blocks[:landed] are not on their way any more
    table: list[Slot] = field(default_factory=list)  # device slots of blocks and private

    @property
    def referenced(self) -> list[Block]:
        return self.blocks if self.partial is None else [*self.blocks, self.partial]

    @property
    def todo(self) -> list[tuple[int, int]]:
        """Half-open token ranges of the holes, ascending; read it when the hold starts to run."""
        ranges: list[tuple[int, int]] = []
        for hole in self.holes:
            begin, end = hole * self.block_tokens, (hole + 1) * self.block_tokens
            if ranges and ranges[-1][1] == begin:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((begin, end))
        return ranges

    @property
    def matched_tokens(self) -> int:
        """Where the match ends, holes included; read it when the hold starts to run, before `commit` adds to it."""
        rows = len(self.pending) if self.state is not HoldState.ACQUIRED else self.partial_rows
        return len(self.blocks) * self.block_tokens + rows

    @property
    def cached_tokens(self) -> int:
        """Tokens of the match that need not be computed; final once RUNNING."""
        return sum(tokens for _, tokens in self.found)

    @property
    def by_tier(self) -> dict[Tier, int]:
        """`cached_tokens` by the tier they were found in."""
        found: Counter[Tier] = Counter()
        for tier, tokens in self.found:
            found[tier] += tokens
        return dict(found)


@dataclass(eq=False, slots=True)
class Flight:
    """An issued action without an answer. Its block is busy meanwhile."""

    block: Block
    private: bool = False  # the target slot is a hold's own
    hold: Hold | None = None  # that hold, as long as it wants the slot
    # places to give up on landing, unless someone needs the block by then
    vacate: tuple[Tier, ...] = ()
    cause: str = "demoted"  # why they are given up
