"""What may be asked of the engine, and what it answers. Pure data: the seam between the trio side and the engine thread.

Laws
    Every `Submit` is answered by exactly one `Began` or one `Refused`; a begun request ends in exactly one `Finished`.
    Between them come `Sampled`, in order. Nothing follows `Finished` or `Refused`.
    Numbers in `Usage` are measured where the work is done, never derived from the request.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from engine.constraint import Constraint
    from engine.grammar import Matcher
    from tiers.block import Tier, TokenIds
    from tiers.manifest import Manifest
    from tiers.policy import SessionClass

RequestId = NewType("RequestId", int)
LeaseId = NewType("LeaseId", int)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token. `temperature` 0 is greedy; a `seed` makes a sampled run repeatable, without one
    the service draws one."""

    max_tokens: int  # 0: prefill only, nothing is sampled
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    presence_penalty: float = 0.0  # taken off the logit of every id that was sampled already
    frequency_penalty: float = 0.0  # and this for each time that it was
    constraint: Constraint | None = None  # what may be said; the service compiles it
    top_logprobs: int | None = (
        None  # say how likely each sampled id was, and this many of the likeliest; None: do not
    )

    @property
    def penalises(self) -> bool:
        """What may be said next depends on every id that was sampled before."""
        return bool(self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, slots=True)
class Submit:
    """Run one generation. `prompt` is the exact and whole token sequence; the engine finds what it need not compute."""

    request: RequestId
    session: str  # names the lease for operators; never used to find KV
    salt: bytes  # the tenant's; separates the KV of tenants
    prompt: TokenIds
    sampling: Sampling
    supersedes: LeaseId | None = None  # the lease of the turn that this one continues
    keep_s: float = 0.0  # its blocks are protected from eviction for so long after the turn
    at: float | None = field(
        default=None, compare=False
    )  # when it was put into the inbox, on the engine's clock; the service says so
    matcher: Matcher | None = field(
        default=None, compare=False, repr=False
    )  # the service's, for `sampling.constraint`; moved by the engine alone


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a request at the next step. What it computed stays cached; it still ends in `Finished(CANCELLED)`."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Start bringing a prompt's cached blocks to the device, because a request for it is likely soon."""

    salt: bytes
    prompt: TokenIds


@dataclass(frozen=True, slots=True)
class Reclass:
    """Say what a session is waiting for, so that eviction can choose."""

    lease: LeaseId
    to: SessionClass


@dataclass(frozen=True, slots=True)
class Pin:
    """Protect the blocks of a session's leases for `seconds`. Answered with the bytes granted, or None: it is unknown
    or would pass the quota."""

    ticket: int
    salt: bytes
    session: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Unpin:
    """End a session's pin. Answered with whether there was one."""

    ticket: int
    salt: bytes
    session: str


@dataclass(frozen=True, slots=True)
class Demote:
    """Move one session's blocks, or everyone's, down to a tier now. Answered with the number of blocks moved.

    With a `salt`: that tenant's session of the name only.
    """

    ticket: int
    to: Tier
    session: str | None
    salt: bytes | None = None


@dataclass(frozen=True, slots=True)
class Persist:
    """Write a manifest. With a ticket someone waits: it is answered once durable, None or the reason it failed."""

    ticket: int | None
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete a stored response, and its KV from every tier, except what others need. Answered with whether there was
    one, once nothing of it is found any more."""

    ticket: int
    tenant: str
    response_id: str


@dataclass(frozen=True, slots=True)
class Inspect:
    """Ask for an `EngineReport`; without its sessions it costs no walk over their blocks."""

    ticket: int
    sessions: bool = True


@dataclass(frozen=True, slots=True)
class Locate:
    """Ask for what is known of some turns' KV. Answered with a tuple of `Located`, one for each."""

    ticket: int
    turns: tuple[tuple[LeaseId | None, tuple[bytes, ...]], ...]  # its lease, and its chain's keys


