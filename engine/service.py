"""The trio side of the engine: owns its threads in nurseries, and turns commands and outputs into awaits and channels.

    open_engine
      disk threads     one writer, several readers: `to_thread` each, for the engine's whole life
        engine thread  one `to_thread`, shielded: it ends by `Stop` in its inbox, never by cancellation
          caller       `async with service.generate(submit) as outputs`

Leaving the inner level stops the engine first (it cancels what runs and spills what is dirty), then the disk.
The engine's `emit` is a rendezvous: `from_thread.run_sync`, one call per step, so it cannot run ahead of trio.
"""

from __future__ import annotations

import functools
import itertools
import logging
import random
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
import trio

from engine import calibrate, paged_cpu
from engine.api import (
    Cancel,
    Demote,
    EngineReport,
    Finished,
    Forget,
    Inspect,
    Locate,
    Output,
    Persist,
    Pin,
    Prefetch,
    Reclass,
    Refused,
    RequestId,
    Stop,
    Unpin,
)
from engine.canary import Canaries
from engine.constraint import ConstraintRefused, first_at
from engine.cores import Cores
from engine.engine import Engine
from engine.grammar import Grammars, Matcher
from engine.memory import Memory
from engine.model import LoadedModel, LoadSpec, load
from engine.restore import Rates, ReadsMeasured, RestoreCosts, RestoreLimits
from engine.runner import Runner
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.text import Text
from engine.transfers import Transfers
from tiers.arena import Arena
from tiers.block import StoreError, Tier, root_key
from tiers.cache import TieredCache
from tiers.codec import codec
from tiers.disk import DiskReader, DiskWriter, Scrubber
from tiers.inspection import inspecting
from tiers.lmdb_store import LmdbStore
from tiers.policy import SessionClass, policy_named
from tiers.state_dir import StateDir
from tiers.store import Durability, StoreLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping
    from pathlib import Path

    from engine.api import Command, LeaseId, Located, Step, Submit
    from engine.constraint import Constraint
    from engine.grammar import Compiled
    from tiers.block import TokenIds
    from tiers.disk import ReadCommand, Reply
    from tiers.manifest import Manifest
    from tiers.policy import Limits, PolicyName

log = logging.getLogger(__name__)

# Of the loop: a step's turns wake, then those who write to their sockets, and one more: trio runs in any order.
_EVENT_PASSES = 3
_EVENTS_S = 0.004  # three passes of a loop that keeps up take under 1 ms (measured)

