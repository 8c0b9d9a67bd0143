"""The disk threads: plain loops around a `BlockStore`, each with an inbox, each ended by a stop.

One writer, because LMDB has one; several readers, because one alone reaches a third of the disk's rate. The host
threads come from whoever owns these objects: `run` is one call for a thread's whole life.

Laws
    Every spill, drop and fetch is answered exactly once, by `Landed` after it is durable (or in place), or `Failed`.
    Every manifest is answered exactly once, with its ticket, if it has one. Answers are calls of `reply`, on the disk's thread.
    The writer works in the order of its inbox. It puts what has gathered into one transaction, because a commit costs
    two syncs whatever its size; but a drop never shares a transaction with an earlier write of its key, and forgetting
    a response none with anything.
    When a transaction fails, its commands are tried one by one, and a manifest without its blocks: neither a drop nor a
    manifest must fail with a spill that found no room.
    What the store is given and gives is the codec's payload of a block: both are made here, off the engine's thread,
    and nothing is decoded that was not verified.
    A `StoreError` is an answer. Anything else is our bug and ends the thread.

A disk that is full or fails
    Its first refusal makes it degraded: one line in the log, and what follows is counted. Spills are then refused at
    once, so that nobody waits for them, but for a probe every few seconds; drops and manifests are tried. The first
    blocks that land end it, with another line. Blocks over the store's own budget are no such refusal: their owner knows.
    A read that fails is tried a second time; after that it says nothing about the record, only about the disk.

Bounds
    Blocks waiting to be written: `max_pending_bytes`, then `offer_blocks` refuses and the caller stops spilling.
    Drops and manifests are small and never refused: at most one drop per disk slot, one manifest per turn.
    Fetches: each holds a slot of an arena, so there are never more than slots.
    The scrubber: bytes per second, and nothing while anybody else wants the disk.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import Counter
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from tiers.block import Drop, Fetch, Spill, StoreError
from tiers.codec import AS_IT_IS
from tiers.store import BlockWrite, ReaderCheck

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiers.block import BlockKey, Copy, TokenIds
    from tiers.codec import Codec
    from tiers.manifest import Manifest
    from tiers.store import BlockStore, Examined, IndexEntry

_CHECK_READERS_S = 60.0
_SCRUBBER_RESTS_S = 60.0  # between two passes
_SCRUBBER_YIELDS_S = 0.5  # to whoever else wants the disk
_DISK_REASONS = frozenset({"full", "io"})  # what the disk is to blame for

_Read = TypeVar("_Read")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Landed:
    """Done: durable, gone, or in its slot. A copy is never the disk's, but where it takes time it is answered alike."""

    action: Spill | Fetch | Drop | Copy


@dataclass(frozen=True, slots=True)
class Failed:
    """Not done. A record that a fetch refused is worth dropping, unless the reason is io. The slot's bytes are undefined."""

    action: Spill | Fetch | Drop | Copy
    reason: str  # StoreError.reason


@dataclass(frozen=True, slots=True)
class Persisted:
    ticket: int | None