@dataclass(frozen=True, slots=True)
class Stop:
    """End the engine thread: cancel what runs, spill what is dirty, return."""


class FinishReason(enum.Enum):
    STOP = "stop"  # a stop id was sampled (it is the last id of the last `Sampled`), or the constraint is fulfilled
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"
    FAILED = "failed"  # ours: the step raised; the message is logged


class RefuseReason(enum.Enum):
    CONTEXT = "context"  # the prompt is longer than the model's context or the device arena
    BUSY = "busy"  # too many requests or tokens wait already
    STOPPING = "stopping"
    PROMPT = "prompt"  # empty, or an id outside the vocabulary


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """Prompt tokens not recomputed, by the tier they were found in."""

    device: int = 0
    host: int = 0
    disk: int = 0
    remote: int = 0

    @property
    def total(self) -> int:
        return self.device + self.host + self.disk + self.remote


@dataclass(frozen=True, slots=True)
class Usage:
    """`prompt_tokens == cached.total + computed_tokens`, and `recomputed` says why each of the latter was computed.

    Times are seconds on the engine's monotonic clock. The four follow one another without a gap, from the inbox to
    `Finished`.
    """

    prompt_tokens: int
    cached: CachedTokens
    computed_tokens: int
    output_tokens: int
    queue_s: float = 0.0  # from Submit until the first action on its behalf
    load_s: float = 0.0  # restoring from lower tiers
    prefill_s: float = 0.0  # until the first sampled token
    decode_s: float = 0.0  # from there until the end
    load_by_tier: dict[str, float] = field(
        default_factory=dict
    )  # {tier waited for: seconds}; sums to load_s once it began. Device: what was arriving for others already
    recomputed: dict[str, int] = field(
        default_factory=dict
    )  # {reason: tokens}; sums to computed_tokens


@dataclass(frozen=True, slots=True)
class Began:
    """The request holds what it will reuse. Sent once restoring is done, before the first token."""

    request: RequestId
    cached: CachedTokens


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the model held a sampled id to be, as natural logarithms of its own probabilities: before
    temperature, top_p, penalties and constraint. `top` are the likeliest ids, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """`likelihoods` has one for each token, if they were asked for."""

    request: RequestId
    tokens: TokenIds
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """`lease` keeps the blocks warm; hand it back in `Submit.supersedes`, or `Reclass` it. `keys` are its chain."""

    request: RequestId
    reason: FinishReason
    usage: Usage
    lease: LeaseId | None
    keys: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    request: RequestId
    reason: RefuseReason
    message: str


@dataclass(frozen=True, slots=True)
class Answer:
    """To a command with a ticket."""

    ticket: int
    value: object


Command = (
    Submit
    | Cancel
    | Prefetch
    | Reclass
    | Pin
    | Unpin
    | Demote
    | Persist
    | Forget
    | Inspect
    | Locate
    | Stop
)
Output = Began | Sampled | Finished | Refused


@dataclass(frozen=True, slots=True)
class Step:
    """Everything one turn of the engine's loop has to say; delivered in one call."""

    outputs: tuple[Output, ...]
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionReport:
    """One lease, for operators. Token counts say where its chain's bytes are (a token may be in several tiers)."""

    session: str
    session_class: str
    tokens: int
    idle_s: float
    tokens_on: dict[str, int] = field(default_factory=dict)  # {tier name: tokens}


@dataclass(frozen=True, slots=True)
class Located:
    """Where a turn's KV is, and what its lease says of it, if that has not ended."""

    tokens_on: dict[str, int]  # {tier name: tokens}; a token may be in several
    session_class: str | None = None
    idle_s: float | None = None
    pinned_s: float | None = None  # how much longer its session is pinned