MIN_DEVICE_SLOTS = 4  # fewer cannot hold a prompt, its copy of a shared tail and the next block


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Everything the engine is built from. Capacities are bytes; a tier too small for one block is off."""

    state_dir: Path
    model_path: str | None  # None: the model embedded in the wheel
    model_name: str
    device: str  # auto, cpu, cuda
    dtype: str  # auto, float32, bfloat16
    kv_dtype: str  # auto, or one that LoadSpec knows
    prefill_dtype: str
    block_tokens: int
    step_tokens: int
    mixed_tokens: int
    prefill_share: float
    draft_tokens: int
    max_running: int
    max_waiting: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    limits: Limits
    readers: int
    threads: int | None = None  # torch threads; None: torch decides
    manifest_bytes: int = field(default=256 << 20)
    restore: RestoreLimits = field(default_factory=RestoreLimits)
    canary: float = 0.0  # fraction of restored blocks that are recomputed and compared
    policy: PolicyName = "session_lru"
    compact: str = "off"  # the codec of blocks on disk
    durability: Durability = Durability.POWER
    min_free_bytes: int = 0  # of the file system: with less, no block is written
    scrub_bytes_s: int = 0  # how fast the disk is read through in the background; 0: it is not
    grammar_timeout_s: float = 5.0  # to compile one; then the request is refused


def _nothing() -> None: ...


class EngineService:
    """What the broker knows of the engine. Every method but `emit` belongs to the trio thread."""

    def __init__(self, parts: _Parts) -> None:
        self.text = parts.text
        self.model_name = parts.name
        self.max_context = parts.engine.max_context
        self._inbox = parts.inbox
        self._scrubber = parts.scrubber
        self._shares_cores = parts.transfers is None
        self._store = parts.store
        self._clock = parts.clock
        self._requests = itertools.count(1)
        self._tickets = itertools.count(1)
        self._channels: dict[
            RequestId, tuple[trio.MemorySendChannel[Output], Callable[[], None]]
        ] = {}
        self._replies: dict[int, trio.MemorySendChannel[object]] = {}
        self._lookups = trio.CapacityLimiter(4)  # LMDB reads beside the block readers
        self._grammars = Compiling(parts.grammars, parts.grammar_timeout_s)

    def new_request(self) -> RequestId:
        return RequestId(next(self._requests))

    @asynccontextmanager
    async def generate(
        self, submit: Submit, ended: Callable[[], None] = _nothing
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Output]]:
        """Run one generation; the channel closes after `Finished` or `Refused`. Leaving before that cancels it.

        The buffer holds everything a request can say, so the engine never waits for a slow reader; `ended` is called when
        the last of it is there, read or not.
        Raises ConstraintRefused, before anything else happened.
        """
        if submit.sampling.constraint is not None:
            matcher = await self._grammars.matcher(submit.sampling.constraint)
            submit = replace(submit, matcher=matcher)
        send, receive = trio.open_memory_channel[Output](submit.sampling.max_tokens + 4)
        self._channels[submit.request] = send, ended
        self._inbox.put(replace(_seeded(submit), at=self._clock()))
        try:
            yield receive
        finally:
            if self._channels.pop(submit.request, None) is not None:
                self._inbox.put(Cancel(submit.request))
            send.close()
            receive.close()

    def token_bytes(self, token: int) -> bytes:
        """What an id stands for: not always whole characters."""
        return self._grammars.token_bytes(token)

    def cancel(self, request: RequestId) -> None:
        """Stop sampling; the request still ends in `Finished`."""
        self._inbox.put(Cancel(request))

    def reclass(self, lease: LeaseId, to: SessionClass) -> None:
        self._inbox.put(Reclass(lease, to))

    def prefetch(self, salt: bytes, prompt: TokenIds) -> None:
        self._inbox.put(Prefetch(salt, prompt))

    async def pin(self, salt: bytes, session: str, seconds: float) -> int | None:
        """Protect a session's blocks for a time; the bytes granted, None if it is unknown or over the quota."""
        granted = await self._ask(lambda ticket: Pin(ticket, salt, session, seconds))
        assert granted is None or isinstance(granted, int)
        return granted

    async def unpin(self, salt: bytes, session: str) -> bool:
        """End a pin; False if there was none."""
        return bool(await self._ask(lambda ticket: Unpin(ticket, salt, session)))

    async def demote(self, to: Tier, session: str | None, salt: bytes | None = None) -> int:
        """Move a session down, or all; with a `salt` that tenant's. How many blocks moved."""
        moved = await self._ask(lambda ticket: Demote(ticket, to, session, salt))
        assert isinstance(moved, int)
        return moved

    async def inspect(self, *, sessions: bool = True) -> EngineReport:
        """The engine's report. Without its sessions it costs less."""
        report = await self._ask(lambda ticket: Inspect(ticket, sessions))
        assert isinstance(report, EngineReport)
        if self._scrubber is None:
            return report
        scrubbed = self._scrubber.statistics()
        disk = replace(
            report.disk,
            scrubbed_total=scrubbed.records,
            rotten_total=sum(scrubbed.bad.values()),
        )
        return replace(report, disk=disk)

    async def locate(
        self, turns: Iterable[tuple[LeaseId | None, tuple[bytes, ...]]]
    ) -> tuple[Located, ...]:
        """For each turn, given by its lease and its chain's keys, what is known of its KV."""
        asked = tuple(turns)
        found = await self._ask(lambda ticket: Locate(ticket, asked))
        assert isinstance(found, tuple)
        return found

    async def persist(self, manifest: Manifest) -> None:
        """Return once the manifest is on disk. Raises StoreError if the disk refused it."""
        reason = await self._ask(lambda ticket: Persist(ticket, self._stamped(manifest)))
        if reason is not None:
            raise StoreError(
                str(reason), f"manifest {manifest.response_id} was not stored: {reason}"
            )

    def persist_later(self, manifest: Manifest) -> None:
        self._inbox.put(Persist(None, self._stamped(manifest)))

    async def forget_response(self, tenant: str, response_id: str) -> bool:
        """Delete a stored response, and its KV from every tier; False if there was none.

        Raises StoreError if the disk could not.
        """
        existed = await self._ask(lambda ticket: Forget(ticket, tenant, response_id))
        if isinstance(existed, str):
            raise StoreError(existed, f"response {response_id} was not deleted: {existed}")
        return bool(existed)

    async def find_response(self, tenant: str, response_id: str) -> Manifest | None:
        return await self._look_up(self._store.find_response, tenant, response_id)

    async def find_item(self, tenant: str, item_id: str) -> Manifest | None:
        return await self._look_up(self._store.find_item, tenant, item_id)

    async def find_content(self, tenant: str, digest: bytes) -> Manifest | None:
        return await self._look_up(self._store.find_content, tenant, digest)

    async def find_session(self, tenant: str, session: str) -> Manifest | None:
        """The newest response of a session, stored or not."""
        return await self._look_up(self._store.find_session, tenant, session)

    async def responses_of(self, tenant: str, session: str) -> list[str]:
        """Every response of a session that is on disk, stored or not. Raises StoreError if the disk cannot say."""
        return await trio.to_thread.run_sync(
            self._store.responses_of, tenant, session, limiter=self._lookups
        )

    def emit(self, step: Step) -> None:
        """Called on the engine thread: hand one step over to the trio thread, and wait until it is taken."""
        if self._shares_cores:
            trio.from_thread.run(self._hand_over, step)
        else:
            trio.from_thread.run_sync(self._deliver, step)

    async def _hand_over(self, step: Step) -> None:
        """Where the model computes on the loop's own cores, its next step would hold these events up: they go first. But
        where the loop has more to do than it can, the streams do not wait for all of that."""
        self._deliver(step)
        enough = trio.current_time() + _EVENTS_S
        for _ in range(_EVENT_PASSES):
            await trio.lowlevel.checkpoint()
            if trio.current_time() > enough:
                break

    def _deliver(self, step: Step) -> None:
        for output in step.outputs:
            send, ended = self._channels.get(output.request, (None, _nothing))
            if send is None:  # the caller left, so nobody will hand its lease back
                if isinstance(output, Finished) and output.lease is not None:
                    self.reclass(output.lease, SessionClass.CLOSED)
                continue
            send.send_nowait(output)
            if isinstance(output, Finished | Refused):
                del self._channels[output.request]
                send.close()
                ended()
        for answer in step.answers:
            reply = self._replies.pop(answer.ticket, None)
            if reply is not None:
                reply.send_nowait(answer.value)

    async def _ask(self, command: Callable[[int], Any]) -> object:
        ticket = next(self._tickets)
        send, receive = trio.open_memory_channel[object](1)
        self._replies[ticket] = send
        try:
            self._inbox.put(command(ticket))
            return await receive.receive()
        finally:
            self._replies.pop(ticket, None)

    async def _look_up(self, find: Callable[..., Manifest | None], *key: object) -> Manifest | None:
        """A damaged manifest is a forgotten one, and so is one whose tokens are another tokenizer's.

        One without tokens means the same to every tokenizer.
        """
        try:
            found = await trio.to_thread.run_sync(find, *key, limiter=self._lookups)
        except StoreError as error:
            log.warning("a manifest is not used: %s: %s", error.reason, error)
            return None
        if found is None or (found.tokens and found.text != self.text.digest):
            return None
        return found

    def _stamped(self, manifest: Manifest) -> Manifest:
        return replace(manifest, text=self.text.digest)


