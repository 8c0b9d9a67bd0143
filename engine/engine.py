"""The engine thread: owns the model, the arenas, the tables and every sequence; nobody else touches them.

One turn of the loop, on one screen in `_turn`:

    drain the inbox -> tick and write behind -> adopt -> admit and load -> plan -> run -> sample -> commit -> emit once

Laws
    Every accepted `Submit` ends in exactly one `Finished` or `Refused`, also when cancelled or when the engine stops.
    Outputs of one turn leave in one `emit` call, which may wait for the receiver: a producer that waits has no backlog.
    A load ends: landed, failed, or at its deadline. What did not come is computed, exactly that, and never waited for.
    An assertion that fails here escapes, ends the thread and so the daemon: wrong tables must not go on serving.

Disk work is posted to the disk threads and answered through the inbox; so are copies that a GPU makes beside the model,
while others are made at once.
This file knows neither trio nor transformers, and no tensor but the logits that it hands from runner to sampler.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import queue
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.adoption import WHILE_IDLE, WHILE_RUNNING, Adoption
from engine.api import (
    Answer,
    Began,
    CachedTokens,
    Cancel,
    Demote,
    DiskReport,
    EngineReport,
    Finished,
    FinishReason,
    Forget,
    Inspect,
    LeaseId,
    Locate,
    Located,
    Persist,
    Pin,
    PinReport,
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
from engine.canary import Canaries, Canary
from engine.copies import Copies
from engine.draft import Drafts
from engine.prefetch import Prefetches
from engine.reads import Reads
from engine.restore import Part, ReadsMeasured
from engine.sampler import Choice, SamplingState
from engine.sequence import Load, Phase, Sequence
from tiers.block import BlockKey, Copy, Drop, Fetch, Spill, StoreError, Tier
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
from tiers.ledger import FRESH
from tiers.policy import SessionClass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Seq

    import torch

    from engine.api import Command, Output, RequestId
    from engine.memory import Memory
    from engine.restore import RestoreCosts, RestoreLimits
    from engine.scheduler import Chunk, Scheduler
    from tiers.block import Action
    from tiers.cache import CacheStatistics, Hold, Lease, TieredCache
    from tiers.disk import DiskReader, DiskWriter
    from tiers.disk import Reply as DiskReply
    from tiers.index import Match
    from tiers.manifest import Manifest
    from tiers.store import IndexEntry

log = logging.getLogger(__name__)

# The tables' own check, run only while nothing else is to be done. It walks every block: 0.8 s at 70,000 (measured
# 2026-11), which a request that comes just then has to wait for.
CHECK_INTERVAL_S = 300.0
PROBE_S = 1.0  # how soon to look again whether a degraded disk takes blocks


class RunsBatches(Protocol):
    def run(self, batch: Batch) -> torch.Tensor: ...


class Samples(Protocol):
    def sample(self, logits: torch.Tensor, requests: Seq[SamplingState]) -> list[Choice]: ...


@dataclass(slots=True)
class Counters:
    """Totals since start; see `EngineReport`."""

    computed: int = 0
    cached_device: int = 0
    cached_host: int = 0
    cached_disk: int = 0
    output: int = 0
    drafts: Counter[str] = dataclasses.field(default_factory=Counter)  # {right|wrong: tokens}
    spills: int = 0
    fetches: int = 0
    to_host: int = 0  # blocks copied there
    from_host: int = 0  # and back to the device
    spill_failures: Counter[str] = dataclasses.field(default_factory=Counter)  # {reason: blocks}
    recomputed: Counter[str] = dataclasses.field(default_factory=Counter)  # {reason: prompt tokens}
    verify_failures: Counter[str] = dataclasses.field(default_factory=Counter)  # {reason: records}
    host_failures: Counter[str] = dataclasses.field(default_factory=Counter)  # {reason: blocks}


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
        costs: RestoreCosts,
        draft_tokens: int,
        restore: RestoreLimits,
        canaries: Canaries,
        records: int,
        stored_bytes: int,
        root: Callable[[bytes], BlockKey],
        max_context: int,
        vocab_size: int,
        clock: Callable[[], float],
        inbox: queue.SimpleQueue[Command | DiskReply | ReadsMeasured],
        adopted: Callable[[], None],
        make_way: Callable[[bool], int],
    ) -> None:
        """`adopted` is called once, when everything that is on disk is known. `make_way` is called before each step, and told
        whether blocks are being read beside it; it gives how many threads of the processor compute."""
        self._cache = cache
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._memory = memory
        self._writer = writer
        self._reader = reader
        self._costs = costs
        self._restore = restore
        self._canaries = canaries
        self._reads = Reads(
            lambda fetch: reader.fetch(fetch, memory.buffer(fetch)),
            max(1, restore.reading_bytes // memory.block_bytes),
        )
        self._copies = Copies()
        self._adoption = Adoption(records)
        self._stored_bytes = stored_bytes  # of a block on disk: compact ones are smaller
        self._root = root
        self._max_context = min(max_context, scheduler.context_limit)
        rates = costs.rates
        self._drafts = Drafts(
            most=draft_tokens,
            extra=rates.draft_s / rates.decode_s,
            block_tokens=cache.block_tokens,
            max_context=self._max_context,
        )
        self._vocab_size = vocab_size
        self._clock = clock
        self._inbox = inbox
        self._sequences: dict[RequestId, Sequence] = {}
        self._prefetches = Prefetches()
        self._lookups: dict[int, Sequence | Prefetch] = {}  # {ticket: who waits for the answer}
        self._tickets = itertools.count(1)  # of lookups
        self._forgetting: dict[Drop, tuple[int, bool]] = {}  # {last drop: (ticket, answer)}
        self._waiting_for_disk = 0  # asked of the disk, or of the copiers, and not yet answered
        self._next_lease = 1
        self._outputs: list[Output] = []
        self._answers: list[Answer] = []
        self._counters = Counters()
        self._next_check = clock() + CHECK_INTERVAL_S
        self._last_step = -math.inf  # when the model ran last
        self._stuck = (
            False  # nothing can go on before some message arrives: slots are on their way out or in
        )
        self._stopping = False
        cache.begin_adopting(records)
        self._adopted = adopted
        self._make_way = make_way
        self._compute_threads = 0  # of the last step
        if self._adoption.complete:
            self._end_adopting()

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
        self._release_all(self._prefetches.take_all(), now)
        self._flush(emit)
        self._await_disk()
        self._perform(self._cache.write_behind(self._clock(), all_dirty=True))
        self._await_disk()
        self._flush(emit)

    def _await_disk(self) -> None:
        while self._waiting_for_disk:
            self._receive(self._inbox.get())

    # -- one turn ----------------------------------------------------------------------------------------------------

    def _turn(self, emit: Callable[[Step], None]) -> None:
        self._drain()
        now = self._clock()
        self._perform(self._cache.tick(now))
        if not self._writer.refuses_blocks:
            self._perform(self._cache.write_behind(now))
        self._release_all(self._prefetches.take_ended(now), now)
        self._read_index(now)
        self._admit(now)
        self._begin_loaded(now)
        if chunks := self._make_place(self._scheduler.plan(), now):
            began = self._clock()
            decodes = sum(chunk.decodes for chunk in chunks)
            chunks = self._drafts.lengthen(chunks)
            batch = _batch_of(chunks)
            self._memory.fence(batch)
            # A step with prompts lasts many times as long as what is being read.
            self._compute_threads = self._make_way(
                decodes == len(chunks) and self._reads.reading > 0
            )
            logits = self._runner.run(batch)
            self._advance(chunks, logits, began)
            self._scheduler.took(decodes, len(chunks) - decodes, self._clock() - began)
        elif not self._scheduler.idle:
            self._stuck = True
            self._costs.idle()
            assert self._waiting_for_disk, "work waits, nothing runs, and no answer is due"
        else:
            self._costs.idle()
            if self._canaries:
                self._check_canary(self._canaries.take(), now)
            if now >= self._next_check:
                self._cache.check()
                self._next_check = now + CHECK_INTERVAL_S
        self._flush(emit)

    def _drain(self) -> None:
        """Take all that is there; wait for the first message only when nothing can run without one."""
        waits = self._stuck or self._scheduler.idle
        self._stuck = False
        try:
            if waits:
                self._receive(self._inbox.get(timeout=self._sleep_s()))
            while True:
                self._receive(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _sleep_s(self) -> float | None:
        if self._canaries and self._scheduler.idle:
            return 0.0
        now = self._clock()
        due = self._cache.next_event(now)
        if due is not None and self._writer.refuses_blocks:  # it may be for them
            due = max(due, now + PROBE_S)
        first = min(
            math.inf if due is None else due,
            self._prefetches.next_end(),
            self._adoption.due(),
            *(each.load.deadline for each in self._scheduler.loading if each.load is not None),
        )
        return None if first == math.inf else max(0.0, first - now)

    def _flush(self, emit: Callable[[Step], None]) -> None:
        if self._outputs or self._answers:
            step = Step(tuple(self._outputs), tuple(self._answers))
            self._outputs.clear()
            self._answers.clear()
            emit(step)

    # -- messages ----------------------------------------------------------------------------------------------------

    def _receive(self, message: Command | DiskReply | ReadsMeasured) -> None:
        now = self._clock()
        match message:
            case Submit():
                self._submit(message, now)
            case Cancel(request):
                if sequence := self._sequences.get(request):
                    self._finish(sequence, FinishReason.CANCELLED, now)
            case Prefetch():
                if not self._look_up(message.salt, message.prompt, message):
                    self._prefetch(message, now)
            case Reclass(lease, to):
                self._cache.reclass(lease, to, now)
            case Pin(ticket, salt, session, seconds):
                pinned = self._cache.pin(self._root(salt), session, now + seconds, now)
                granted = pinned * self._memory.block_bytes if pinned else None
                self._answers.append(Answer(ticket, granted))
            case Unpin(ticket, salt, session):
                existed = self._cache.unpin(self._root(salt), session, now)
                self._answers.append(Answer(ticket, existed))
            case Demote(ticket, to, session, salt):
                root = None if salt is None else self._root(salt)
                self._answers.append(Answer(ticket, self._demote(to, session, root, now)))
            case Persist(ticket, manifest):
                self._persist(ticket, manifest, now)
            case Inspect(ticket, sessions):
                self._answers.append(Answer(ticket, self._report(now, sessions=sessions)))
            case Locate(ticket, turns):
                self._answers.append(Answer(ticket, self._locate(turns, now)))
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
            case Forgotten():
                self._forgotten(message, now)
            case IndexSlice(entries, last):
                self._waiting_for_disk -= 1
                self._adopt(entries, now)
                self._adoption.read(last)
                if self._adoption.complete:
                    self._end_adopting()
            case IndexFailed():
                self._waiting_for_disk -= 1
                self._adoption.failed(now)
            case ChainFound(ticket, entries):
                self._waiting_for_disk -= 1
                self._adopt(entries, now)
                self._looked_up(self._lookups.pop(ticket), now)
            case ReadsMeasured(latency_s, read_s):
                self._costs.calibrate_reads(latency_s, read_s)
            case Rotten(key):
                self._perform(self._cache.rotten(key, now))

    def _end_adopting(self) -> None:
        self._cache.end_adopting()
        self._adopted()

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
            sequence.looking_up = self._look_up(submit.salt, prompt, sequence)

    def _refuse(self, submit: Submit, reason: RefuseReason, message: str) -> None:
        self._outputs.append(Refused(submit.request, reason, message))

    def _prefetch(self, prefetch: Prefetch, now: float) -> None:
        """Bring whole blocks only: a private copy of a partial one would serve nobody."""
        match = self._cache.match(self._root(prefetch.salt), prefetch.prompt)
        whole = dataclasses.replace(
            match, partial=None, partial_rows=0, tokens=match.tokens - match.partial_rows
        )
        if self._stopping or not whole.blocks or self._prefetches.covers(whole):
            return
        found = _found(whole)
        reads_disk = any(part.tier is Tier.DISK for part in found)
        may_read = self._scheduler.may_read() and (
            self._prefetches.reading < self._restore.max_loading
        )
        if reads_disk and (not may_read or self._worth(found, len(prefetch.prompt)) < len(found)):
            return
        hold = self._cache.acquire(whole, now)
        actions = self._cache.load(hold, now)
        if actions is None:  # a guess about the future evicts nobody who is likely to come himself
            needed = self._cache.slots_to_load(hold)
            self._perform(self._cache.make_room(needed, now, below=SessionClass.TOOL_WAIT))
            actions = self._cache.load(hold, now)
        if actions is None:
            self._cache.release(hold, now)
            return
        self._prefetches.add(hold, now, reads_disk=reads_disk)
        self._perform(actions)

    def _release_all(self, holds: Iterable[Hold], now: float) -> None:
        """What is still on its way lands all the same; nobody is kept waiting by it."""
        for hold in holds:
            self._cache.release(hold, now)
        self._withdraw(now)

    def _demote(self, to: Tier, session: str | None, root: BlockKey | None, now: float) -> int:
        """How many blocks left a tier above `to`, or will once they are written."""
        before = self._held_above(to)
        actions = self._cache.demote(to, session, now, root=root)
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
                self._reads.answered()
            case Spill():
                try:
                    self._memory.confirm(action)
                except StoreError as error:  # it changed on the way: the record is sound, and wrong
                    self._perform([Drop(action.key)])
                    self._refused_by_memory(action, error.reason, now)
                    return
                self._counters.spills += 1
            case Drop():
                self._dropped(action)
            case Copy():
                self._copied(now)
        self._cache.landed(action, now)

    def _failed(self, action: Action, reason: str, now: float) -> None:
        self._waiting_for_disk -= 1
        match action:
            case Fetch():
                self._memory.abandon(action)
                self._counters.verify_failures[reason] += 1
                self._reads.answered()
            case Spill():
                self._counters.spill_failures[reason] += 1
            case Drop():
                self._dropped(action)
            case Copy():
                self._copied(now)
                self._refused_by_memory(action, reason, now)
                return
        self._perform(self._cache.failed(action, now, reason))

    def _refused_by_memory(self, action: Copy | Spill, reason: str, now: float) -> None:
        """A slot on the host does not hold what was put there: it is given up, and what waited for it goes on without."""
        name, slot = action.key.hex()[:16], action.source_slot
        log.error("block %s is not used: host slot %d is not what it was (%s)", name, slot, reason)
        self._counters.host_failures[reason] += 1
        self._perform(self._cache.failed(action, now, reason))

    def _dropped(self, drop: Drop) -> None:
        if forgetting := self._forgetting.pop(drop, None):
            self._answers.append(Answer(*forgetting))

    def _forgotten(self, reply: Forgotten, now: float) -> None:
        """The response is gone; its KV goes too, and then the answer."""
        actions = (
            self._cache.forget_chain(
                [BlockKey(key) for key in reply.keys],
                {BlockKey(key) for key in reply.shared_keys},
                now,
            )
            if reply.keys
            else []
        )
        self._perform(actions)
        drops = [action for action in actions if isinstance(action, Drop)]
        self._waiting_for_disk -= 1
        if drops:  # the writer keeps their order
            self._forgetting[drops[-1]] = (reply.ticket, reply.existed)
        else:
            self._answers.append(Answer(reply.ticket, reply.existed))

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
                    self._copy(action)
                case Spill():
                    if self._writer.refuses_blocks:
                        self._counters.spill_failures["degraded"] += 1
                        self._cache.failed(action, self._clock(), "full")
                        continue
                    try:
                        spills.append((action, self._memory.payload(action)))
                    except StoreError as error:
                        self._refused_by_memory(action, error.reason, self._clock())
                case Fetch():
                    self._waiting_for_disk += 1
                    self._reads.add(action)
                case Drop():
                    self._waiting_for_disk += 1
                    self._writer.drop(action)
        if spills and self._writer.offer_blocks(
            tuple(spills), manifest, ticket, ready=self._memory.arrival()
        ):
            self._waiting_for_disk += len(spills)
            return
        for (
            spill,
            _,
        ) in spills:  # the writer is behind: these blocks stay dirty, or are forgotten when their slot is needed
            self._counters.spill_failures["behind"] += 1
            self._cache.failed(spill, self._clock(), "full")
        if manifest is not None:
            self._writer.persist(manifest, ticket)

    def _copy(self, action: Copy) -> None:
        began = self._clock()
        try:
            is_there = self._memory.copy(action)
        except StoreError as error:
            self._refused_by_memory(action, error.reason, self._clock())
            return
        if not is_there:
            self._waiting_for_disk += 1
            self._copies.began(began)
            return
        landed = self._clock()
        self._cache.landed(action, landed)
        if action.source is Tier.HOST:
            self._counters.from_host += 1
            self._costs.observe_copies(1, landed - began)
        elif action.target is Tier.HOST:
            self._counters.to_host += 1

    def _copied(self, now: float) -> None:
        """One that took its time was answered. Beside steps of the model it would be their length that is measured."""
        ended = self._copies.ended()
        if ended is not None and self._last_step < ended[1]:
            self._costs.observe_copies(ended[0], now - ended[1])

    # -- learning what the disk holds --------------------------------------------------------------------------------

    def _read_index(self, now: float) -> None:
        if now >= self._adoption.due() and not self._stopping:
            self._waiting_for_disk += 1
            slice_entries = WHILE_IDLE if self._scheduler.idle else WHILE_RUNNING
            self._reader.read_index(self._adoption.ask(), slice_entries)

    def _adopt(self, entries: Iterable[IndexEntry], now: float) -> None:
        self._perform(self._cache.adopt(entries, now))

    def _look_up(self, salt: bytes, prompt: tuple[int, ...], asker: Sequence | Prefetch) -> bool:
        """Before all of the index is known: ask the disk what it has of a prompt. False: no need."""
        if self._adoption.complete:
            return False
        ticket = next(self._tickets)
        self._lookups[ticket] = asker
        self._waiting_for_disk += 1
        self._reader.find_chain(ticket, self._root(salt), prompt)
        return True

    def _looked_up(self, asker: Sequence | Prefetch, now: float) -> None:
        match asker:
            case Sequence():
                asker.looking_up = False
            case Prefetch():
                self._prefetch(asker, now)

    # -- admission and loading ---------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        while (sequence := self._scheduler.admissible()) is not None:
            match = self._cache.match(self._root(sequence.submit.salt), tuple(sequence.tokens))
            found = _found(match)
            parts = self._worth(found, len(sequence.tokens))
            sequence.reads_disk = any(part.tier is Tier.DISK for part in found[:parts])
            if sequence.reads_disk and not self._scheduler.may_read():
                continue  # passed over from now on, until somebody's load is done
            if not self._start_loading(sequence, match, found[:parts], now):
                return

    def _worth(self, found: list[Part], tokens: int) -> int:
        """How many of the leading parts to restore."""
        if not self._restore.decide:
            return len(found)
        return self._costs.choose(found, tokens, self._reads.queued)

    def _start_loading(
        self, sequence: Sequence, match: Match, found: list[Part], now: float
    ) -> bool:
        """False, and nothing has changed, when slots are held by others, or their bytes are still on the way out."""
        supersedes = sequence.submit.supersedes
        reasons = self._cache.explain(match, tuple(sequence.tokens), supersedes=supersedes)
        hold = self._cache.acquire(match, now, supersedes=supersedes)
        refused = len(hold.found) - len(found)
        if refused:
            self._cache.forgo(hold, min(len(found), len(match.blocks)), "loss", now)
        actions = self._cache.load(hold, now)
        if actions is None:
            self._make_room(self._cache.slots_to_load(hold), now)
            actions = self._cache.load(hold, now)
        if actions is None:
            self._cache.release(hold, now)
            return False
        if refused:
            self._costs.forgive()
        self._scheduler.start_loading(sequence)
        sequence.hold = hold
        sequence.load = self._load_of(found, now)
        if not sequence.began:
            sequence.recomputed = reasons
        began = self._clock()
        if sequence.load_started is None:
            sequence.load_started = began
        self._perform(actions)
        if not sequence.began and any(_from_host(action) for action in actions):
            sequence.copied_s += self._clock() - began
        for ahead in self._prefetches.holds:
            self._cache.credit(hold, ahead)
        self._release_all(self._prefetches.take_served(hold), now)
        return True

    def _load_of(self, found: list[Part], now: float) -> Load:
        """What to expect. Others' reads come first, and some of them may bring what this one waits for too."""
        own = sum(part.tier is Tier.DISK for part in found)
        copies = sum(part.tier is Tier.HOST for part in found)
        reads = self._reads.queued + own
        predicted = self._costs.copy_s(copies) + self._costs.read_s(reads)
        deadline = now + self._restore.deadline * predicted + self._restore.floor_s
        return Load(began=now, deadline=deadline, reads=reads if own else 0)

    def _begin_loaded(self, now: float) -> None:
        late = False
        for sequence in list(self._scheduler.loading):
            hold, load = sequence.hold, sequence.load
            assert hold is not None
            assert load is not None
            if not self._cache.ready(hold):
                if now < load.deadline:
                    continue
                log.warning(
                    "a restore of %d blocks took longer than %.3f s: computing what is missing",
                    len(hold.blocks),
                    now - load.began,
                )
                self._cache.give_up(hold, now)
                late = True
                self._costs.observe_reads(load.reads, now - load.began)
            elif load.reads and self._last_step < load.began:
                # Beside steps of the model it would be their length that is measured.
                self._costs.observe_reads(load.reads, now - load.began)
            self._scheduler.start_running(sequence)
            sequence.load = None
            sequence.holes = hold.todo
            sequence.computed = hold.matched_tokens
            if not sequence.began:
                self._begin(sequence, hold, now)
        if late:
            self._withdraw(now)

    def _begin(self, sequence: Sequence, hold: Hold, now: float) -> None:
        sequence.began = True
        sequence.loaded(self._clock())  # copies were made since
        sequence.cached = CachedTokens(
            device=hold.by_tier.get(Tier.DEVICE, 0),
            host=hold.by_tier.get(Tier.HOST, 0),
            disk=hold.by_tier.get(Tier.DISK, 0),
        )
        sequence.recomputed = dict(Counter(sequence.recomputed) + hold.missed)
        self._counters.cached_device += sequence.cached.device
        self._counters.cached_host += sequence.cached.host
        self._counters.cached_disk += sequence.cached.disk
        self._counters.recomputed.update(sequence.recomputed)
        self._outputs.append(Began(sequence.request, sequence.cached))
        size = self._cache.block_tokens
        for at, (block, (tier, reused)) in enumerate(zip(hold.blocks, hold.found, strict=False)):
            if tier is not Tier.DEVICE and reused and self._canaries.chosen():
                tokens = tuple(sequence.tokens[: (at + 1) * size])
                self._canaries.add(Canary(hold.root, tokens, block.key))

    def _withdraw(self, now: float) -> None:
        """Spare the disk what nobody waits for any more: its slots are free at once."""
        if not self._reads.waiting:
            return
        holds = [s.hold for s in self._scheduler.loading if s.hold is not None]
        wanted = {block.key for hold in (*holds, *self._prefetches.holds) for block in hold.blocks}
        wanted |= {hold.flight.block.key for hold in holds if hold.flight is not None}
        for fetch in self._reads.withdraw_all_but(wanted):
            self._waiting_for_disk -= 1
            self._perform(self._cache.failed(fetch, now, "io"))

    def _make_place(self, chunks: list[Chunk], now: float) -> list[Chunk]:
        """Give every chunk the private slots it writes; preempt the latest starter when the device is truly full."""
        placed: list[Chunk] = []
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.phase is not Phase.RUNNING:  # preempted for an earlier chunk
                continue
            if self._lend(sequence, chunk.end, now):
                placed.append(chunk)
        return [chunk for chunk in placed if chunk.sequence.phase is Phase.RUNNING]

    def _lend(self, sequence: Sequence, end: int, now: float) -> bool:
        """Slots for its tokens up to `end`."""
        hold = sequence.hold
        assert hold is not None
        while not self._cache.lend(hold, end, now):
            self._make_room(self._cache.missing_slots(hold, end), now)
            if self._cache.lend(hold, end, now):
                break
            victim = self._scheduler.victim(sequence)
            if (
                victim is None
            ):  # its slots are on the way out, or being loaded by others: try again next turn
                return False
            self._preempt(victim, now)
        return True

    def _make_room(self, slots: int, now: float) -> None:
        """Evict until so many slots are free, or nothing more can go now. Each landed copy may let the next go.

        Rather than that a request waits, nothing is kept for one that may come.
        """
        while (free := self._cache.free_slots) < slots:
            actions = self._cache.make_room(slots, now)
            self._perform(actions)
            if not actions and self._cache.free_slots == free:
                if not (guesses := self._prefetches.take_all()):
                    return
                self._release_all(guesses, now)

    def _preempt(self, sequence: Sequence, now: float) -> None:
        """Give its slots back; what it computed stays cached as long as there is room, so it loses little."""
        assert sequence.hold is not None
        self._cache.release(sequence.hold, now)
        sequence.hold = None
        sequence.computed = 0
        sequence.holes = []
        self._scheduler.preempt(sequence)

    # -- after the step ----------------------------------------------------------------------------------------------

    def _advance(self, chunks: list[Chunk], logits: torch.Tensor, began: float) -> None:
        """Commit what was computed, then append what was sampled; finish those that are done."""
        samplers = [chunk for chunk in chunks if chunk.samples]
        states = [state for chunk in samplers for state in _sampling_states(chunk)]
        choices = iter(self._sampler.sample(logits, states) if states else ())
        said = {
            chunk.sequence: _agreed(chunk, list(itertools.islice(choices, 1 + len(chunk.draft))))
            for chunk in samplers
        }
        now = self._last_step = self._clock()
        self._costs.observe_step(
            [(chunk.begin, chunk.end) for chunk in chunks], began, now, settled=bool(samplers)
        )
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.hold is not None
            right = len(said[sequence]) - 1 if chunk.samples else 0
            fed = (*sequence.tokens[chunk.begin : chunk.end], *chunk.draft[:right])
            self._cache.commit(sequence.hold, fed, now)
            self._counters.computed += len(fed)
            sequence.advance(chunk.end)
            if chunk.decodes:
                sequence.draft.judge(len(chunk.draft), right)
                self._counters.drafts["right"] += right
                self._counters.drafts["wrong"] += len(chunk.draft) - right
            if sequence.prefill_only and sequence.pending == 0:
                self._finish(sequence, FinishReason.LENGTH, now)
        for sequence, chosen in said.items():
            self._append(sequence, chosen, now)

    def _append(self, sequence: Sequence, chosen: list[Choice], now: float) -> None:
        """What it says in this step. Only the newest can be the end: drafts stop before one."""
        tokens = tuple(choice.token for choice in chosen)
        token = tokens[-1]
        matcher = sequence.submit.matcher
        if matcher is not None and not matcher.accept(token):
            log.error("request %d leaves its grammar: %s", sequence.request, matcher.fault)
            self._finish(sequence, FinishReason.FAILED, now)
            return
        sequence.say(tokens)
        self._counters.output += len(tokens)
        if sequence.first_sampled is None:
            sequence.first_sampled = now
        likelihoods = tuple(c.likelihood for c in chosen if c.likelihood is not None)
        self._outputs.append(Sampled(sequence.request, tokens, likelihoods))
        sampling = sequence.submit.sampling
        if token in sampling.stop_ids or (matcher is not None and matcher.complete):
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
                sequence.hold,
                lease,
                sequence.submit.session,
                now,
                sequence.submit.supersedes,
                keep_until=now + sequence.submit.keep_s if sequence.submit.keep_s > 0 else 0.0,
            )
        elif sequence.hold is not None:  # cancelled while loading
            self._release_all([sequence.hold], now)
        if not sequence.began:
            self._outputs.append(Began(sequence.request, sequence.cached))
        self._outputs.append(Finished(sequence.request, reason, sequence.usage(now), lease, keys))

    # -- checking what was restored -------------------------------------------------------------------------------

    def _check_canary(self, canary: Canary, now: float) -> None:
        """Compute a restored block again, behind the same blocks, into a slot of nobody's, and compare."""
        tokens, size = canary.tokens, self._cache.block_tokens
        match = self._cache.match(canary.root, (*tokens, 0))
        on_device = all(part.tier is Tier.DEVICE for part in _found(match))
        if match.tokens != len(tokens) or not on_device or self._cache.free_slots < 2:
            self._canaries.skip()
            return
        hold = self._cache.acquire(match, now)
        loaded = self._cache.load(hold, now) == []
        if loaded and self._cache.ready(hold) and self._cache.lend(hold, len(tokens) + 1, now):
            *table, found, spare = hold.table
            segment = Segment(0, size, len(tokens), (*table, spare), logits=0)
            positions = range(len(tokens) - size, len(tokens))
            batch = Batch(tokens[-size:], positions, [segment])
            self._memory.fence(batch)
            self._runner.run(batch)
            self._cache.release(hold, now)
            if not self._canaries.judge(canary, self._memory.distance(found, spare)):
                for tier in Tier:
                    self._perform(self._cache.rotten(canary.key, now, tier))
        else:
            self._cache.release(hold, now)
            self._canaries.skip()

    # -- reports -----------------------------------------------------------------------------------------------------

    def _locate(
        self, turns: Iterable[tuple[LeaseId | None, tuple[bytes, ...]]], now: float
    ) -> tuple[Located, ...]:
        leases = {lease.id: lease for lease in self._cache.leases()}
        pins = self._cache.pins(now)
        found: list[Located] = []
        for lease_id, keys in turns:
            places = self._cache.whereabouts(map(BlockKey, keys))
            tokens_on = {tier.name.lower(): places[tier] for tier in Tier}
            lease = None if lease_id is None else leases.get(lease_id)
            if lease is None:
                found.append(Located(tokens_on))
                continue
            pinned = pins.get((lease.root, lease.session))
            found.append(
                Located(
                    tokens_on,
                    session_class=lease.session_class.name.lower(),
                    idle_s=now - lease.idle_since,
                    pinned_s=None if pinned is None else pinned[0] - now,
                )
            )
        return tuple(found)

    def _report(self, now: float, *, sessions: bool) -> EngineReport:
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
            evictions_total={
                tier.name.lower(): sum(cache.evictions[tier].values()) for tier in Tier
            },
            spills_total=counters.spills,
            spill_failures_total=counters.spill_failures.total(),
            spill_failures_by_reason=dict(counters.spill_failures),
            spilled_total={"host": counters.to_host, "disk": counters.spills},
            restored_total={"host": counters.from_host, "disk": counters.fetches},
            fetches_total=counters.fetches,
            verify_failures_total=dict(counters.verify_failures),
            tiers=tuple(
                TierReport(
                    tier=tier.name.lower(),
                    capacity_bytes=of.pool.capacity * size,
                    used_bytes=(of.pool.capacity - of.pool.free) * size,
                    blocks=of.pool.held,
                    leased_blocks=of.leased,
                    held_refs=of.refs,
                    block_bytes=size,
                    classes={one.name.lower(): of.classes[one] for one in SessionClass},
                )
                for tier, of in cache.tiers.items()
                for size in (self._stored_bytes if tier is Tier.DISK else block_bytes,)
            ),
            sessions=tuple(
                _session_report(lease, now) for lease in (self._cache.leases() if sessions else ())
            ),
            recomputed_total=dict(counters.recomputed),
            amplification=_amplification(counters.recomputed),
            hit_share=_hit_share(counters),
            compute_threads=self._compute_threads,
            eviction_causes={tier.name.lower(): dict(cache.evictions[tier]) for tier in Tier},
            disk=self._disk_report(cache, now),
            host_failures_total=dict(counters.host_failures),
            canary=self._canaries.report(),
            pins=tuple(
                PinReport(session, blocks * block_bytes, until - now)
                for (_, session), (until, blocks) in self._cache.pins(now).items()
            ),
            rates=self._costs.rates.as_dict(),
            drafts_total=dict(counters.drafts),
        )

    def _disk_report(self, cache: CacheStatistics, now: float) -> DiskReport:
        tier, writer = cache.tiers[Tier.DISK], self._writer.statistics()
        dirty_since = cache.oldest_dirty
        new_blocks = self._counters.computed / self._cache.block_tokens
        return DiskReport(
            state=writer.state.value if tier.pool.capacity else "off",
            reason=writer.reason,
            index_complete=self._adoption.complete,
            records=tier.pool.held,
            pending_bytes=writer.pending_bytes,
            reading=self._reads.reading,
            degraded_s=writer.degraded_s,
            failures_total=writer.failures,
            commits_total=writer.batches,
            commit_s_total=writer.commit_total_s,
            oldest_read_s=writer.oldest_read_s,
            writer_lag_s=writer.lag_s,
            oldest_dirty_s=0.0 if dirty_since is None else max(0.0, now - dirty_since),
            written_bytes_total=writer.written_bytes,
            new_bytes_total=int(new_blocks * self._stored_bytes),
            reads_total=self._reader.reads(),
        )