@dataclass(frozen=True, slots=True)
class TierReport:
    tier: str
    capacity_bytes: int
    used_bytes: int
    blocks: int
    leased_blocks: int
    held_refs: int
    block_bytes: int = 0  # of one block as it is kept there
    classes: dict[str, int] = field(
        default_factory=dict
    )  # {what they wait for, as in tiers.policy: blocks}; sums to blocks


@dataclass(frozen=True, slots=True)
class PinReport:
    """One pin, for operators."""

    session: str
    held_bytes: int
    expires_s: float  # from now


@dataclass(frozen=True, slots=True)
class DiskReport:
    """How the disk tier is. Degraded is not dead: turns go on, and what is not written stays in memory."""

    state: str = "off"  # off, ok, degraded
    reason: str | None = None  # of the last refused write while degraded
    index_complete: bool = True  # whether every record on disk is known; prompts find theirs anyway
    records: int = 0  # known
    pending_bytes: int = 0  # handed to the writer and not yet durable
    reading: int = 0  # fetches in flight
    scrubbed_total: int = 0  # records that the online scrubber has read
    rotten_total: int = 0  # and found damaged
    degraded_s: float = 0.0  # for how long it has been
    failures_total: dict[str, int] = field(default_factory=dict)  # {reason: transactions}
    commits_total: int = 0
    commit_s_total: float = 0.0  # spent in them
    oldest_read_s: float = 0.0  # the longest read under way, as found by the last check
    writer_lag_s: float = (
        0.0  # how long the oldest block or manifest under way to the disk has been
    )
    oldest_dirty_s: float = 0.0  # how long the oldest block that is to be written waits already
    written_bytes_total: int = 0  # of blocks, rewritten tails included
    new_bytes_total: int = 0  # of the KV that was computed, in the form in which the disk keeps it
    reads_total: dict[str, int] = field(
        default_factory=dict
    )  # {way, as tiers.store has it: records}


@dataclass(frozen=True, slots=True)
class EngineReport:
    """A snapshot for `/metrics`, `homeport tiers` and `homeport sessions`."""

    running: int
    waiting: int
    loading: int
    leases: int
    refs: int
    dirty: int  # blocks not yet written to disk
    tokens_total: dict[str, int]  # {computed|device|host|disk|remote: tokens}
    output_tokens_total: int
    evictions_total: dict[str, int]  # {tier name: blocks}
    spills_total: int
    spill_failures_total: int
    fetches_total: int
    verify_failures_total: dict[str, int]  # {reason: records}; every one is tier disk
    tiers: tuple[TierReport, ...]
    sessions: tuple[SessionReport, ...]
    eviction_causes: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # {tier name: {cause: blocks}}; sums to evictions_total
    recomputed_total: dict[str, int] = field(default_factory=dict)  # {reason: prompt tokens}
    amplification: float = (
        1.0  # (fresh + recomputed) / fresh prompt tokens; 1 is a cache that forgets nothing
    )
    hit_share: float = 1.0  # reused / (reused + recomputed though it was once cached)
    compute_threads: int = 0  # of the processor's, in the last step; 0: none yet, or a GPU computes
    disk: DiskReport = field(default_factory=DiskReport)
    canary: dict[str, int] = field(default_factory=dict)  # {checked|mismatched|skipped: blocks}
    host_failures_total: dict[str, int] = field(
        default_factory=dict
    )  # {reason: blocks} refused in memory
    spill_failures_by_reason: dict[str, int] = field(
        default_factory=dict
    )  # {reason: blocks}; sums to spill_failures_total
    restored_total: dict[str, int] = field(
        default_factory=dict
    )  # {host|disk: blocks brought back from there}
    spilled_total: dict[str, int] = field(default_factory=dict)  # {host|disk: blocks put there}
    pins: tuple[PinReport, ...] = ()
    rates: dict[str, float] = field(
        default_factory=dict
    )  # {what: estimate}, as `engine.restore` has them now
    drafts_total: dict[str, int] = field(default_factory=dict)  # {right|wrong: tokens}
