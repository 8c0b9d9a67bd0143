"""Restore or recompute: what bringing cached blocks back costs, what computing them again costs, and which to choose.

Pure: no clock, no bytes. Seconds come in as observations and go out as predictions.

    restore    copies: host blocks one after another, made by the engine's own thread
               reads:  one latency, then everything that is queued before and with it at the disk's rate
    prefill    steps * step_s + tokens * token_s + (sum of the tokens' depths) * depth_s
               a token at depth d attends to d tokens before it, so a long context's tokens cost more

A match is reused up to some block and computed behind it. `choose` tries every end, whole blocks and the partial one
behind them, and takes the one with the least predicted time to the first token. The prediction leaves out that
loading and computing may overlap with other sequences' work: it is the same for every choice.

Laws
    Near the break-even everything is restored: `MARGIN` must be gained before a restore is refused.
    A refused restore teaches nothing, so every refusal moves the disk's estimates back towards the calibrated ones: a
    disk that was slow for a while is tried again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

from engine.estimate import Estimate
from tiers.block import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

MARGIN = 1.03  # what recomputing must gain; under the regret of 1.05 that we allow ourselves


@dataclass(frozen=True, slots=True)
class RestoreLimits:
    """What an operator may say about restoring."""

    deadline: float = (
        4.0  # a load may take so many times its prediction, and `floor_s` more; then it is given up
    )
    floor_s: float = 0.5
    max_loading: int = 8  # sequences that read from disk at once
    reading_bytes: int = 128 << 20  # handed to the readers at once, over all sequences
    decide: bool = True  # refuse a restore that would take longer than computing the tokens again


@dataclass(frozen=True, slots=True)
class Rates:
    """A machine and a model on it, in seconds. All positive. The defaults are guesses, for want of a measurement."""

    copy_s: float = 1e-10  # per byte, host to device
    latency_s: float = 2e-3  # of the first block that is read
    read_s: float = 2e-9  # per byte, all readers together
    step_s: float = 5e-3  # of a forward pass
    token_s: float = 1e-3  # per token of a prefill
    depth_s: float = 1e-8  # per token of a prefill and token before it
    decode_s: float = 2e-2  # of a step of one token: see engine/draft.py
    draft_s: float = 6e-3  # per token drafted behind it

    def as_dict(self) -> dict[str, float]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class ReadsMeasured:
    """What the disk does, as measured beside a running engine: `Rates.latency_s` and `Rates.read_s`."""

    latency_s: float
    read_s: float


class Part(NamedTuple):
    """A block of a match, or the rows of its last one: where it is nearest, and how many tokens it holds.

    One that is on its way to the device counts as there, but is waited for like the reads before it.
    """

    tier: Tier
    tokens: int
    arriving: bool = False


class RestoreCosts:
    """The estimates for one engine. `calibrated` is where they begin, and where refusals take them back to."""

    def __init__(
        self, calibrated: Rates, *, block_bytes: int, block_tokens: int, step_tokens: int
    ) -> None:
        self._calibrated = calibrated
        self._copies = Estimate((calibrated.copy_s,))
        self._reads = Estimate((calibrated.latency_s, calibrated.read_s))
        self._prefill = Estimate((calibrated.step_s, calibrated.token_s, calibrated.depth_s))
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._step_tokens = step_tokens
        # Steps since the last that settled: (ranges, when it began)
        self._steps: list[tuple[Sequence[tuple[int, int]], float]] = []

    @property
    def rates(self) -> Rates:
        """As they are estimated now."""
        (copy_s,) = self._copies.rates
        latency_s, read_s = self._reads.rates
        step_s, token_s, depth_s = self._prefill.rates
        return replace(
            self._calibrated,
            copy_s=copy_s,
            latency_s=latency_s,
            read_s=read_s,
            step_s=step_s,
            token_s=token_s,
            depth_s=depth_s,
        )

    # -- predicting ---------------------------------------------------------------------------------------------------

    def copy_s(self, blocks: int) -> float:
        return self._copies.predict(blocks * self._block_bytes)

    def read_s(self, blocks: int) -> float:
        """Until the last of so many queued blocks is there."""
        if not blocks:
            return 0.0
        return self._reads.predict(1, blocks * self._block_bytes)

    def prefill_s(self, begin: int, end: int) -> float:
        """Of tokens [begin, end) of one sequence, alone in its steps."""
        steps = -(-(end - begin) // self._step_tokens)
        return self._prefill.predict(steps, end - begin, _depths(begin, end))

    def choose(self, found: Sequence[Part], tokens: int, queued: int) -> int:
        """How many of the leading parts to restore; all but perhaps the last are whole blocks.

        `found` has the match's parts in order, `tokens` counts the whole prompt, and `queued` the blocks that the disk
        reads first. Parts on the device cost nothing.
        """
        host = disk = reused = 0
        waits = False  # for the disk
        every = [self.prefill_s(0, tokens)]
        for part in found:
            host += part.tier is Tier.HOST
            disk += part.tier is Tier.DISK
            waits |= part.tier is Tier.DISK or part.arriving
            reused += part.tokens
            load = self.copy_s(host) + (self.read_s(queued + disk) if waits else 0.0)
            every.append(load + self.prefill_s(reused, tokens))
        # Of equals the longer: it leaves more of the machine to others.
        best = min(range(len(every)), key=lambda parts: (every[parts], -parts))
        return len(found) if every[-1] <= every[best] * MARGIN else best

    # -- learning -----------------------------------------------------------------------------------------------------

    def calibrate_reads(self, latency_s: float, read_s: float) -> None:
        """The disk was measured."""
        self._reads = Estimate((latency_s, read_s))

    def observe_copies(self, blocks: int, seconds: float) -> None:
        self._copies.observe(seconds, blocks * self._block_bytes)

    def observe_reads(self, blocks: int, seconds: float) -> None:
        """The last of `blocks` that were queued at one time came after `seconds`."""
        self._reads.observe(seconds, 1, blocks * self._block_bytes)

    def observe_prefill(
        self, ranges: Sequence[tuple[int, int]], steps: int, seconds: float
    ) -> None:
        """Token ranges of any sequences, computed in so many steps of nothing else."""
        tokens = sum(end - begin for begin, end in ranges)
        depths = sum(_depths(begin, end) for begin, end in ranges)
        self._prefill.observe(seconds, steps, tokens, depths)

    def observe_step(
        self, ranges: Sequence[tuple[int, int]], began: float, ended: float, *, settled: bool
    ) -> None:
        """One forward pass fed these ranges. A GPU answers before it is done unless something was sampled: then `settled`.

        Steps that also decode tell nothing of prefills, and end what is being measured.
        """
        if any(end - begin == 1 for begin, end in ranges):
            self._steps.clear()
            return
        self._steps.append((ranges, began))
        if settled:
            first = self._steps[0][1]
            fed = [each for ranges, _ in self._steps for each in ranges]
            self.observe_prefill(fed, len(self._steps), ended - first)
            self._steps.clear()

    def idle(self) -> None:
        """Time passes without steps."""
        self._steps.clear()

    def forgive(self) -> None:
        """A restore from disk was refused."""
        self._reads.forget()


def _depths(begin: int, end: int) -> float:
    """How many tokens stand before each of [begin, end), summed."""
    return (end - begin) * (begin + end - 1) / 2
