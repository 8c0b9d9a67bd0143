"""One generation as the engine sees it: exact tokens, which of them have KV, and what it holds.

    tokens    0 ......... hole ......... hole ....... computed ............ len(tokens)
              |  KV in hold, but for the holes          |  still to be fed    |
    prompt    0 ........................ prompt_tokens
    sampled                              prompt_tokens ... len(tokens)

A hole is a part of what was found in the cache whose bytes did not come: it is computed, and what stands behind it
stays. A step feeds a part of the first range that is left, holes first: the KV of a token needs that of all tokens
before it, and of none behind it. When the last range is done, the logits of the last token choose the next one, which
is appended and fed by a later step: the newest token never has KV yet.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.api import CachedTokens, Usage
from engine.draft import Draft

if TYPE_CHECKING:
    from engine.api import RequestId, Submit
    from tiers.cache import Hold


class Phase(enum.Enum):
    WAITING = "waiting"  # holds nothing
    LOADING = "loading"  # its cached blocks are on their way to the device
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Load:
    """What was expected of a restore when it began."""

    began: float
    deadline: float  # when what has not come is computed instead
    reads: int  # blocks that the disk had to read for it, those queued before included; 0: none of its own


@dataclass(slots=True, eq=False)
class Sequence:
    """Compared by identity. Times are seconds on the engine's clock."""

    submit: Submit
    arrived: float
    tokens: list[int]
    computed: int = 0  # tokens before it have KV, but for the holes
    holes: list[tuple[int, int]] = field(default_factory=list)  # half open, ascending
    phase: Phase = Phase.WAITING
    hold: Hold | None = None
    reads_disk: bool = False  # when it was last looked at, some of its blocks were on disk only
    looking_up: bool = False  # the disk was asked which of its blocks it has
    load: Load | None = None  # while LOADING
    cached: CachedTokens = field(default_factory=CachedTokens)
    recomputed: dict[str, int] = field(
        default_factory=dict
    )  # {reason: prompt tokens}; known once it began
    began: bool = False
    load_started: float | None = None
    copied_s: float = 0.0  # of its load: copies between memories
    load_by_tier: dict[str, float] = field(
        default_factory=dict
    )  # {tier waited for: seconds}; known once it began
    prefill_started: float | None = None
    first_sampled: float | None = None
    draft: Draft = field(default_factory=Draft)

    @classmethod
    def of(cls, submit: Submit, now: float) -> Sequence:
        arrived = now if submit.at is None else submit.at
        return cls(submit=submit, arrived=arrived, tokens=list(submit.prompt))

    @property
    def request(self) -> RequestId:
        return self.submit.request

    @property
    def tenant(self) -> bytes:
        """Whose it is: what keeps his blocks apart from others'."""
        return self.submit.salt

    @property
    def prompt_tokens(self) -> int:
        return len(self.submit.prompt)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - len(self.submit.prompt)

    @property
    def pending(self) -> int:
        """Tokens that must be fed before the next one can be sampled."""
        return sum(end - begin for begin, end in self.holes) + len(self.tokens) - self.computed

    @property
    def next_range(self) -> tuple[int, int]:
        """What is to be computed first: a hole, or all that is left behind the last one."""
        return self.holes[0] if self.holes else (self.computed, len(self.tokens))

    def advance(self, end: int) -> None:
        """The tokens of `next_range` up to `end` have KV now."""
        begin, until = self.next_range
        assert begin < end <= until
        if not self.holes:
            self.computed = end
        elif end == until:
            self.holes.pop(0)
        else:
            self.holes[0] = (end, until)

    def say(self, tokens: tuple[int, ...]) -> None:
        """Sampled in one step: all but the newest were drafted, and so have KV."""
        self.tokens += tokens
        self.computed += len(tokens) - 1

    @property
    def prefill_only(self) -> bool:
        return self.submit.sampling.max_tokens == 0

    def loaded(self, now: float) -> None:
        """Its load is over: say what it waited for. Copies are made while it starts, reads are waited for."""
        assert self.load_started is not None
        self.prefill_started = now
        took = now - self.load_started
        if self.reads_disk:
            copied = min(self.copied_s, took)
            by_tier = {"host": copied, "disk": took - copied}
        else:
            by_tier = {"host" if self.copied_s else "device": took}
        self.load_by_tier = {tier: seconds for tier, seconds in by_tier.items() if seconds}

    def usage(self, now: float) -> Usage:
        """Of the prompt, `cached` was reused and the rest counts as computed, cancelled remainders included.

        What it never came to has taken no time: the part that it was in lasts until now.
        """
        first = self.first_sampled if self.first_sampled is not None else now
        prefill = self.prefill_started if self.prefill_started is not None else first
        started = self.load_started if self.load_started is not None else prefill
        return Usage(
            prompt_tokens=self.prompt_tokens,
            cached=self.cached,
            computed_tokens=self.prompt_tokens - self.cached.total,
            output_tokens=self.output_tokens,
            queue_s=started - self.arrived,
            load_s=prefill - started,
            prefill_s=first - prefill,
            decode_s=now - first,
            load_by_tier=self.load_by_tier,
            recomputed=self.recomputed if self.began else {"cancelled": self.prompt_tokens},
        )
