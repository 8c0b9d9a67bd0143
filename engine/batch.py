"""What one forward pass runs: tokens of several sequences laid end to end. Pure data, no tensors.

    tokens      t0 t1 t2 | t0 | t0 t1 | ...        flat; one segment per sequence
    segment     start, count: its run in the flat lists, half open [start, start + count)
                context: tokens in its KV once these are written, so its past is context - count
                table: device slots in chain order; token i of the sequence lives in
                slot table[i // block_tokens], row i % block_tokens

A decode is a segment with one token, and those drafted behind it; a chunk of a prefill is one with many. A decode wants
the logits of each of its tokens, a prefill at most those of its last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiers.block import Slot


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's part of a batch."""

    start: int
    count: int
    context: int
    table: Sequence[Slot]  # may be longer than the context needs
    logits: int  # of so many of its tokens, the last ones, the logits are wanted

    @property
    def decodes(self) -> bool:
        return self.logits == self.count


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens[i]` stands at `positions[i]` of its sequence. Segments cover the tokens in order, no gaps."""

    tokens: Sequence[int]
    positions: Sequence[int]
    segments: Sequence[Segment]

    @property
    def wanted(self) -> list[int]:
        """Which of the tokens' logits are wanted, segment after segment."""
        return [
            at
            for segment in self.segments
            for end in (segment.start + segment.count,)
            for at in range(end - segment.logits, end)
        ]

    def part(self, segments: Sequence[Segment]) -> Batch:
        """Some of the segments, laid end to end."""
        kept: list[Segment] = []
        tokens: list[int] = []
        positions: list[int] = []
        for segment in segments:
            run = slice(segment.start, segment.start + segment.count)
            kept.append(replace(segment, start=len(tokens)))
            tokens += self.tokens[run]
            positions += self.positions[run]
        return Batch(tokens, positions, tuple(kept))

    def slots(self, block_tokens: int) -> list[Slot]:
        """Where each token's KV is written: its slot. The row in it is its position modulo `block_tokens`."""
        return [
            segment.table[position // block_tokens]
            for segment in self.segments
            for position in range(segment.context - segment.count, segment.context)
        ]


def padded_tables(segments: Sequence[Segment], block_tokens: int) -> list[list[int]]:
    """What each context needs of its table, as long as the longest: behind it stands slot 0, which nobody may read."""
    blocks = [-(-segment.context // block_tokens) for segment in segments]
    longest = max(blocks)
    return [
        [*segment.table[:used], *[0] * (longest - used)]
        for segment, used in zip(segments, blocks, strict=True)
    ]
