"""Memory where the device is a GPU: copies beside the model, on streams of their own, ordered by events.

    down     device to host, and to staging memory for the disk; issued by the engine's thread
    up       host to device, and from staging memory; what comes from the host tier is issued by the copiers
    compute  the model's own stream

A copy down is in the tables as soon as it is issued: what may read or write its slots later is put behind it on the device,
and its seal is made by a copier when the bytes are there. A copy up is answered with `Landed` or `Failed` like a read from
disk, so that other sessions' steps go on meanwhile; a copier checks the seal while the bytes travel, because hashing at
12-22 GB/s by one thread would be slower than the link.

Laws
    A device slot that is still being copied out is not written: by the model, `fence`; by a copy, `_behind`.
    A device slot that is still read or written by the model is not overwritten: every copy into it, or out of it, waits for
    what the model had been given until then.
    A slot that was restored is read only after its event: a copy up has landed no earlier, the model waits for a fetch's.
    What leaves the host tier has its seal checked, as engine/memory.py says; `Landed` is said after both.
    Host bytes are read by the CPU only after they arrived: seals are waited for, and spills give `arrival` to the writer.

Blocks are contiguous and 0.5 to 8 MiB, so one copy a block keeps the link busy; neighbours are not joined. Host memory is
pinned piece by piece (`Pinner`) while the engine serves already: until then its copies are slower, and nothing else.
Staging memory is torch's pinned one, which is given again only after the copies that use it.
"""

from __future__ import annotations

import logging
import math
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from engine.memory import Memory, Seal
from tiers.block import Copy, Spill, StoreError, Tier
from tiers.disk import Failed, Landed, Stop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from engine.batch import Batch
    from tiers.arena import Arena
    from tiers.block import BlockKey, Fetch, Slot

log = logging.getLogger(__name__)

COPIERS = 6  # threads: each hashes some 15 GB/s, and the link takes 50
PIECE_BYTES = 256 << 20  # pinned at a time: about 0.1 s
_PAGE_BYTES = 4096


class Event(Protocol):
    def wait(self) -> None:
        """Block this thread until it has happened."""


class Stream(Protocol):
    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None: ...
    def wait(self, event: Event) -> None:
        """What is issued from now on happens after the event."""

    def record(self) -> Event:
        """Happens after all that was issued."""


class Streams(NamedTuple):
    compute: Stream
    down: Stream
    up: Stream


@dataclass(frozen=True, slots=True, eq=False)
class Sealing:
    """A seal that may still be in the making."""

    key: BlockKey
    digest: Future[int]

    @classmethod
    def of(cls, seal: Seal) -> Sealing:
        made = cls(seal.key, Future())
        made.digest.set_result(seal.digest)
        return made

    def made(self) -> Seal:
        return Seal(self.key, self.digest.result())


@dataclass(frozen=True, slots=True, eq=False)
class MakeSeal:
    slot: Slot
    arrived: Event
    sealing: Sealing


@dataclass(frozen=True, slots=True, eq=False)
class Bring:
    action: Copy
    behind: tuple[Event, ...]
    sealing: Sealing


Job = MakeSeal | Bring | Stop


