"""Guessing what a sequence says next from what it has read and said before: prompt lookup. Pure.

An agent repeats itself: it quotes files, edits them, calls the same tools with the same keys. Where the last few tokens
were there before, what came after them then is drafted as what comes now. A step computes the drafted tokens behind the
newest one, and every one of them is sampled as if it stood alone: those that agree with the draft were guessed rightly,
and the first that does not agree is sampled all the same. What is said is never changed by drafting, only how many
tokens a step gives.

Whether it pays is arithmetic. With `n` sequences that decode together, and `extra` the price of one more token in a
step as a share of a step of one token, a step costs 1 + extra * (n - 1), and gives n tokens. A drafted token costs
`extra`, and gives one token if it and those before it are right, of which each is with probability p. The k-th is
therefore worth its price while

    p ** k > extra * n / (1 + extra * (n - 1))

Laws
    A draft is a run of tokens that stand in the sequence behind an earlier occurrence of its last `LEAST` tokens or
    more; where that occurrence reaches the end, they go round.
    Nothing is drafted while p says that it does not pay. Then p moves back to where it began, a little with every
    token, so it is tried again.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine import sequence
    from engine.scheduler import Chunk

LEAST = 3  # tokens that must have been there before
_LONGER = (
    8  # an occurrence of so many is looked for first: what follows it is likelier to follow again
)
STEP_TOKENS = 32  # that a step with drafts feeds at most: see engine/fused_cpu.py

_FIRST = 0.6  # p before anything is known
_WEIGHT = 4.0  # observations that this is worth
_MEMORY = 0.95  # how much of what was seen before one more observation remains
_RETURN = 0.005  # of the way back to _FIRST, per token that was not drafted for


class Draft:
    """What one sequence is likely to say, and how often that was right."""

    __slots__ = ("_ids", "_right", "_seen")

    def __init__(self) -> None:
        self._ids = bytearray()  # of the sequence's tokens, 4 bytes each: `rfind` looks at 1 GB/s
        self._right = _FIRST * _WEIGHT
        self._seen = _WEIGHT

    @property
    def likelihood(self) -> float:
        """p."""
        return self._right / self._seen

    def propose(self, tokens: Sequence[int], most: int, price: float) -> tuple[int, ...]:
        """At most `most` tokens to follow `tokens`, which begin with those of the last call; each worth `price`."""
        self._ids += array("I", tokens[len(self._ids) // 4 :]).tobytes()
        length = self._worth(most, price)
        return self._lookup(length) if length else ()

    def judge(self, drafted: int, right: int) -> None:
        """After a step that was to draft: so many were, and the first `right` of them were said."""
        if not drafted:
            self._right += _RETURN * (_FIRST * self._seen - self._right)
            return
        for correct in (1,) * right + (0,) * (right < drafted):
            self._right = _MEMORY * self._right + correct
            self._seen = _MEMORY * self._seen + 1

    def _worth(self, most: int, price: float) -> int:
        length, chance = 0, self.likelihood
        while length < most and chance > price:
            length += 1
            chance *= self.likelihood
        return length

    def _lookup(self, length: int) -> tuple[int, ...]:
        for size in (_LONGER, LEAST):
            found = self._last(size)
            if found is not None:
                behind = array("I", bytes(self._ids[found : found + 4 * length]))
                return tuple(behind[at % len(behind)] for at in range(length))
        return ()

    def _last(self, size: int) -> int | None:
        """Where the last `size` tokens end that are those at the end, but for these themselves; in bytes."""
        wanted = self._ids[-4 * size :]
        end = len(self._ids) - 1
        while len(wanted) == 4 * size:
            at = self._ids.rfind(wanted, 0, end)
            if at < 0:
                return None
            if at % 4 == 0:
                return at + len(wanted)
            end = at + len(wanted) - 1  # bytes of two tokens: not an occurrence
        return None


def price(extra: float, decoding: int) -> float:
    """What the probability of a drafted token must exceed, with so many sequences decoding together."""
    return extra * decoding / (1 + extra * (decoding - 1))


@dataclass(frozen=True, slots=True)
class Drafts:
    """Drafts for the steps of one engine: of at most `most` tokens, 0 for none."""

    most: int
    extra: float
    block_tokens: int
    max_context: int

    def lengthen(self, chunks: list[Chunk]) -> list[Chunk]:
        """The same chunks, with drafts behind them where all of them decode."""
        if not self.most or not all(chunk.decodes for chunk in chunks):
            return chunks
        each = min(self.most, STEP_TOKENS // len(chunks) - 1)
        cost = price(self.extra, len(chunks))
        return [replace(chunk, draft=self._draft(chunk, each, cost)) for chunk in chunks]

    def _draft(self, chunk: Chunk, most: int, cost: float) -> tuple[int, ...]:
        """It needs no slot of its own, and its last token is not the end of anything."""
        drafted = chunk.sequence
        sampling = drafted.submit.sampling
        if not _drafts_for(drafted):
            return ()
        room = min(
            most,
            -chunk.end % self.block_tokens,
            sampling.max_tokens - drafted.output_tokens - 1,
            self.max_context - chunk.end - 1,
        )
        if room < 1:
            return ()
        draft = drafted.draft.propose(drafted.tokens, room, cost)
        ends = (at for at, token in enumerate(draft) if token in sampling.stop_ids)
        return draft[: next(ends, len(draft))]


def _drafts_for(drafted: sequence.Sequence) -> bool:
    """What a grammar or a penalty lets a token be depends on those before it: it is sampled when these are known."""
    return not drafted.submit.sampling.penalises and drafted.submit.matcher is None
