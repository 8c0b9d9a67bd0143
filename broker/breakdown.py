"""Where one turn's time went, and its tokens came from. Pure: `now` is passed in, seconds on one monotonic clock.

    parse     from the request's last byte until it is understood
    queue     waiting: in its lane, for a place, for its conversation, for a warm-up, and in the engine's line
    render    its past found, its prompt rendered and encoded, its grammar compiled
    restore   KV on its way back to the device; `restore_s` says from which tier
    prefill   until the first token was sampled
    decode    until the last
    store     until the response was durable
    send      what was left to hand over: the hop from the engine, and what a slow reader did not take during decode

Laws
    A turn is in one stage at a time, from its first moment to its last: the stages add up to its whole time.
    While the engine works, the stages are what its outputs tell; once it is done, they are what it measured.
    No prompt and no text; its tenant's name is in no log line and in no span: operators alone are told.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.api import Usage

SOURCES = ("computed", "device", "host", "disk", "remote")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Stage(enum.Enum):
    PARSE = "parse"
    QUEUE = "queue"
    RENDER = "render"
    RESTORE = "restore"
    PREFILL = "prefill"
    DECODE = "decode"
    STORE = "store"
    SEND = "send"


class Status(enum.Enum):
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    CANCELLED = "cancelled"  # in the background, by its client
    FAILED = "failed"  # ours
    REFUSED = "refused"  # before its first event
    ABANDONED = "abandoned"  # cancelled from outside: the client left, or the daemon stopped


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The span of the client's that the turn belongs to, as W3C Trace Context has it."""

    trace_id: str  # 32 hex digits
    span_id: str  # 16
    sampled: bool

    @classmethod
    def parse(cls, header: str) -> TraceContext | None:
        """A `traceparent`; None for what is none: it says nothing then, and the request is served all the same."""
        found = _TRACEPARENT.fullmatch(header.strip())
        if found is None:
            return None
        version, trace_id, span_id, flags, more = found.groups()
        if version == "ff" or (version == "00" and more) or not int(trace_id, 16):
            return None
        return cls(trace_id, span_id, bool(int(flags, 16) & 1)) if int(span_id, 16) else None


@dataclass(frozen=True, slots=True)
class Origin:
    """How a turn reached us."""

    request_id: str
    dialect: str  # responses, messages, chat
    transport: str  # http, websocket, background
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class Lap:
    """The turn was in `stage` from `begin` until `end`, seconds since its beginning."""

    stage: Stage
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """A turn that has ended, as operators see it."""

    origin: Origin
    status: Status
    reason: str | None  # why it is not completed: an incomplete reason, or an error's code
    response_id: str | None  # None: it was refused before it had one
    session: str | None
    model: str | None  # as it was asked for
    ended_at: float  # seconds since the epoch
    total_s: float
    first_token_s: float | None  # from its beginning; None: nothing was sampled
    laps: tuple[Lap, ...]
    output_tokens: int
    tokens: dict[str, int]  # {source: prompt tokens}
    recomputed: dict[str, int]  # {reason: prompt tokens}; sums to tokens["computed"]
    restore_s: dict[str, float]  # {tier: seconds}
    diverged: tuple[int, str] | None = None  # where the prompt left the turn before: token, field
    tenant: str = ""  # whose session it is

    @property
    def prompt_tokens(self) -> int:
        return sum(self.tokens.values())

    @property
    def stages(self) -> dict[Stage, float]:
        """Seconds of every stage, in order; they sum to `total_s`."""
        stages = dict.fromkeys(Stage, 0.0)
        for lap in self.laps:
            stages[lap.stage] += lap.end - lap.begin
        return stages

    def as_json(self) -> dict[str, Any]:
        """One element of `/admin/turns`; its shape is documented there."""
        at = self.diverged
        diverged = None if at is None else {"at": at[0], "part": at[1]}
        return {
            "request_id": self.origin.request_id,
            "response_id": self.response_id,
            "session": self.session,
            "tenant": self.tenant,
            "model": self.model,
            "dialect": self.origin.dialect,
            "transport": self.origin.transport,
            "trace_id": None if self.origin.trace is None else self.origin.trace.trace_id,
            "status": self.status.value,
            "reason": self.reason,
            "ended_at": self.ended_at,
            "total_s": self.total_s,
            "first_token_s": self.first_token_s,
            "stages_s": {stage.value: seconds for stage, seconds in self.stages.items()},
            "restore_s": self.restore_s,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "tokens": self.tokens,
            "recomputed": self.recomputed,
            "diverged": diverged,
        }

    def as_logfmt(self) -> str:
        """One line. Everything in it is ours or a number: nothing that a client may choose can forge another line."""
        trace = self.origin.trace
        words: dict[str, object] = {
            "request": self.origin.request_id,
            "response": self.response_id or "-",
            "dialect": self.origin.dialect,
            "transport": self.origin.transport,
            "trace": "-" if trace is None else trace.trace_id,
            "status": self.status.value,
            "reason": self.reason or "-",
            "output_tokens": self.output_tokens,
            **{f"{source}_tokens": self.tokens[source] for source in SOURCES},
            "first_token_s": "-" if self.first_token_s is None else f"{self.first_token_s:.4f}",
            "total_s": f"{self.total_s:.4f}",
            **{f"{stage.value}_s": f"{seconds:.4f}" for stage, seconds in self.stages.items()},
            **{f"restore_{tier}_s": f"{took:.4f}" for tier, took in self.restore_s.items()},
        }
        return "turn " + " ".join(f"{name}={value}" for name, value in words.items())