class CudaMemory(Memory):
    """Belongs to the engine's thread; the jobs that it makes are the copiers'."""

    def __init__(
        self,
        arenas: Mapping[Tier, Arena],
        block_tokens: int,
        streams: Streams,
        jobs: SimpleQueue[Job],
    ) -> None:
        super().__init__(arenas, block_tokens)
        self._streams = streams
        self._jobs = jobs
        self._sealing: dict[Slot, Sealing] = {}  # {host slot}; newer than what `_seals` has
        self._leaving: dict[Slot, Event] = {}  # {device slot: the last copy out of it}
        self._staged: dict[Fetch, torch.Tensor] = {}
        self._arrival: Event | None = None  # of the last payload

    def copy(self, action: Copy) -> bool:
        if Tier.HOST not in (action.source, action.target):
            self.copy_now(action)
        elif action.source is Tier.HOST:
            self._jobs.put(self._bring(action))
            return False
        else:
            self._jobs.put(self._send_down(action))
        return True

    def copy_now(self, action: Copy) -> None:
        """Waits for it, and needs no copier."""
        if action.source is Tier.HOST:
            _carry_out(self._bring(action), self._arenas, self._streams.up)
        elif action.target is Tier.HOST:
            _make_seal(self._send_down(action), self._arenas)
        else:
            self._fence([action.target_slot])
            super().copy_now(action)

    def _send_down(self, action: Copy) -> MakeSeal:
        source, target = self._arenas[Tier.DEVICE], self._arenas[Tier.HOST]
        down = self._streams.down
        down.wait(self._streams.compute.record())
        down.copy(source.blocks[action.source_slot], target.blocks[action.target_slot])
        arrived = self._leaving[action.source_slot] = down.record()
        sealing = self._sealing[action.target_slot] = Sealing(action.key, Future())
        return MakeSeal(action.target_slot, arrived, sealing)

    def _bring(self, action: Copy) -> Bring:
        slot = action.source_slot
        sealing = self._sealing.get(slot) or Sealing.of(self._seals[slot])
        return Bring(action, self._behind(action.target_slot), sealing)

    def _behind(self, slot: Slot) -> tuple[Event, ...]:
        """What a copy into a device slot must wait for."""
        leaving = self._leaving.pop(slot, None)
        now = self._streams.compute.record()
        return (now,) if leaving is None else (now, leaving)

    def fence(self, batch: Batch) -> None:
        if self._leaving:
            size = self._block_tokens
            self._fence(
                [
                    segment.table[at]
                    for segment in batch.segments
                    for at in range(
                        (segment.context - segment.count) // size, -(-segment.context // size)
                    )
                ]
            )

    def _fence(self, slots: list[Slot]) -> None:
        for slot in slots:
            if (leaving := self._leaving.pop(slot, None)) is not None:
                self._streams.compute.wait(leaving)

    # -- the disk's side ---------------------------------------------------------------------------------------------

    def payload(self, action: Spill) -> memoryview:
        if action.source is Tier.HOST:
            return super().payload(action)
        arena, slot, down = self._arenas[Tier.DEVICE], action.source_slot, self._streams.down
        if len(action.tokens) < self._block_tokens:
            self._fence([slot])
            arena.clear_from(slot, len(action.tokens))
        staged = self._stage()
        down.wait(self._streams.compute.record())
        down.copy(arena.blocks[slot].flatten().view(torch.uint8), staged)
        self._arrival = down.record()
        return staged.numpy().data

    def arrival(self) -> Callable[[], None]:
        last = self._arrival
        return super().arrival() if last is None else last.wait

    def confirm(self, action: Spill) -> None:
        if (
            action.source is Tier.HOST
            and (sealing := self._sealing.pop(action.source_slot, None)) is not None
        ):
            self._seals[action.source_slot] = sealing.made()
        super().confirm(action)

    def buffer(self, action: Fetch) -> memoryview:
        assert action.target is Tier.DEVICE, "what is read from disk goes to the model"
        staged = self._staged[action] = self._stage()
        return staged.numpy().data

    def settle(self, action: Fetch) -> None:
        staged, up = self._staged.pop(action), self._streams.up
        for event in self._behind(action.target_slot):
            up.wait(event)
        slot = self._arenas[Tier.DEVICE].blocks[action.target_slot]
        up.copy(staged, slot.flatten().view(torch.uint8))
        self._streams.compute.wait(up.record())

    def abandon(self, action: Fetch) -> None:
        self._staged.pop(action, None)

    def _stage(self) -> torch.Tensor:
        on_gpu = self._arenas[Tier.DEVICE].device.type == "cuda"
        return torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=on_gpu)


class Copier:
    """One of the threads that carry out a memory's jobs. `run` is one call for a thread's whole life."""

    def __init__(
        self,
        jobs: SimpleQueue[Job],
        arenas: Mapping[Tier, Arena],
        up: Stream,
        reply: Callable[[Landed | Failed], None],
    ) -> None:
        self._jobs = jobs
        self._arenas = arenas
        self._up = up
        self._reply = reply

    def run(self) -> None:
        while self.take():
            pass

    def take(self) -> bool:
        """Carry out one job, waiting for it; False: it was a stop."""
        match self._jobs.get():
            case MakeSeal() as job:
                _make_seal(job, self._arenas)
            case Bring() as bring:
                try:
                    _carry_out(bring, self._arenas, self._up)
                except StoreError as error:
                    self._reply(Failed(bring.action, error.reason))
                else:
                    self._reply(Landed(bring.action))
            case Stop():
                return False
        return True

    def stop(self) -> None:
        """Everything queued before is carried out first, by whichever thread."""
        self._jobs.put(Stop())