class Compiling:
    """Constraints to matchers: off the event loop and off the engine's thread, each grammar once, with a deadline.

    The library cannot be interrupted: a compilation that was given up goes on to its end, in one of two places. Its
    limits end it; until then others have the second place, or their own deadline.
    """

    def __init__(self, grammars: Grammars, timeout_s: float) -> None:
        self._grammars = grammars
        self._timeout_s = timeout_s
        self._threads = trio.CapacityLimiter(2)
        self._flights: dict[Constraint, trio.Lock] = {}

    def token_bytes(self, token: int) -> bytes:
        return self._grammars.token_bytes(token)

    async def matcher(self, constraint: Constraint) -> Matcher:
        """At the beginning of the constraint. Raises ConstraintRefused."""
        compiled = self._grammars.find(constraint)
        if compiled is None:
            with trio.move_on_after(self._timeout_s):
                compiled = await self._compiled(constraint)
        if compiled is None:
            raise ConstraintRefused(
                f"it takes longer than {self._timeout_s:g} s to compile", first_at(constraint)
            )
        return Matcher(compiled)

    async def _compiled(self, constraint: Constraint) -> Compiled:
        """Who comes second waits for the first, and does it himself only if that one gave up."""
        flight = self._flights.setdefault(constraint, trio.Lock())
        try:
            async with flight:
                compiled = self._grammars.find(constraint)
                if compiled is None:
                    compiled = await trio.to_thread.run_sync(
                        self._grammars.compile,
                        constraint,
                        limiter=self._threads,
                        abandon_on_cancel=True,
                    )
                    self._grammars.keep(compiled)
                return compiled
        finally:
            if not flight.locked():
                self._flights.pop(constraint, None)