def _amplification(recomputed: Counter[str]) -> float:
    fresh = sum(recomputed[reason] for reason in FRESH)
    return recomputed.total() / fresh if fresh else 1.0


def _hit_share(counters: Counters) -> float:
    reused = counters.cached_device + counters.cached_host + counters.cached_disk
    again = counters.recomputed.total() - sum(counters.recomputed[reason] for reason in FRESH)
    return reused / (reused + again) if reused + again else 1.0


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


def _from_host(action: Action) -> bool:
    return isinstance(action, Copy) and action.source is Tier.HOST


def _found(match: Match) -> list[Part]:
    """The matched blocks, and the rows of the one behind them that matched in part."""
    parts = [(block, len(block.tokens)) for block in match.blocks]
    if match.partial is not None:
        parts.append((match.partial, match.partial_rows))
    return [
        Part(Tier.DEVICE, tokens, arriving=True)
        if Tier.DEVICE in block.arriving
        else Part(min(block.places), tokens)
        for block, tokens in parts
    ]


def _batch_of(chunks: list[Chunk]) -> Batch:
    """Lay the chunks' pending tokens end to end."""
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence.hold is not None
        segments.append(
            Segment(
                start=len(tokens),
                count=chunk.count,
                context=chunk.begin + chunk.count,
                table=sequence.hold.table,
                logits=1 + len(chunk.draft) if chunk.samples else 0,
            )
        )
        tokens += (*sequence.tokens[chunk.begin : chunk.end], *chunk.draft)
        positions += range(chunk.begin, chunk.begin + chunk.count)
    return Batch(tokens, positions, segments)


def _agreed(chunk: Chunk, choices: list[Choice]) -> list[Choice]:
    """Of a chunk's tokens: those that were sampled as they were drafted, and the first that was not, or was not drafted."""
    right = 0
    while right < len(chunk.draft) and choices[right].token == chunk.draft[right]:
        right += 1
    return choices[: right + 1]


def _sampling_states(chunk: Chunk) -> list[SamplingState]:
    """Of the next token, and of each that would follow if the draft before it were right."""
    state = _sampling_state(chunk.sequence)
    return [dataclasses.replace(state, step=state.step + at) for at in range(1 + len(chunk.draft))]


def _sampling_state(sequence: Sequence) -> SamplingState:
    sampling = sequence.submit.sampling
    return SamplingState(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sequence.request if sampling.seed is None else sampling.seed,
        step=sequence.output_tokens,
        matcher=sequence.submit.matcher,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        said=sequence.tokens[sequence.prompt_tokens :] if sampling.penalises else (),
        top_logprobs=sampling.top_logprobs,
    )
