"""Copies beside the model, on the CPU: streams that run when they like, kept in order by nothing but what they wait for.

Every copy, write and read is a closure in its stream's queue. Which stream runs next is drawn at random, so whatever is not
ordered by an event happens in the wrong order sooner or later.
"""

from __future__ import annotations

import random
from collections import deque
from queue import SimpleQueue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch, Segment
from engine.copies import Copies
from engine.memory import Seal
from engine.transfers import Copier, CudaMemory, Streams, pieces
from tiers.arena import Arena, Geometry
from tiers.block import Copy, Fetch, Spill, Tier, chain_key, root_key
from tiers.disk import Failed, Landed

GEOMETRY = Geometry(layers=1, kv_heads=1, head_dim=2, block_tokens=2, dtype_name="float32")
SLOTS = 3
ROOT = root_key(b"f" * 32, b"")


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.done = False

    def wait(self) -> None:
        while not self.done:
            assert self.device.run_one(), "it waits for what will never happen"


class Lane:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.queue = deque()  # closures, and events to wait for

    def do(self, work) -> None:
        self.queue.append(work)

    def copy(self, source, target) -> None:
        self.do(lambda: target.copy_(source))

    def wait(self, event) -> None:
        self.queue.append(event)

    def record(self) -> Event:
        event = Event(self.device)
        self.do(lambda: setattr(event, "done", True))
        return event

    @property
    def can_run(self) -> bool:
        while self.queue and isinstance(self.queue[0], Event) and self.queue[0].done:
            self.queue.popleft()
        return bool(self.queue) and not isinstance(self.queue[0], Event)