def _seeded(submit: Submit) -> Submit:
    if submit.sampling.seed is not None:
        return submit
    return replace(submit, sampling=replace(submit.sampling, seed=secrets.randbits(63)))


@dataclass(frozen=True, slots=True)
class _Parts:
    inbox: SimpleQueue[Command | Reply | ReadsMeasured]
    engine: Engine
    writer: DiskWriter
    readers: tuple[DiskReader, ...]
    scrubber: Scrubber | None
    transfers: Transfers | None  # where the device is a GPU
    store: LmdbStore
    text: Text
    grammars: Grammars
    grammar_timeout_s: float
    name: str
    costs: RestoreCosts
    remember: Callable[[Rates], None]  # for the next start
    measure_disk: Callable[[], None]  # and tell the engine, once it is calm
    # Everything that is on disk is known, or nobody wants to know any more.
    adopted: threading.Event
    clock: Callable[[], float]  # the engine's


@asynccontextmanager
async def open_engine(
    settings: EngineSettings, wall_clock: Callable[[], float]
) -> AsyncIterator[EngineService]:
    """Load the model, open the store, start the threads; yield the service; stop all in reverse order.

    `wall_clock` gives seconds since the epoch: blocks on disk remember when they were last used, across restarts.

    Raises UnsupportedModel for a model that cannot be paged, StateDirRefused or StoreError for a state directory that
    cannot be owned.
    """
    state = StateDir.open(settings.state_dir)
    try:
        parts = await trio.to_thread.run_sync(_built, settings, state, wall_clock)
        try:
            async with _running(parts) as service:
                yield service
        finally:
            if parts.transfers is not None:
                parts.transfers.close()
            parts.remember(parts.costs.rates)
            parts.store.close()
    finally:
        state.close()


@asynccontextmanager
async def _running(parts: _Parts) -> AsyncIterator[EngineService]:
    service = EngineService(parts)
    async with trio.open_nursery() as disk_threads:
        scrubbers = () if parts.scrubber is None else (parts.scrubber,)
        copiers = () if parts.transfers is None else parts.transfers.workers
        for worker in (parts.writer, *parts.readers, *scrubbers, *copiers):
            disk_threads.start_soon(_host, worker.run)
        disk_threads.start_soon(_host, parts.measure_disk)
        try:
            async with trio.open_nursery() as engine_thread:
                engine_thread.start_soon(_host, functools.partial(parts.engine.run, service.emit))
                try:
                    yield service
                finally:
                    parts.inbox.put(Stop())
        finally:
            parts.adopted.set()
            for worker in (*scrubbers, parts.writer, *parts.readers, *copiers):
                worker.stop()


