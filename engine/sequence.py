"""One generation as the engine sees it: exact tokens, how many have KV, and what it holds.

    tokens    0 ............ computed ............ len(tokens)
              |  KV in hold  |  still to be fed    |
    prompt    0 ........................ prompt_tokens
    sampled                              prompt_tokens ... len(tokens)

A step feeds `tokens[computed:computed + n]`. When it reaches the end, the logits of the last token choose the next
one, which is appended and fed by a later step: the newest token never has KV yet.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.api import CachedTokens, Usage

if TYPE_CHECKING:
    from engine.api import RequestId, Submit
    from tiers.cache import Hold


class Phase(enum.Enum):
    WAITING = "waiting"  # holds nothing
    LOADING = "loading"  # its cached blocks are on their way to the device
    RUNNING = "running"


@dataclass(slots=True, eq=False)
class Sequence:
    """Compared by identity. Times are seconds on the engine's clock."""

    submit: Submit
    arrived: float
    tokens: list[int]
    computed: int = 0
    phase: Phase = Phase.WAITING
    hold: Hold | None = None
    cached: CachedTokens = field(default_factory=CachedTokens)
    began: bool = False
    load_started: float | None = None
    prefill_started: float | None = None
    first_sampled: float | None = None

    @classmethod
    def of(cls, submit: Submit, now: float) -> Sequence:
        return cls(submit=submit, arrived=now, tokens=list(submit.prompt))

    @property
    def request(self) -> RequestId:
        return self.submit.request

    @property
    def prompt_tokens(self) -> int:
        return len(self.submit.prompt)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - len(self.submit.prompt)

    @property
    def pending(self) -> int:
        """Tokens that must be fed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def prefill_only(self) -> bool:
        return self.submit.sampling.max_tokens == 0

    def usage(self) -> Usage:
        """Of the prompt, `cached` was reused and the rest counts as computed, cancelled remainders included."""
        started = self.load_started if self.load_started is not None else self.arrived
        prefill = self.prefill_started if self.prefill_started is not None else started
        first = self.first_sampled if self.first_sampled is not None else prefill
        return Usage(
            prompt_tokens=self.prompt_tokens,
            cached=self.cached,
            computed_tokens=self.prompt_tokens - self.cached.total,
            output_tokens=self.output_tokens,
            queue_s=started - self.arrived,
            load_s=prefill - started,
            prefill_s=first - prefill,
        )