class Device:
    """Three streams, run in any order that they allow."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.compute, self.down, self.up = (Lane(self) for _ in range(3))

    def run_one(self) -> bool:
        able = [lane for lane in (self.compute, self.down, self.up) if lane.can_run]
        if not able:
            return False
        self.random.choice(able).queue.popleft()()
        return True


class Rig:
    """Obeys the tables: nothing is done to a slot that a copy up or a spill is busy with."""

    def __init__(self, seed: int = 0) -> None:
        self.gpu = Device(seed)
        self.device, self.host = Arena(GEOMETRY, SLOTS), Arena(GEOMETRY, SLOTS)
        arenas = {Tier.DEVICE: self.device, Tier.HOST: self.host}
        self.jobs = SimpleQueue()
        streams = Streams(self.gpu.compute, self.gpu.down, self.gpu.up)
        self.memory = CudaMemory(arenas, GEOMETRY.block_tokens, streams, self.jobs)
        self.replies = []
        self.copier = Copier(self.jobs, arenas, self.gpu.up, self.answer)
        self.on_device = [self.stamp(-1.0 - slot) for slot in range(SLOTS)]
        for slot, stamp in enumerate(self.on_device):
            self.device.blocks[slot] = stamp
        self.on_host: list[tuple[int, torch.Tensor] | None] = [
            None
        ] * SLOTS  # (key's number, bytes)
        self.bringing: dict[Copy, torch.Tensor] = {}
        self.spilling: list[tuple[Spill, memoryview, object, bytes]] = []
        self.seen: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # (what the model read, what was there)
        self.stamps = 0

    def stamp(self, value: float | None = None) -> torch.Tensor:
        if value is None:
            self.stamps += 1
            value = float(self.stamps)
        return torch.full(GEOMETRY.shape, value)

    def key(self, number: int):
        return chain_key(ROOT, (number,))

    def answer(self, reply) -> None:
        self.replies.append(reply)
        expected = self.bringing.pop(reply.action)
        if isinstance(reply, Landed):
            assert torch.equal(self.device.blocks[reply.action.target_slot], expected)

    def busy_device(self) -> set[int]:
        spilled = {spill.source_slot for spill, *_ in self.spilling if spill.source is Tier.DEVICE}
        return spilled | {copy.target_slot for copy in self.bringing}

    def busy_host(self) -> set[int]:
        return {copy.source_slot for copy in self.bringing}

    def work(self) -> None:
        while not self.jobs.empty():
            self.copier.take()

    def write(self, slot: int) -> None:
        """A step of the model that fills a slot's rows."""
        self.memory.fence(Batch([0], [0], [Segment(0, 2, 2, [slot], logits=1)]))
        stamp = self.on_device[slot] = self.stamp()
        self.gpu.compute.copy(stamp, self.device.blocks[slot])

    def read(self, slot: int) -> None:
        place, expected = self.device.blocks[slot], self.on_device[slot]
        self.gpu.compute.do(lambda: self.seen.append((place.clone(), expected)))

    def send_down(self, slot: int, to: int) -> None:
        self.stamps += 1
        self.on_host[to] = self.stamps, self.on_device[slot]
        assert self.memory.copy(Copy(self.key(self.stamps), Tier.DEVICE, slot, Tier.HOST, to))

    def bring(self, slot: int, to: int) -> None:
        number, stamp = self.on_host[slot]
        action = Copy(self.key(number), Tier.HOST, slot, Tier.DEVICE, to)
        self.bringing[action] = stamp
        self.on_device[to] = stamp
        assert not self.memory.copy(action)

    def private(self, slot: int, to: int) -> None:
        """The model's own copy, on its stream: a fake one, because torch's would be made at once."""
        self.memory._fence([to])
        source, target = self.device.blocks[slot], self.device.blocks[to]
        self.on_device[to] = self.on_device[slot]
        self.gpu.compute.copy(source, target)

    def fetch(self, to: int) -> None:
        self.stamps += 1
        action = Fetch(self.key(self.stamps), ROOT, (1, 2), Tier.DEVICE, to)
        stamp = self.on_device[to] = self.stamp()
        self.memory.buffer(action)[:] = stamp.numpy().tobytes()
        self.memory.settle(action)

    def spill(self, slot: int) -> None:
        self.stamps += 1
        action = Spill(self.key(self.stamps), ROOT, ROOT, 0, (1, 2), Tier.DEVICE, slot, 0)
        view = self.memory.payload(action)
        expected = self.on_device[slot].numpy().tobytes()
        self.spilling.append((action, view, self.memory.arrival(), expected))

    def write_out(self) -> None:
        for _, view, arrived, expected in self.spilling:
            arrived()
            assert bytes(view) == expected
        self.spilling.clear()

    def finish(self) -> None:
        self.write_out()
        self.work()
        while self.gpu.run_one():
            pass
        assert not any(lane.queue for lane in (self.gpu.compute, self.gpu.down, self.gpu.up))
        assert not self.bringing
        for slot, stamp in enumerate(self.on_device):
            assert torch.equal(self.device.blocks[slot], stamp)
        for slot, held in enumerate(self.on_host):
            assert held is None or torch.equal(self.host.blocks[slot], held[1])
        for read, expected in self.seen:
            assert torch.equal(read, expected)


STEP = st.tuples(
    st.sampled_from(
        [
            "write",
            "read",
            "down",
            "bring",
            "fetch",
            "swap",
            "spill",
            "private",
            "work",
            "out",
            "run",
        ]
    ),
    st.integers(0, SLOTS - 1),
    st.integers(0, SLOTS - 1),
)