async def _host(body: Callable[[], None]) -> None:
    """One thread for a body's whole life. Its own inbox ends it; cancellation waits for that."""
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(body, limiter=trio.CapacityLimiter(1))


def _built(settings: EngineSettings, state: StateDir, wall_clock: Callable[[], float]) -> _Parts:
    """`_build`, on a thread that then ends, and with it the pool of OpenMP threads that it had for measuring.

    trio keeps its threads for a while. With that pool beside the engine's own there are more threads than cores: then
    OpenMP sleeps at every barrier instead of spinning, and a decode of 10 ms takes 21.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_build, settings, state, wall_clock).result()


def _build(settings: EngineSettings, state: StateDir, wall_clock: Callable[[], float]) -> _Parts:
    """Everything that takes long: on a thread of its own."""
    # A store that was not closed is walked over in a child process, beside loading the model.
    with inspecting(state) as inspection:
        loaded = load(
            LoadSpec(
                state_dir=settings.state_dir,
                path=settings.model_path,
                name=settings.model_name,
                device=settings.device,
                dtype=settings.dtype,
                kv_dtype=settings.kv_dtype,
                prefill_dtype=settings.prefill_dtype,
                block_tokens=settings.block_tokens,
                threads=settings.threads,
                storage=settings.compact,
            )
        )
        text = Text.from_dir(loaded.path)
        grammars = grammars_of(text)
        stored_as = codec(settings.compact, loaded.geometry)
        store = LmdbStore.open(
            state,
            fingerprint=loaded.fingerprint,
            payload_bytes=stored_as.payload_bytes(loaded.geometry),
            block_tokens=settings.block_tokens,
            limits=StoreLimits(
                block_bytes=settings.disk_bytes,
                manifest_bytes=settings.manifest_bytes,
                min_free_bytes=settings.min_free_bytes,
            ),
            durability=settings.durability,
            inspection=inspection,
        )
    block_bytes = loaded.geometry.block_bytes
    slots = {
        Tier.DEVICE: max(MIN_DEVICE_SLOTS, settings.device_bytes // block_bytes),
        Tier.HOST: settings.host_bytes // block_bytes,
        Tier.DISK: store.block_slots,
    }
    arenas = {Tier.DEVICE: Arena(loaded.geometry, slots[Tier.DEVICE], loaded.device)}
    if slots[Tier.HOST]:
        arenas[Tier.HOST] = Arena(loaded.geometry, slots[Tier.HOST])
    cache = TieredCache(
        block_tokens=settings.block_tokens,
        slots=slots,
        limits=settings.limits,
        policy=policy_named(settings.policy, slots=sum(slots.values())),
    )
    inbox: SimpleQueue[Command | Reply | ReadsMeasured] = SimpleQueue()
    fetches: SimpleQueue[ReadCommand] = SimpleQueue()
    writer = DiskWriter(store, inbox.put, wall_clock, codec=stored_as)
    readers = tuple(
        DiskReader(store, fetches, inbox.put, stored_as) for _ in range(settings.readers)
    )
    scrubber = None
    if settings.scrub_bytes_s:
        scrubber = Scrubber(
            store,
            SimpleQueue(),
            inbox.put,
            writer=writer,
            fetches=fetches,
            bytes_per_s=settings.scrub_bytes_s,
        )
    transfers = None
    if loaded.device.type == "cuda":
        transfers = Transfers.of(arenas, settings.block_tokens, inbox.put)
    memory = transfers.memory if transfers else Memory(arenas, settings.block_tokens)
    runner = Runner(loaded, arenas[Tier.DEVICE])
    runner.warm_up(settings.max_running)
    costs = RestoreCosts(
        _calibrate(settings, loaded, memory, runner, slots),
        block_bytes=block_bytes,
        block_tokens=settings.block_tokens,
        step_tokens=settings.step_tokens,
    )
    adopted = threading.Event()
    engine = Engine(
        cache=cache,
        scheduler=Scheduler(
            step_tokens=settings.step_tokens,
            mixed_tokens=settings.mixed_tokens,
            prefill_share=settings.prefill_share,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_loading=settings.restore.max_loading,
            device_slots=slots[Tier.DEVICE],
            block_tokens=settings.block_tokens,
        ),
        runner=runner,
        sampler=Sampler(),
        memory=memory,
        writer=writer,
        reader=readers[0],
        costs=costs,
        draft_tokens=settings.draft_tokens,
        restore=settings.restore,
        canaries=Canaries(settings.canary, random.random),
        records=store.statistics().blocks,
        stored_bytes=stored_as.payload_bytes(loaded.geometry),
        root=functools.partial(root_key, loaded.fingerprint),
        max_context=loaded.max_context,
        vocab_size=loaded.vocab_size,
        clock=time.monotonic,
        inbox=inbox,
        adopted=adopted.set,
        make_way=_make_way(settings, loaded),
    )
    log.info(
        "%s on %s: device %d, host %d, disk %d blocks of %d tokens (%.2f MiB each); %d on disk",
        loaded.name,
        loaded.device,
        *slots.values(),
        settings.block_tokens,
        block_bytes / 2**20,
        store.statistics().blocks,
    )
    remember = functools.partial(calibrate.remember, settings.state_dir, _machine(loaded))

    def measure_disk() -> None:
        adopted.wait()
        measured = calibrate.measure_reads(store, stored_as, block_bytes, settings.readers)
        if measured is not None:
            inbox.put(measured)

    return _Parts(
        inbox=inbox,
        engine=engine,
        writer=writer,
        readers=readers,
        scrubber=scrubber,
        transfers=transfers,
        store=store,
        text=text,
        grammars=grammars,
        grammar_timeout_s=settings.grammar_timeout_s,
        name=loaded.name,
        costs=costs,
        remember=remember,
        measure_disk=measure_disk,
        adopted=adopted,
        clock=time.monotonic,
    )


def grammars_of(text: Text) -> Grammars:
    return Grammars.of_tokenizer(text.tokenizer_json(), text.stop_ids)


def _calibrate(
    settings: EngineSettings,
    loaded: LoadedModel,
    memory: Memory,
    runner: Runner,
    slots: Mapping[Tier, int],
) -> Rates:
    """The arenas are empty still, so they are measured in place."""
    rates = remembered = calibrate.recall(settings.state_dir, _machine(loaded))
    if rates is None:
        rates = calibrate.measure_prefill(
            runner, slots=slots[Tier.DEVICE], block_tokens=settings.block_tokens, rates=Rates()
        )
        rates = calibrate.measure_decode(
            runner, slots=slots[Tier.DEVICE], block_tokens=settings.block_tokens, rates=rates
        )
    if slots[Tier.HOST]:
        rates = calibrate.measure_copies(memory, rates)
    log.info(
        "copies %.2f GB/s, prefill %.0f tokens/s and %.0f behind %d tokens (%s)",
        1e-9 / rates.copy_s,
        1 / rates.token_s,
        1 / (rates.token_s + calibrate.DEPTH * rates.depth_s),
        calibrate.DEPTH,
        "measured" if remembered is None else "prefill remembered",
    )
    return rates


def _make_way(settings: EngineSettings, loaded: LoadedModel) -> Callable[[bool], int]:
    """Where the model computes on the processor, it shares that with others."""
    if loaded.device.type != "cpu":
        return lambda reading: 0
    cores = Cores(paged_cpu.threads(), settings.readers, time.monotonic)
    return lambda reading: paged_cpu.take(cores.threads(reading=reading))


def _machine(loaded: LoadedModel) -> str:
    """What a prefill's speed depends on."""
    return f"{loaded.fingerprint.hex()[:32]} {loaded.device} {torch.get_num_threads()} threads"
