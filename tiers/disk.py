"""The disk threads: plain loops around a `BlockStore`, each with an inbox, each ended by a stop.

One writer, because LMDB has one; several readers, because one alone reaches a third of the disk's rate. The host
threads come from whoever owns these objects: `run` is one call for a thread's whole life.

Laws
    Every spill, drop and fetch is answered exactly once, by `Landed` after it is durable (or in place), or `Failed`.
    Every manifest is answered exactly once, with its ticket, if it has one. Answers are calls of `reply`, on the disk's thread.
    The writer works in the order of its inbox. It puts what has gathered into one transaction, because a commit costs
    two syncs whatever its size; but a drop never shares a transaction with an earlier write of its key, and forgetting
    a response none with anything.
    When a transaction fails, its commands are tried one by one: a drop must not fail with a spill that found no room.
    What the store is given and gives is the codec's payload of a block: both are made here, off the engine's thread,
    and nothing is decoded that was not verified.
    A `StoreError` is an answer. Anything else is our bug and ends the thread.

Bounds
    Blocks waiting to be written: `max_pending_bytes`, then `offer_blocks` refuses and the caller stops spilling.
    Drops and manifests are small and never refused: at most one drop per disk slot, one manifest per turn.
    Fetches: each holds a slot of an arena, so there are never more than slots.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from tiers.block import Drop, Fetch, Spill, StoreError
from tiers.codec import AS_IT_IS
from tiers.store import BlockWrite

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiers.block import BlockKey, TokenIds
    from tiers.codec import Codec
    from tiers.manifest import Manifest
    from tiers.store import BlockStore, IndexEntry

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Landed:
    """Done: durable, gone, or in its slot."""

    action: Spill | Fetch | Drop


@dataclass(frozen=True, slots=True)
class Failed:
    """Not done. After a fetch failed, the record is worth dropping; its slot's bytes are undefined."""

    action: Spill | Fetch | Drop
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


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    items: tuple[tuple[Spill, memoryview], ...]
    manifest: Manifest | None
    ticket: int | None


@dataclass(frozen=True, slots=True)
class ForgetResponse:
    tenant: str
    response_id: str
    ticket: int


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
_Command = _Write | ForgetResponse | Stop
ReadCommand = FetchBlock | ReadIndex | FindChain | Stop


@dataclass(frozen=True, slots=True)
class WriterStatistics:
    pending_bytes: int
    batches: int
    failed_batches: int
    refused: int


class DiskWriter:
    """Gathers writes into transactions. `clock` gives seconds since the epoch: stored as the blocks' last use."""

    def __init__(
        self,
        store: BlockStore,
        reply: Callable[[Reply], None],
        clock: Callable[[], float],
        *,
        max_pending_bytes: int = 256 << 20,
        batch_bytes: int = 64 << 20,
        codec: Codec = AS_IT_IS,
    ) -> None:
        self._store = store
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

    # the engine's side: never waits

    def offer_blocks(
        self,
        items: Sequence[tuple[Spill, memoryview]],
        manifest: Manifest | None = None,
        ticket: int | None = None,
    ) -> bool:
        """Queue blocks, and a manifest that goes with the last of them. False, and nothing queued, when too many wait.

        Each view must stay put until its spill is answered. One thread offers. With nothing waiting, any size is
        taken, so that a block larger than the bound is not refused for ever.
        """
        size = sum(view.nbytes for _, view in items)
        waiting = self._offered_bytes - self._answered_bytes
        if size and waiting and waiting + size > self._max_pending_bytes:
            self._refused += 1
            return False
        self._offered_bytes += size
        chunk: list[tuple[Spill, memoryview]] = []
        chunk_bytes = 0
        for item in items:
            if chunk and chunk_bytes + item[1].nbytes > self._batch_bytes:
                self._inbox.put(WriteBlocks(tuple(chunk), None, None))
                chunk, chunk_bytes = [], 0
            chunk.append(item)
            chunk_bytes += item[1].nbytes
        self._inbox.put(WriteBlocks(tuple(chunk), manifest, ticket))
        return True

    def persist(self, manifest: Manifest, ticket: int | None) -> None:
        """Queue a manifest alone. Never refused; any thread may call this and the following."""
        self._inbox.put(WriteBlocks((), manifest, ticket))

    def drop(self, action: Drop) -> None:
        self._inbox.put(action)

    def forget_response(self, tenant: str, response_id: str, ticket: int) -> None:
        self._inbox.put(ForgetResponse(tenant, response_id, ticket))

    def stop(self) -> None:
        """Everything queued before is written and answered first."""
        self._inbox.put(Stop())

    def statistics(self) -> WriterStatistics:
        return WriterStatistics(
            pending_bytes=self._offered_bytes - self._answered_bytes,
            batches=self._batches,
            failed_batches=self._failed_batches,
            refused=self._refused,
        )

    # the thread's side

    def run(self) -> None:
        """Work until `stop`. One call, on one thread."""
        held: _Command | None = None  # taken from the inbox, but not fit for the batch before it
        while True:
            command = held or self._inbox.get()
            held = None
            match command:
                case Stop():
                    return
                case ForgetResponse():
                    self._forget(command)
                case WriteBlocks() | Drop():
                    batch, held = self._gather(command)
                    self._commit(batch)

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
                case Stop() | ForgetResponse():
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
        now = self._clock()
        writes = [command for command in batch if isinstance(command, WriteBlocks)]
        try:
            self._store.write(
                drops=[command.key for command in batch if isinstance(command, Drop)],
                blocks=[
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
                ],
                manifests=[command.manifest for command in writes if command.manifest is not None],
            )
        except StoreError as error:
            self._failed_batches += 1
            if len(batch) > 1:
                for command in batch:
                    self._commit([command])
                return
            _log.warning("disk write refused: %s: %s", error.reason, error)
            self._answer(batch[0], error.reason)
            return
        self._batches += 1
        for command in batch:
            self._answer(command, None)

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
            _log.warning("forgetting a response failed: %s: %s", error.reason, error)
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
            entries = self._store.index(after, limit)
        except StoreError as error:
            _log.warning("the index is not read: %s: %s", error.reason, error)
            return IndexFailed(after, error.reason)
        return IndexSlice(tuple(entries), entries[-1].key if len(entries) == limit else None)

    def _find_chain(self, ticket: int, root: BlockKey, tokens: TokenIds) -> ChainFound:
        try:
            return ChainFound(ticket, tuple(self._store.find_chain(root, tokens)))
        except StoreError as error:
            _log.warning("no chain looked up: %s: %s", error.reason, error)
            return ChainFound(ticket, ())

    def _read(self, action: Fetch, into: memoryview) -> Landed | Failed:
        room = self._codec.room(into)
        try:
            self._store.read(action.key, action.parent, action.tokens, room)
        except StoreError as error:
            _log.warning("record %s not used: %s: %s", action.key.hex()[:16], error.reason, error)
            return Failed(action, error.reason)
        self._codec.decode(room, into)
        return Landed(action)


def _payload_bytes(command: _Write) -> int:
    return sum(view.nbytes for _, view in command.items) if isinstance(command, WriteBlocks) else 0


def _keys_written(command: _Write) -> set[bytes]:
    return {spill.key for spill, _ in command.items} if isinstance(command, WriteBlocks) else set()