@settings(max_examples=300)
@given(st.lists(STEP, min_size=4, max_size=40), st.integers(0, 2**16))
def test_in_whatever_order_streams_run_everybody_reads_what_was_meant(steps, seed):
    rig = Rig(seed)
    for kind, slot, other in steps:
        free = slot not in rig.busy_device()
        match kind:
            case "write" if free:
                rig.write(slot)
            case "read" if free:
                rig.read(slot)
            case "down" if free and other not in rig.busy_host():
                rig.send_down(slot, other)
            case "bring" if rig.on_host[slot] is not None and other not in rig.busy_device():
                if slot not in rig.busy_host():
                    rig.bring(slot, other)
            case "fetch" if free:
                rig.fetch(slot)
            case "swap" if free and other not in rig.busy_host():
                rig.send_down(slot, other)
                rig.fetch(slot)
            case "spill" if free:
                rig.spill(slot)
            case "private" if free and other not in rig.busy_device() and other != slot:
                rig.private(slot, other)
            case "work":
                rig.work()
            case "out":
                rig.write_out()
            case "run":
                for _ in range(other + 1):
                    rig.gpu.run_one()
    rig.finish()
    assert not [reply for reply in rig.replies if isinstance(reply, Failed)]


def test_a_copy_up_is_answered_only_when_its_bytes_are_there():
    rig = Rig()
    rig.send_down(0, 1)
    rig.bring(1, 2)
    assert not rig.replies
    rig.work()  # the copier waits, and checks
    assert [type(reply) for reply in rig.replies] == [Landed]
    rig.finish()


def test_copies_that_are_waited_for_need_no_copier():
    rig = Rig()
    rig.memory.copy_now(Copy(rig.key(1), Tier.DEVICE, 0, Tier.HOST, 1))
    assert torch.equal(rig.host.blocks[1], rig.on_device[0])
    rig.memory.copy_now(Copy(rig.key(1), Tier.HOST, 1, Tier.DEVICE, 2))
    assert torch.equal(rig.device.blocks[2], rig.on_device[0])
    assert rig.jobs.empty()


def test_a_flipped_bit_is_refused_and_a_block_s_key_is_checked():
    rig = Rig()
    for slot in (0, 1):
        rig.send_down(slot, slot)
    rig.work()
    rig.host.view(0)[3] ^= 1
    rig.bring(0, 2)
    rig.work()
    rig.on_host[1] = 999, rig.on_host[1][1]
    rig.bring(1, 2)
    rig.work()
    assert [reply.reason for reply in rig.replies] == ["checksum", "key"]


def test_a_spill_from_the_host_waits_for_its_seal_and_is_confirmed_by_it():
    rig = Rig()
    rig.send_down(0, 1)
    number, stamp = rig.on_host[1]
    rig.work()
    action = Spill(rig.key(number), ROOT, ROOT, 0, (1, 2), Tier.HOST, 1, 0)
    assert rig.memory.payload(action) == stamp.numpy().data.cast("B")
    assert isinstance(rig.memory._seals[1], Seal)
    rig.memory.confirm(action)
    rig.bring(1, 2)
    rig.finish()


def test_an_abandoned_fetch_writes_nothing():
    rig = Rig()
    action = Fetch(rig.key(1), ROOT, (1, 2), Tier.DEVICE, 0)
    rig.memory.buffer(action)[:] = bytes(GEOMETRY.block_bytes)
    rig.memory.abandon(action)
    rig.finish()


@pytest.mark.parametrize(
    ("slots", "block_bytes", "piece", "expected"),
    [
        (5, 4096, 8192, [(0, 2), (2, 4), (4, 5)]),
        (5, 1024, 4096, [(0, 4), (4, 5)]),
        (7, 6144, 1, [(0, 2), (2, 4), (4, 6), (6, 7)]),  # two blocks of one and a half pages
        (3, 4 << 20, 256 << 20, [(0, 3)]),
    ],
)
def test_pieces_are_whole_pages_and_leave_nobody_out(slots, block_bytes, piece, expected):
    found = pieces(slots, block_bytes, piece)
    assert found == expected
    assert all(first * block_bytes % 4096 == 0 for first, _ in found)


def test_copies_are_counted_from_the_first_to_the_last_of_a_go():
    copies = Copies()
    copies.began(1.0)
    copies.began(2.0)
    assert copies.ended() is None
    copies.began(3.0)
    assert copies.ended() is None
    assert copies.ended() == (3, 1.0)
    copies.began(9.0)
    assert copies.ended() == (1, 9.0)