class Breakdown:
    """One turn's account, filled along its way. `gap` is told, for tokens after the first, how long each took."""

    def __init__(
        self,
        origin: Origin,
        now: float,
        *,
        gap: Callable[[float, int], None] = lambda seconds, tokens: None,
    ) -> None:
        self.origin = origin
        self.status: Status | None = None  # until it is known how it ended
        self.reason: str | None = None
        self.response_id: str | None = None
        self.session: str | None = None
        self.tenant = ""
        self.model: str | None = None
        self.diverged: tuple[int, str] | None = None
        self._gap = gap
        self._began = now
        self._stage, self._since = Stage.PARSE, now
        self._laps: list[Lap] = []
        self._submitted: tuple[int, float] | None = (
            None  # laps before the engine; when it was asked
        )
        self._first: float | None = None
        self._last = now  # sampled
        self._output_tokens = 0
        self._tokens = Counter(dict.fromkeys(SOURCES, 0))
        self._recomputed: Counter[str] = Counter()
        self._restore_s: dict[str, float] = {}

    def under_way(self, now: float) -> dict[str, Any]:
        """What is known of it while it runs; an element of `/admin/overview`."""
        return {
            "request_id": self.origin.request_id,
            "session": self.session,
            "tenant": self.tenant,
            "stage": self._stage.value,
            "so_far_s": now - self._began,
        }

    def in_background(self) -> Breakdown:
        """The same account, of a turn that goes on without its request."""
        self.origin = replace(self.origin, transport="background")
        return self

    def enter(self, stage: Stage, now: float) -> None:
        """From now on it is in this stage."""
        if stage is not self._stage:
            self._close(now)
            self._stage = stage

    def submitted(self, now: float) -> None:
        """The engine was asked. It says what it does; what it measured counts in the end: `ran`."""
        self._close(now)
        self._submitted = (len(self._laps), now)
        self._stage = Stage.QUEUE

    def sampled(self, tokens: int, now: float) -> None:
        """Some tokens have come. This is all that a token costs here."""
        if self._first is None:
            self._first = now
            self.enter(Stage.DECODE, now)
            if tokens > 1:
                self._gap(0.0, tokens - 1)
        else:
            self._gap((now - self._last) / tokens, tokens)
        self._last = now

    def ran(self, usage: Usage, now: float) -> None:
        """The engine is done. A turn may ask it more than once: a summary comes before what it is made for."""
        assert self._submitted is not None, "it was not asked"
        kept, at = self._submitted
        self._submitted = None
        del self._laps[kept:]
        self._since = at
        for stage, took in (
            (Stage.QUEUE, usage.queue_s),
            (Stage.RESTORE, usage.load_s),
            (Stage.PREFILL, usage.prefill_s),
            (Stage.DECODE, usage.decode_s),
        ):
            self._stage = stage
            self._close(min(self._since + took, now))  # two clocks, in two threads
        self._stage = Stage.SEND
        self._output_tokens += usage.output_tokens
        cached = usage.cached
        self._tokens.update(
            computed=usage.computed_tokens,
            device=cached.device,
            host=cached.host,
            disk=cached.disk,
            remote=cached.remote,
        )
        self._recomputed.update(usage.recomputed)
        for tier, seconds in usage.load_by_tier.items():
            self._restore_s[tier] = self._restore_s.get(tier, 0.0) + seconds

    def record(self, now: float, ended_at: float) -> TurnRecord:
        """It is over. `ended_at` is now, on the wall."""
        assert self.status is not None, "how did it end?"
        self._close(now)
        first = self._first
        return TurnRecord(
            origin=self.origin,
            status=self.status,
            reason=self.reason,
            response_id=self.response_id,
            session=self.session,
            model=self.model,
            ended_at=ended_at,
            total_s=now - self._began,
            first_token_s=None if first is None else first - self._began,
            laps=tuple(self._laps),
            output_tokens=self._output_tokens,
            tokens=dict(self._tokens),
            recomputed=dict(self._recomputed),
            restore_s=dict(self._restore_s),
            diverged=self.diverged,
            tenant=self.tenant,
        )

    def _close(self, now: float) -> None:
        if now > self._since:
            began = self._began
            self._laps.append(Lap(self._stage, self._since - began, now - began))
        self._since = now
