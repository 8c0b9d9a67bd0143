"""The engine thread: owns the model, the arenas, the tables and every sequence; nobody else touches them.

One turn of the loop, on one screen in `_turn`:

    drain the inbox -> admit and load -> tick and write behind -> plan -> run -> sample -> commit -> emit once

Laws
    Every accepted `Submit` ends in exactly one `Finished` or `Refused`, also when cancelled or when the engine stops.
    Outputs of one turn leave in one `emit` call, which may wait for the receiver: a producer that waits has no backlog.
    An assertion that fails here escapes, ends the thread and so the daemon: wrong tables must not go on serving.

Disk work is posted to the disk threads and answered through the inbox; copies between arenas are made at once.
This file knows neither trio nor transformers, and no tensor but the logits that it hands from runner to sampler.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.api import (
    Answer,
    Began,
    CachedTokens,
    Cancel,
    Demote,
    EngineReport,
    Finished,
    FinishReason,
    Forget,
    Inspect,
    LeaseId,
    Persist,
    Pin,
    Prefetch,
    Reclass,
    Refused,
    RefuseReason,
    Sampled,
    SessionReport,
    Step,
    Stop,
    Submit,
    TierReport,
    Unpin,
)
from engine.batch import Batch, Segment
from engine.sampler import SamplingState
from engine.sequence import Phase, Sequence
from tiers.block import Copy, Drop, Fetch, Spill, Tier
from tiers.disk import (
    ChainFound,
    Failed,
    Forgotten,
    IndexFailed,
    IndexSlice,
    Landed,
    Persisted,
    PersistFailed,
    Rotten,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Seq

    import torch

    from engine.api import Command, Output, RequestId
    from engine.memory import Memory
    from engine.scheduler import Chunk, Scheduler
    from tiers.block import Action, BlockKey
    from tiers.cache import Hold, Lease, TieredCache
    from tiers.disk import DiskReader, DiskWriter
    from tiers.disk import Reply as DiskReply
    from tiers.manifest import Manifest

log = logging.getLogger(__name__)

# The tables' own check, run only while nothing else is to be done. It walks every block: 0.8 s at 70,000 (measured
# 2026-11), which a request that comes just then has to wait for.
CHECK_INTERVAL_S = 300.0


class RunsBatches(Protocol):
    def run(self, batch: Batch) -> torch.Tensor: ...


class Samples(Protocol):
    def sample(self, logits: torch.Tensor, requests: Seq[SamplingState]) -> list[int]: ...


@dataclass(slots=True)
class Counters:
    """Totals since start; see `EngineReport`."""

    computed: int = 0
    cached_device: int = 0
    cached_host: int = 0
    cached_disk: int = 0
    output: int = 0
    spills: int = 0
    spill_failures: int = 0
    fetches: int = 0
    verify_failures: dict[str, int] = dataclasses.field(default_factory=dict)  # {reason: records}


class Engine:
    """`run` is the thread's body. `inbox` takes commands and the disk's answers from any thread; `max_context` never
    changes; everything else belongs to the engine thread."""

    def __init__(
        self,
        *,
        cache: TieredCache,
        scheduler: Scheduler,
        runner: RunsBatches,
        sampler: Samples,
        memory: Memory,
        writer: DiskWriter,
        reader: DiskReader,
        root: Callable[[bytes], BlockKey],
        max_context: int,
        vocab_size: int,
        clock: Callable[[], float],
        inbox: queue.SimpleQueue[Command | DiskReply],
    ) -> None:
        self._cache = cache
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._memory = memory
        self._writer = writer
        self._reader = reader
        self._root = root
        self._max_context = min(max_context, scheduler.context_limit)
        self._vocab_size = vocab_size
        self._clock = clock
        self._inbox = inbox
        self._sequences: dict[RequestId, Sequence] = {}
        self._prefetches: list[Hold] = []
        self._waiting_for_disk = 0  # posted disk actions and manifests not yet answered
        self._next_lease = 1
        self._outputs: list[Output] = []
        self._answers: list[Answer] = []
        self._counters = Counters()
        self._next_check = 0.0
        self._stuck = (
            False  # nothing can go on before some message arrives: slots are on their way out or in
        )
        self._stopping = False

    @property
    def max_context(self) -> int:
        """Tokens of prompt and output together."""
        return self._max_context

    def run(self, emit: Callable[[Step], None]) -> None:
        """Serve until `Stop`, then finish what runs as cancelled, spill what is dirty and wait for the disk."""
        while not self._stopping:
            self._turn(emit)
        now = self._clock()
        for sequence in list(self._sequences.values()):
            self._finish(sequence, FinishReason.CANCELLED, now)
        self._flush(emit)
        self._await_disk()
        self._perform(self._cache.write_behind(self._clock(), all_dirty=True))
        self._await_disk()
        self._flush(emit)

    def _await_disk(self) -> None:
        self._end_prefetches(self._clock())
        while self._waiting_for_disk:
            self._receive(self._inbox.get())
            self._end_prefetches(self._clock())

    # -- one turn ----------------------------------------------------------------------------------------------------

    def _turn(self, emit: Callable[[Step], None]) -> None:
        self._drain()
        now = self._clock()
        self._perform(self._cache.tick(now))
        self._perform(self._cache.write_behind(now))
        self._end_prefetches(now)
        self._admit(now)
        self._begin_loaded(now)
        if chunks := self._make_place(self._scheduler.plan(), now):
            logits = self._runner.run(_batch_of(chunks))
            self._advance(chunks, logits, self._clock())
        elif not self._scheduler.idle:
            self._stuck = True
            assert self._waiting_for_disk, "work waits, nothing runs, and no answer is due"
        elif now >= self._next_check:
            self._cache.check()
            self._next_check = now + CHECK_INTERVAL_S
        self._flush(emit)

    def _drain(self) -> None:
        """Take all that is there; wait for the first message only when nothing can run without one."""
        try:
            if self._stuck or self._scheduler.idle:
                self._receive(self._inbox.get(timeout=self._sleep_s()))
            self._stuck = False
            while True:
                self._receive(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _sleep_s(self) -> float | None:
        now = self._clock()
        due = self._cache.next_event(now)
        return None if due is None else max(0.0, due - now)

    def _flush(self, emit: Callable[[Step], None]) -> None:
        if self._outputs or self._answers:
            step = Step(tuple(self._outputs), tuple(self._answers))
            self._outputs.clear()
            self._answers.clear()
            emit(step)

    # -- messages ----------------------------------------------------------------------------------------------------

    def _receive(self, message: Command | DiskReply) -> None:
        now = self._clock()
        match message:
            case Submit():
                self._submit(message, now)
            case Cancel(request):
                if sequence := self._sequences.get(request):
                    self._finish(sequence, FinishReason.CANCELLED, now)
            case Prefetch(salt, prompt):
                self._prefetch(salt, prompt, now)
            case Reclass(lease, to):
                self._cache.reclass(lease, to, now)
            case Pin(ticket) | Unpin(ticket):  # the tables learn it soon
                self._answers.append(Answer(ticket, None))
            case Demote(ticket, to, session):
                self._answers.append(Answer(ticket, self._demote(to, session, now)))
            case Persist(ticket, manifest):
                self._persist(ticket, manifest, now)
            case Inspect(ticket):
                self._answers.append(Answer(ticket, self._report(now)))
            case Stop():
                self._stopping = True
            case Landed(action):
                self._landed(action, now)
            case Failed(action, reason):
                self._failed(action, reason, now)
            case Forget(ticket, tenant, response_id):
                self._waiting_for_disk += 1
                self._writer.forget_response(tenant, response_id, ticket)
            case Persisted(ticket):
                self._answer_disk(ticket, None)
            case PersistFailed(ticket, reason):
                self._answer_disk(ticket, reason)
            case Forgotten(ticket, existed):
                self._answer_disk(ticket, existed)
            case IndexSlice() | IndexFailed() | ChainFound() | Rotten():
                pass  # nobody asks for them yet

    def _submit(self, submit: Submit, now: float) -> None:
        prompt = submit.prompt
        if self._stopping:
            self._refuse(submit, RefuseReason.STOPPING, "the server is stopping")
        elif not self._scheduler.accepts():
            self._refuse(submit, RefuseReason.BUSY, "too many requests are waiting")
        elif not prompt or min(prompt) < 0 or max(prompt) >= self._vocab_size:
            self._refuse(
                submit,
                RefuseReason.PROMPT,
                "the prompt is empty or has an id outside the vocabulary",
            )
        elif len(prompt) > self._max_context - (submit.sampling.max_tokens > 0):
            self._refuse(
                submit,
                RefuseReason.CONTEXT,
                f"the prompt has {len(prompt)} tokens; the context holds {self._max_context}",
            )
        else:
            sequence = Sequence.of(submit, now)
            self._sequences[submit.request] = sequence
            self._scheduler.enqueue(sequence)

    def _refuse(self, submit: Submit, reason: RefuseReason, message: str) -> None:
        self._outputs.append(Refused(submit.request, reason, message))

    def _prefetch(self, salt: bytes, prompt: tuple[int, ...], now: float) -> None:
        """Bring whole blocks only: a private copy of a partial one would serve nobody."""
        match = self._cache.match(self._root(salt), prompt)
        whole = dataclasses.replace(
            match, partial=None, partial_rows=0, tokens=match.tokens - match.partial_rows
        )
        if not whole.blocks:
            return
        hold = self._cache.acquire(whole, now)
        actions = self._cache.load(hold, now)
        if actions is None:  # no free slot: a guess about the future evicts nobody
            self._cache.release(hold, now)
            return
        self._perform(actions)
        self._prefetches.append(hold)

    def _end_prefetches(self, now: float) -> None:
        ready = [hold for hold in self._prefetches if self._cache.ready(hold)]
        for hold in ready:
            self._prefetches.remove(hold)
            self._cache.release(hold, now)

    def _demote(self, to: Tier, session: str | None, now: float) -> int:
        """How many blocks left a tier above `to`, or will once they are written."""
        before = self._held_above(to)
        actions = self._cache.demote(to, session, now)
        self._perform(actions)
        writing = sum(isinstance(action, Spill) for action in actions)
        return before - self._held_above(to) + (writing if to is Tier.DISK else 0)

    def _held_above(self, tier: Tier) -> int:
        tiers = self._cache.statistics().tiers
        return sum(of.pool.held for above, of in tiers.items() if above < tier)

    def _persist(self, ticket: int | None, manifest: Manifest, now: float) -> None:
        """A manifest someone waits for takes its turn's dirty blocks along, in one transaction."""
        actions = self._cache.write_behind(now, all_dirty=True) if ticket is not None else []
        self._waiting_for_disk += 1
        self._perform(actions, manifest=manifest, ticket=ticket)

    def _landed(self, action: Action, now: float) -> None:
        self._waiting_for_disk -= 1
        match action:
            case Fetch():
                self._memory.settle(action)
                self._counters.fetches += 1
            case Spill():
                self._counters.spills += 1
            case Copy() | Drop():
                pass
        self._cache.landed(action, now)

    def _failed(self, action: Action, reason: str, now: float) -> None:
        self._waiting_for_disk -= 1
        match action:
            case Fetch():
                self._memory.abandon(action)
                failures = self._counters.verify_failures
                failures[reason] = failures.get(reason, 0) + 1
            case Spill():
                self._counters.spill_failures += 1
            case Copy() | Drop():
                pass
        self._perform(self._cache.failed(action, now, reason))

    def _answer_disk(self, ticket: int | None, value: object) -> None:
        self._waiting_for_disk -= 1
        if ticket is not None:
            self._answers.append(Answer(ticket, value))

    # -- moving bytes ------------------------------------------------------------------------------------------------

    def _perform(
        self,
        actions: Iterable[Action],
        *,
        manifest: Manifest | None = None,
        ticket: int | None = None,
    ) -> None:
        """In order. Copies land at once; spills of one call go to the writer together, with the manifest if any."""
        spills: list[tuple[Spill, memoryview]] = []
        for action in actions:
            match action:
                case Copy():
                    self._memory.copy(action)
                    self._cache.landed(action, self._clock())
                case Spill():
                    spills.append((action, self._memory.payload(action)))
                case Fetch():
                    self._waiting_for_disk += 1
                    self._reader.fetch(action, self._memory.buffer(action))
                case Drop():
                    self._waiting_for_disk += 1
                    self._writer.drop(action)
        if spills and self._writer.offer_blocks(tuple(spills), manifest, ticket):
            self._waiting_for_disk += len(spills)
            return
        for (
            spill,
            _,
        ) in spills:  # the writer is behind: these blocks stay dirty, or are forgotten when their slot is needed
            self._counters.spill_failures += 1
            self._cache.failed(spill, self._clock(), "full")
        if manifest is not None:
            self._writer.persist(manifest, ticket)

    # -- admission and loading ---------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        while (sequence := self._scheduler.admissible()) is not None:
            root = self._root(sequence.submit.salt)
            hold = self._cache.acquire(
                self._cache.match(root, tuple(sequence.tokens)),
                now,
                supersedes=sequence.submit.supersedes,
            )
            actions = self._cache.load(hold, now)
            if actions is None:
                self._make_room(self._cache.slots_to_load(hold), now)
                actions = self._cache.load(hold, now)
            if actions is None:  # slots are held by others, or their bytes are still on the way out
                self._cache.release(hold, now)
                return
            self._scheduler.start_loading(sequence)
            sequence.hold = hold
            if sequence.load_started is None:
                sequence.load_started = now
            self._perform(actions)

    def _begin_loaded(self, now: float) -> None:
        for sequence in list(self._scheduler.loading):
            hold = sequence.hold
            assert hold is not None
            if not self._cache.ready(hold):
                continue
            if hold.todo:  # start over without what did not come
                self._cache.release(hold, now)
                sequence.hold = None
                self._scheduler.start_running(sequence)
                self._scheduler.preempt(sequence)
                continue
            self._scheduler.start_running(sequence)
            sequence.computed = hold.cached_tokens
            if sequence.began:
                continue
            sequence.began = True
            sequence.prefill_started = now
            sequence.cached = CachedTokens(
                device=hold.by_tier.get(Tier.DEVICE, 0),
                host=hold.by_tier.get(Tier.HOST, 0),
                disk=hold.by_tier.get(Tier.DISK, 0),
            )
            self._counters.cached_device += sequence.cached.device
            self._counters.cached_host += sequence.cached.host
            self._counters.cached_disk += sequence.cached.disk
            self._outputs.append(Began(sequence.request, sequence.cached))

    def _make_place(self, chunks: list[Chunk], now: float) -> list[Chunk]:
        """Give every chunk the private slots it writes; preempt the latest starter when the device is truly full."""
        placed: list[Chunk] = []
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.phase is not Phase.RUNNING:  # preempted for an earlier chunk
                continue
            if self._lend(sequence, sequence.computed + chunk.count, now):
                placed.append(chunk)
        return [chunk for chunk in placed if chunk.sequence.phase is Phase.RUNNING]

    def _lend(self, sequence: Sequence, tokens: int, now: float) -> bool:
        hold = sequence.hold
        assert hold is not None
        while not self._cache.lend(hold, tokens, now):
            self._make_room(self._cache.missing_slots(hold, tokens), now)
            if self._cache.lend(hold, tokens, now):
                break
            victim = self._scheduler.victim(sequence)
            if (
                victim is None
            ):  # its slots are on the way out, or being loaded by others: try again next turn
                return False
            self._preempt(victim, now)
        return True

    def _make_room(self, slots: int, now: float) -> None:
        """Evict until so many slots are free, or nothing more can go now. Each landed copy may let the next go."""
        while (free := self._cache.free_slots) < slots:
            actions = self._cache.make_room(slots, now)
            self._perform(actions)
            if not actions and self._cache.free_slots == free:
                return

    def _preempt(self, sequence: Sequence, now: float) -> None:
        """Give its slots back; what it computed stays cached as long as there is room, so it loses little."""
        assert sequence.hold is not None
        self._cache.release(sequence.hold, now)
        sequence.hold = None
        sequence.computed = 0
        self._scheduler.preempt(sequence)

    # -- after the step ----------------------------------------------------------------------------------------------

    def _advance(self, chunks: list[Chunk], logits: torch.Tensor, now: float) -> None:
        """Commit what was computed, then append what was sampled; finish those that are done."""
        samplers = [chunk.sequence for chunk in chunks if _samples(chunk)]
        sampled = (
            self._sampler.sample(logits, [_sampling_state(s) for s in samplers]) if samplers else []
        )
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.hold is not None
            end = sequence.computed + chunk.count
            self._cache.commit(sequence.hold, tuple(sequence.tokens[sequence.computed : end]), now)
            self._counters.computed += chunk.count
            sequence.computed = end
            if sequence.prefill_only and sequence.pending == 0:
                self._finish(sequence, FinishReason.LENGTH, now)
        for sequence, token in zip(samplers, sampled, strict=True):
            self._append(sequence, token, now)

    def _append(self, sequence: Sequence, token: int, now: float) -> None:
        sequence.tokens.append(token)
        self._counters.output += 1
        if sequence.first_sampled is None:
            sequence.first_sampled = now
        self._outputs.append(Sampled(sequence.request, (token,)))
        sampling = sequence.submit.sampling
        if token in sampling.stop_ids:
            self._finish(sequence, FinishReason.STOP, now)
        elif (
            sequence.output_tokens >= sampling.max_tokens
            or len(sequence.tokens) >= self._max_context
        ):
            self._finish(sequence, FinishReason.LENGTH, now)

    def _finish(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        """End a sequence in any phase; what it holds becomes its session's lease."""
        del self._sequences[sequence.request]
        self._scheduler.remove(sequence)
        lease: LeaseId | None = None
        keys: tuple[bytes, ...] = ()
        if sequence.hold is not None and sequence.phase is Phase.RUNNING:
            lease = LeaseId(self._next_lease)
            self._next_lease += 1
            keys = self._cache.lease(
                sequence.hold, lease, sequence.submit.session, now, sequence.submit.supersedes
            )
        elif sequence.hold is not None:  # cancelled while loading
            self._prefetches.append(sequence.hold)  # released once nothing of it is in flight
        if not sequence.began:
            self._outputs.append(Began(sequence.request, sequence.cached))
        self._outputs.append(Finished(sequence.request, reason, sequence.usage(), lease, keys))

    # -- reports -----------------------------------------------------------------------------------------------------

    def _report(self, now: float) -> EngineReport:
        cache = self._cache.statistics()
        counters = self._counters
        block_bytes = self._memory.block_bytes
        return EngineReport(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            loading=len(self._scheduler.loading),
            leases=cache.leases,
            refs=cache.refs,
            dirty=cache.dirty,
            tokens_total={
                "computed": counters.computed,
                "device": counters.cached_device,
                "host": counters.cached_host,
                "disk": counters.cached_disk,
                "remote": 0,
            },
            output_tokens_total=counters.output,
            evictions_total={tier.name.lower(): cache.evictions[tier] for tier in Tier},
            spills_total=counters.spills,
            spill_failures_total=counters.spill_failures,
            fetches_total=counters.fetches,
            verify_failures_total=dict(counters.verify_failures),
            tiers=tuple(
                TierReport(
                    tier=tier.name.lower(),
                    capacity_bytes=of.pool.capacity * block_bytes,
                    used_bytes=(of.pool.capacity - of.pool.free) * block_bytes,
                    blocks=of.pool.held,
                    leased_blocks=of.leased,
                    held_refs=of.refs,
                )
                for tier, of in cache.tiers.items()
            ),
            sessions=tuple(_session_report(lease, now) for lease in self._cache.leases()),
        )


def _session_report(lease: Lease, now: float) -> SessionReport:
    tokens_on = {tier.name.lower(): 0 for tier in Tier}
    for block in lease.blocks:
        for tier in block.places:
            tokens_on[tier.name.lower()] += len(block.tokens)
    return SessionReport(
        session=lease.session,
        session_class=lease.session_class.name.lower(),
        tokens=sum(len(block.tokens) for block in lease.blocks),
        idle_s=now - lease.idle_since,
        tokens_on=tokens_on,
    )


def _batch_of(chunks: list[Chunk]) -> Batch:
    """Lay the chunks' pending tokens end to end."""
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence.hold is not None
        begin, end = sequence.computed, sequence.computed + chunk.count
        segments.append(
            Segment(
                start=len(tokens),
                count=chunk.count,
                context=end,
                table=sequence.hold.table,
                sample=_samples(chunk),
            )
        )
        tokens += sequence.tokens[begin:end]
        positions += range(begin, end)
    return Batch(tokens, positions, segments)


def _samples(chunk: Chunk) -> bool:
    return chunk.count == chunk.sequence.pending and not chunk.sequence.prefill_only


def _sampling_state(sequence: Sequence) -> SamplingState:
    sampling = sequence.submit.sampling
    return SamplingState(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sequence.request if sampling.seed is None else sampling.seed,
        step=sequence.output_tokens,
    )