@dataclass(frozen=True, slots=True)
class PersistFailed:
    ticket: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The answer to forgetting a response; `PersistFailed` where the disk could not.

    `keys` are the blocks that it named, whose KV may go; `shared_keys` those that its stored parent names too.
    """

    ticket: int
    existed: bool
    keys: tuple[BlockKey, ...] = ()
    shared_keys: tuple[BlockKey, ...] = ()


@dataclass(frozen=True, slots=True)
class IndexSlice:
    """The answer to `ReadIndex`. Read on behind `last`; None: that was all."""

    entries: tuple[IndexEntry, ...]
    last: BlockKey | None


@dataclass(frozen=True, slots=True)
class IndexFailed:
    """The disk could not read the slice behind `after`. Asking again later is sensible."""

    after: BlockKey | None
    reason: str


@dataclass(frozen=True, slots=True)
class ChainFound:
    """The answer to `FindChain`: nothing, where nothing was found or the disk could not read."""

    ticket: int
    entries: tuple[IndexEntry, ...]


@dataclass(frozen=True, slots=True)
class Rotten:
    """The scrubber found a record that must not be used: forget it and drop it."""

    key: BlockKey
    reason: str  # StoreError.reason


Reply = (
    Landed
    | Failed
    | Persisted
    | PersistFailed
    | Forgotten
    | IndexSlice
    | IndexFailed
    | ChainFound
    | Rotten
)


def nothing_to_wait_for() -> None:
    pass


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    items: tuple[tuple[Spill, memoryview], ...]
    manifest: Manifest | None
    ticket: int | None
    ready: Callable[[], None] = nothing_to_wait_for
    offered_at: float | None = None  # on the writer's monotonic clock; None: a part of another one


@dataclass(frozen=True, slots=True)
class ForgetResponse:
    tenant: str
    response_id: str
    ticket: int


@dataclass(frozen=True, slots=True)
class DiscardRecord:
    """Delete a record that nobody counts on. Not answered."""

    key: BlockKey


@dataclass(frozen=True, slots=True)
class FetchBlock:
    action: Fetch
    into: memoryview


@dataclass(frozen=True, slots=True)
class ReadIndex:
    after: BlockKey | None
    limit: int


@dataclass(frozen=True, slots=True)
class FindChain:
    ticket: int
    root: BlockKey
    tokens: TokenIds


@dataclass(frozen=True, slots=True)
class Stop:
    """Do what came before, then return."""


_Write = WriteBlocks | Drop
_Command = _Write | ForgetResponse | DiscardRecord | Stop
ReadCommand = FetchBlock | ReadIndex | FindChain | Stop


class DiskState(enum.Enum):
    OK = "ok"
    DEGRADED = "degraded"


@dataclass(frozen=True, slots=True)
class WriterStatistics:
    pending_bytes: int
    batches: int
    failed_batches: int
    refused: int  # offers that were not taken
    state: DiskState
    reason: str | None  # StoreError.reason of what made it degraded
    degraded_s: float  # for how long it has been
    failures: dict[str, int]  # {StoreError.reason: transactions}
    commit_last_s: float
    commit_total_s: float
    lag_s: float  # how long the oldest write under way has waited
    written_bytes: int  # payloads in transactions that were committed
    oldest_read_s: float  # as found by the last check
    cleared_readers: int  # places of readers that died


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why the disk is degraded."""

    reason: str
    since: float
    with_blocks: bool
    failures: int
    probe_at: float