def _make_seal(job: MakeSeal, arenas: Mapping[Tier, Arena]) -> None:
    job.arrived.wait()
    job.sealing.digest.set_result(arenas[Tier.HOST].digest(job.slot))


def _carry_out(bring: Bring, arenas: Mapping[Tier, Arena], up: Stream) -> None:
    """Raises `StoreError` where the host slot does not hold what was put there."""
    action, host = bring.action, arenas[Tier.HOST]
    put = bring.sealing.made()  # waits until the bytes are there
    for event in bring.behind:
        up.wait(event)
    up.copy(host.blocks[action.source_slot], arenas[Tier.DEVICE].blocks[action.target_slot])
    arrived = up.record()
    found = Seal(action.key, host.digest(action.source_slot))
    arrived.wait()  # also before it is refused: the slot is somebody else's then
    put.check(action.source_slot, found)


@dataclass(frozen=True, slots=True, eq=False)
class Transfers:
    """A GPU's memory and the threads that it needs."""

    memory: CudaMemory
    workers: tuple[Copier | Pinner, ...]  # each is run by a thread of its own, and ends by `stop`
    pinner: Pinner | None

    @classmethod
    def of(
        cls,
        arenas: Mapping[Tier, Arena],
        block_tokens: int,
        reply: Callable[[Landed | Failed], None],
    ) -> Transfers:
        """The first piece of the host tier is pinned at once: that is where copies are measured."""
        streams = Streams(CudaStream(), CudaStream.new(), CudaStream.new())
        jobs: SimpleQueue[Job] = SimpleQueue()
        memory = CudaMemory(arenas, block_tokens, streams, jobs)
        if Tier.HOST not in arenas:
            return cls(memory, (), None)
        pinner = Pinner(arenas[Tier.HOST])
        pinner.pin_next()
        copiers = [Copier(jobs, arenas, streams.up, reply) for _ in range(COPIERS)]
        return cls(memory, (*copiers, pinner), pinner)

    def close(self) -> None:
        """When all threads have ended."""
        if self.pinner is not None:
            self.pinner.release()


class CudaStream:
    """`stream` None: whatever the calling thread's own is."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream

    @classmethod
    def new(cls) -> CudaStream:
        return cls(torch.cuda.Stream())  # type: ignore[no-untyped-call]

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        with torch.cuda.stream(self._own()):
            target.copy_(source, non_blocking=True)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._own().wait_event(event.event)

    def record(self) -> CudaEvent:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._own())
        return CudaEvent(event)

    def _own(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream()


@dataclass(frozen=True, slots=True)
class CudaEvent:
    event: torch.cuda.Event

    def wait(self) -> None:
        self.event.synchronize()


def pieces(slots: int, block_bytes: int, piece_bytes: int = PIECE_BYTES) -> list[tuple[int, int]]:
    """[first, behind the last) slots of each piece that is pinned by itself: whole pages, so that no two share one."""
    least = _PAGE_BYTES // math.gcd(block_bytes, _PAGE_BYTES)  # slots that fill whole pages
    count = max(1, piece_bytes // (least * block_bytes)) * least
    return [(first, min(first + count, slots)) for first in range(0, slots, count)]


class Pinner:
    """Pins a CPU arena piece by piece. What cannot be pinned stays as it is, and its copies slow."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._waiting = pieces(arena.slots, arena.block_bytes)[::-1]
        self._pinned: list[int] = []  # addresses
        self._stopped = False

    def run(self) -> None:
        while not self._stopped and self.pin_next():
            pass
        log.info("%d pieces of the host tier are pinned", len(self._pinned))

    def pin_next(self) -> bool:
        """False: there is no more to pin."""
        if not self._waiting:
            return False
        first, behind = self._waiting.pop()
        address = self._arena.blocks[first].data_ptr()
        size = (behind - first) * self._arena.block_bytes
        size = -(-size // _PAGE_BYTES) * _PAGE_BYTES
        error = _runtime().cudaHostRegister(address, size, 0)
        if int(error):
            log.warning("the host tier is not pinned from slot %d on: CUDA error %s", first, error)
            self._waiting.clear()
            return False
        self._pinned.append(address)
        return True

    def stop(self) -> None:
        """After the piece that is being pinned now."""
        self._stopped = True

    def release(self) -> None:
        """Before the arena goes. Nobody copies any more."""
        while self._pinned:
            _runtime().cudaHostUnregister(self._pinned.pop())


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