class DiskWriter:
    """Gathers writes into transactions.

    `clock` gives seconds since the epoch: stored as the blocks' last use. `monotonic` measures and waits.
    """

    def __init__(
        self,
        store: BlockStore,
        reply: Callable[[Reply], None],
        clock: Callable[[], float],
        *,
        max_pending_bytes: int = 256 << 20,
        batch_bytes: int = 64 << 20,
        codec: Codec = AS_IT_IS,
        probe_s: float = 3.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._probe_s = probe_s
        self._monotonic = monotonic
        self._codec = codec
        self._reply = reply
        self._clock = clock
        self._max_pending_bytes = max_pending_bytes
        self._batch_bytes = batch_bytes
        self._inbox: SimpleQueue[_Command] = SimpleQueue()
        # Two counters, each with one writing thread, instead of one with two: what waits is the difference.
        self._offered_bytes = 0
        self._answered_bytes = 0
        self._batches = 0
        self._failed_batches = 0
        self._refused = 0
        self._failures: Counter[str] = Counter()
        self._commit_last_s = 0.0
        self._commit_total_s = 0.0
        self._written_bytes = 0
        self._oldest_offer: float | None = None  # of the batch that is being committed
        self._trouble: _Trouble | None = None  # replaced by the thread, read by anybody
        self._readers = ReaderCheck(0.0, 0)
        self._check_at = monotonic() + _CHECK_READERS_S
        self._heal_at = 0.0

    # the engine's side: never waits

    def offer_blocks(
        self,
        items: Sequence[tuple[Spill, memoryview]],
        manifest: Manifest | None = None,
        ticket: int | None = None,
        *,
        ready: Callable[[], None] = nothing_to_wait_for,
    ) -> bool:
        """Queue blocks, and a manifest that goes with the last of them. False, and nothing queued, when too many wait,
        or the disk is degraded and no probe is due.

        Each view must stay put until its spill is answered, and holds its bytes after `ready`, which the writer calls.
        One thread offers. With nothing waiting, any size is
        taken, so that a block larger than the bound is not refused for ever.
        """
        size = sum(view.nbytes for _, view in items)
        waiting = self._offered_bytes - self._answered_bytes
        behind = size and waiting and waiting + size > self._max_pending_bytes
        if behind or (items and self._is_degraded()):
            self._refused += 1
            return False
        self._offered_bytes += size
        now = self._monotonic()
        chunk: list[tuple[Spill, memoryview]] = []
        chunk_bytes = 0
        for item in items:
            if chunk and chunk_bytes + item[1].nbytes > self._batch_bytes:
                self._inbox.put(WriteBlocks(tuple(chunk), None, None, ready, now))
                chunk, chunk_bytes = [], 0
            chunk.append(item)
            chunk_bytes += item[1].nbytes
        self._inbox.put(WriteBlocks(tuple(chunk), manifest, ticket, ready, now))
        return True

    def persist(self, manifest: Manifest, ticket: int | None) -> None:
        """Queue a manifest alone. Never refused; any thread may call this and the following."""
        self._inbox.put(WriteBlocks((), manifest, ticket, offered_at=self._monotonic()))

    def drop(self, action: Drop) -> None:
        self._inbox.put(action)

    def forget_response(self, tenant: str, response_id: str, ticket: int) -> None:
        self._inbox.put(ForgetResponse(tenant, response_id, ticket))

    def discard(self, key: BlockKey) -> None:
        """Queue the deletion of a record that the index does not list; one that it lists by then stays."""
        self._inbox.put(DiscardRecord(key))

    @property
    def refuses_blocks(self) -> bool:
        """Degraded, and no probe is due: an offer would be for nothing. Drops and manifests are tried all the same."""
        return self._is_degraded()

    @property
    def idle(self) -> bool:
        """Nothing waits to be written."""
        return self._inbox.empty() and self._offered_bytes == self._answered_bytes

    def stop(self) -> None:
        """Everything queued before is written and answered first."""
        self._inbox.put(Stop())

    def statistics(self) -> WriterStatistics:
        trouble, offered = self._trouble, self._oldest_offer
        return WriterStatistics(
            pending_bytes=self._offered_bytes - self._answered_bytes,
            batches=self._batches,
            failed_batches=self._failed_batches,
            refused=self._refused,
            state=DiskState.OK if trouble is None else DiskState.DEGRADED,
            reason=None if trouble is None else trouble.reason,
            degraded_s=0.0 if trouble is None else self._monotonic() - trouble.since,
            failures=dict(self._failures),
            commit_last_s=self._commit_last_s,
            commit_total_s=self._commit_total_s,
            lag_s=0.0 if offered is None else max(0.0, self._monotonic() - offered),
            written_bytes=self._written_bytes,
            oldest_read_s=self._readers.oldest_s,
            cleared_readers=self._readers.cleared,
        )

    def _is_degraded(self) -> bool:
        """And no probe is due."""
        trouble = self._trouble
        return trouble is not None and self._monotonic() < trouble.probe_at

    # the thread's side

    def run(self) -> None:
        """Work until `stop`. One call, on one thread."""
        held: _Command | None = None  # taken from the inbox, but not fit for the batch before it
        while True:
            command = held or self._next()
            held = None
            match command:
                case Stop():
                    return
                case ForgetResponse():
                    self._forget(command)
                case DiscardRecord(key):
                    self._discard(key)
                case WriteBlocks() | Drop():
                    batch, held = self._gather(command)
                    offers = (one.offered_at for one in batch if isinstance(one, WriteBlocks))
                    self._oldest_offer = next(offers, None)
                    self._commit(batch)
                    self._oldest_offer = None

    def _next(self) -> _Command:
        """What comes next; every minute a look at the readers, and while the disk is degraded one at the store."""
        while True:
            now = self._monotonic()
            if self._check_at <= now:
                self._check_readers()
            elif self._trouble is not None and self._heal_at <= now:
                self._heal()
            else:
                due = (
                    self._check_at if self._trouble is None else min(self._check_at, self._heal_at)
                )
                try:
                    return self._inbox.get(timeout=due - now)
                except Empty:
                    continue

    def _heal(self) -> None:
        """A store that closed itself over a failure opens again with the next write, and is not read before."""
        self._heal_at = self._monotonic() + self._probe_s
        try:
            self._store.write()
        except StoreError as error:
            self._failures[error.reason] += 1

    def _check_readers(self) -> None:
        self._check_at = self._monotonic() + _CHECK_READERS_S
        try:
            found = self._store.check_readers()
        except StoreError as error:
            _log.warning("the disk's readers are not known: %s", error)
            return
        cleared = self._readers.cleared + found.cleared
        self._readers = ReaderCheck(found.oldest_s, cleared)
        if found.oldest_s > _CHECK_READERS_S:
            _log.warning("a read of the disk tier has not ended for %.0f s", found.oldest_s)

    def _gather(self, first: _Write) -> tuple[list[_Write], _Command | None]:
        """As much of the inbox as fits into one transaction, and the command that did not."""
        batch: list[_Write] = [first]
        written = _keys_written(first)
        size = _payload_bytes(first)
        while True:
            try:
                command = self._inbox.get_nowait()
            except Empty:
                return batch, None
            match command:
                case Stop() | ForgetResponse() | DiscardRecord():
                    return batch, command
                case Drop(key):
                    if key in written:
                        return batch, command
                case WriteBlocks():
                    size += _payload_bytes(command)
                    if size > self._batch_bytes:
                        return batch, command
                    written |= _keys_written(command)
            batch.append(command)

    def _commit(self, batch: list[_Write]) -> None:
        if (trouble := self._trouble) is not None and self._is_degraded():
            batch = [self._without_blocks(command, trouble.reason) for command in batch]
        error = self._write(batch)
        if error is None:
            for command in batch:
                self._answer(command, None)
        elif len(batch) > 1:
            for command in batch:
                self._commit([command])
        else:
            self._commit_the_rest(batch[0], error.reason)

    def _commit_the_rest(self, command: _Write, reason: str) -> None:
        """Of a command that failed alone: what was not at fault."""
        if isinstance(command, WriteBlocks) and command.items and command.manifest is not None:
            if reason == "manifest":
                self._answer(WriteBlocks((), command.manifest, command.ticket), reason)
                self._commit([WriteBlocks(command.items, None, None)])
            else:
                self._commit([self._without_blocks(command, reason)])
        else:
            self._answer(command, reason)

    def _write(self, batch: list[_Write]) -> StoreError | None:
        """One transaction, timed and counted; what it was refused for."""
        now, began = self._clock(), self._monotonic()
        writes = [command for command in batch if isinstance(command, WriteBlocks)]
        for command in writes:
            command.ready()
        blocks = [
            BlockWrite(
                key=spill.key,
                root=spill.root,
                parent=spill.parent,
                depth=spill.depth,
                tokens=spill.tokens,
                payload=self._codec.encode(block),
                last_used=now,
            )
            for command in writes
            for spill, block in command.items
        ]
        drops = [command.key for command in batch if isinstance(command, Drop)]
        manifests = [command.manifest for command in writes if command.manifest is not None]
        if not (drops or blocks or manifests):
            return None
        try:
            self._store.write(drops=drops, blocks=blocks, manifests=manifests)
        except StoreError as error:
            self._failed_batches += 1
            self._failures[error.reason] += 1
            self._note_failure(error, with_blocks=bool(blocks))
            return error
        self._commit_last_s = self._monotonic() - began
        self._commit_total_s += self._commit_last_s
        self._batches += 1
        self._written_bytes += sum(len(block.payload) for block in blocks)
        self._note_success(with_blocks=bool(blocks))
        return None

    def _note_failure(self, error: StoreError, *, with_blocks: bool) -> None:
        if error.reason not in _DISK_REASONS:
            _log.info("disk write refused: %s: %s", error.reason, error)
            return
        now, before = self._monotonic(), self._trouble
        if before is None:
            _log.warning("the disk tier is degraded: %s: %s", error.reason, error)
            before = _Trouble(error.reason, now, with_blocks, 0, now)
        self._trouble = replace(
            before,
            with_blocks=before.with_blocks or with_blocks,
            failures=before.failures + 1,
            probe_at=now + self._probe_s,
        )

    def _note_success(self, *, with_blocks: bool) -> None:
        trouble = self._trouble
        if trouble is None or (trouble.with_blocks and not with_blocks):
            return
        self._trouble = None
        lasted_s = self._monotonic() - trouble.since
        _log.warning(
            "the disk tier has resumed after %.0f s and %d failures", lasted_s, trouble.failures
        )

    def _without_blocks(self, command: _Write, reason: str) -> _Write:
        """Answer a command's spills with a refusal; what is left of it."""
        if not isinstance(command, WriteBlocks) or not command.items:
            return command
        self._answer(WriteBlocks(command.items, None, None), reason)
        return WriteBlocks((), command.manifest, command.ticket)

    def _answer(self, command: _Write, failure: str | None) -> None:
        """`failure` is the reason, or None."""
        self._answered_bytes += _payload_bytes(command)
        actions: list[Spill | Drop] = (
            [command] if isinstance(command, Drop) else [spill for spill, _ in command.items]
        )
        for action in actions:
            self._reply(Landed(action) if failure is None else Failed(action, failure))
        if isinstance(command, WriteBlocks) and command.manifest is not None:
            ticket = command.ticket
            self._reply(Persisted(ticket) if failure is None else PersistFailed(ticket, failure))

    def _forget(self, command: ForgetResponse) -> None:
        try:
            found = self._store.forget_response(command.tenant, command.response_id)
        except StoreError as error:
            self._failures[error.reason] += 1
            self._note_failure(error, with_blocks=False)
            self._reply(PersistFailed(command.ticket, error.reason))
            return
        if found is None:
            self._reply(Forgotten(command.ticket, existed=False))
        else:
            self._reply(
                Forgotten(
                    command.ticket, existed=True, keys=found.keys, shared_keys=found.shared_keys
                )
            )

    def _discard(self, key: BlockKey) -> None:
        try:
            self._store.discard(key)
        except StoreError as error:
            self._failures[error.reason] += 1
            self._note_failure(error, with_blocks=False)


class DiskReader:
    """One of several that share an inbox. Asking any of them reaches whichever is free."""

    def __init__(
        self,
        store: BlockStore,
        inbox: SimpleQueue[ReadCommand],
        reply: Callable[[Reply], None],
        codec: Codec = AS_IT_IS,
    ) -> None:
        self._store = store
        self._codec = codec
        self._inbox = inbox
        self._reply = reply

    def fetch(self, action: Fetch, into: memoryview) -> None:
        """Queue a read into `into`, which must stay put until the answer."""
        self._inbox.put(FetchBlock(action, into))

    def read_index(self, after: BlockKey | None, limit: int) -> None:
        """Queue one slice of the index; answered by `IndexSlice` or `IndexFailed`."""
        self._inbox.put(ReadIndex(after, limit))

    def find_chain(self, ticket: int, root: BlockKey, tokens: TokenIds) -> None:
        """Queue the look-up of a prompt's chain; answered by `ChainFound`."""
        self._inbox.put(FindChain(ticket, root, tokens))

    def reads(self) -> dict[str, int]:
        """Records that came from the store so far, to whichever reader, by the way they came."""
        return {way.value: count for way, count in self._store.statistics().reads.items()}

    def stop(self) -> None:
        """End one of the readers that share this inbox, after what was queued before."""
        self._inbox.put(Stop())

    def run(self) -> None:
        """Work until a stop. One call, on one thread."""
        while True:
            command = self._inbox.get()
            match command:
                case Stop():
                    return
                case FetchBlock(action, into):
                    self._reply(self._read(action, into))
                case ReadIndex(after, limit):
                    self._reply(self._read_index(after, limit))
                case FindChain(ticket, root, tokens):
                    self._reply(self._find_chain(ticket, root, tokens))

    def _read_index(self, after: BlockKey | None, limit: int) -> IndexSlice | IndexFailed:
        try:
            entries = _twice(lambda: self._store.index(after, limit))
        except StoreError as error:
            _log.warning("the index is not read: %s: %s", error.reason, error)
            return IndexFailed(after, error.reason)
        return IndexSlice(tuple(entries), entries[-1].key if len(entries) == limit else None)

    def _find_chain(self, ticket: int, root: BlockKey, tokens: TokenIds) -> ChainFound:
        try:
            return ChainFound(ticket, tuple(_twice(lambda: self._store.find_chain(root, tokens))))
        except StoreError as error:
            _log.warning("no chain looked up: %s: %s", error.reason, error)
            return ChainFound(ticket, ())

    def _read(self, action: Fetch, into: memoryview) -> Landed | Failed:
        room = self._codec.room(into)
        try:
            _twice(lambda: self._store.read(action.key, action.parent, action.tokens, room))
        except StoreError as error:
            _log.warning("record %s not used: %s: %s", action.key.hex()[:16], error.reason, error)
            return Failed(action, error.reason)
        self._codec.decode(room, into)
        return Landed(action)


@dataclass(frozen=True, slots=True)
class ScrubberStatistics:
    records: int
    bytes: int
    passes: int  # over the whole store
    bad: dict[str, int]  # {reason: records}


class Scrubber:
    """Verifies one record after the other, for ever, at a bounded rate, and only while nobody else wants the disk.

    A bad record that the tables may count on is answered with `Rotten`; one that only takes room is discarded.
    """

    def __init__(
        self,
        store: BlockStore,
        inbox: SimpleQueue[Stop],
        reply: Callable[[Reply], None],
        *,
        writer: DiskWriter,
        fetches: SimpleQueue[ReadCommand],
        bytes_per_s: float,
    ) -> None:
        assert bytes_per_s > 0
        self._store = store
        self._inbox = inbox
        self._reply = reply
        self._writer = writer
        self._fetches = fetches
        self._bytes_per_s = bytes_per_s
        self._records = 0
        self._bytes = 0
        self._passes = 0
        self._bad: Counter[str] = Counter()

    def stop(self) -> None:
        self._inbox.put(Stop())

    def statistics(self) -> ScrubberStatistics:
        return ScrubberStatistics(self._records, self._bytes, self._passes, dict(self._bad))

    def run(self) -> None:
        """Work until `stop`. One call, on one thread."""
        after: BlockKey | None = None
        wait_s = _SCRUBBER_RESTS_S  # a start has better things to do
        while not self._is_stopped_within(wait_s):
            if not self._writer.idle or not self._fetches.empty():
                wait_s = _SCRUBBER_YIELDS_S
                continue
            try:
                found = self._store.examine(after)
            except StoreError as error:
                _log.warning("the scrubber cannot read: %s: %s", error.reason, error)
                wait_s = _SCRUBBER_RESTS_S
                continue
            if found is None:
                after = None
                self._passes += 1
                wait_s = _SCRUBBER_RESTS_S
                continue
            after = found.key
            self._note(found)
            wait_s = found.bytes / self._bytes_per_s

    def _is_stopped_within(self, wait_s: float) -> bool:
        try:
            self._inbox.get(timeout=wait_s)
        except Empty:
            return False
        return True

    def _note(self, found: Examined) -> None:
        self._records += 1
        self._bytes += found.bytes
        if found.reason is None:
            return
        self._bad[found.reason] += 1
        _log.warning("record %s is rotten: %s", found.key.hex()[:16], found.reason)
        if found.listed:
            self._reply(Rotten(found.key, found.reason))
        else:
            self._writer.discard(found.key)


def _twice(read: Callable[[], _Read]) -> _Read:
    """A read that failed, not one that was refused, deserves another."""
    try:
        return read()
    except StoreError as error:
        if error.reason != "io":
            raise
    return read()


def _payload_bytes(command: _Write) -> int:
    return sum(view.nbytes for _, view in command.items) if isinstance(command, WriteBlocks) else 0


def _keys_written(command: _Write) -> set[bytes]:
    return {spill.key for spill, _ in command.items} if isinstance(command, WriteBlocks) else set()
