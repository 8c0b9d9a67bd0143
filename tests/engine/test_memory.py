"""The host tier gives back what it was given, or says that it cannot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.memory import Memory
from tests.engine.poisoned import Poisoned
from tiers.arena import Arena, Geometry, copy_block_hashed
from tiers.block import Copy, Fetch, Spill, StoreError, Tier, chain_key, root_key

GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=4, block_tokens=4, dtype_name="float32")
SLOTS = 4
ROOT = root_key(b"f" * 32, b"")
SIZE = GEOMETRY.block_bytes


def key(number: int):
    return chain_key(ROOT, (number,))


def memory(kind=Memory) -> tuple[Memory, Arena, Arena]:
    device, host = Arena(GEOMETRY, SLOTS), Arena(GEOMETRY, SLOTS)
    for arena in (device, host):
        arena.blocks.view(torch.uint8).random_(0, 255)
    return kind({Tier.DEVICE: device, Tier.HOST: host}, GEOMETRY.block_tokens), device, host


def down(number: int, slot: int, to: int) -> Copy:
    return Copy(key(number), Tier.DEVICE, slot, Tier.HOST, to)


def up(number: int, slot: int, to: int) -> Copy:
    return Copy(key(number), Tier.HOST, slot, Tier.DEVICE, to)


def spill(number: int, slot: int, tokens: int = 4, source: Tier = Tier.HOST) -> Spill:
    return Spill(key(number), ROOT, ROOT, 0, tuple(range(tokens)), source, slot, 0)


def reason(call, action) -> str:
    with pytest.raises(StoreError) as caught:
        call(action)
    return caught.value.reason


@pytest.mark.parametrize("kind", [Memory, Poisoned])
def test_what_went_down_comes_up_bit_by_bit(kind):
    own, device, host = memory(kind)
    sent = bytes(device.view(1))
    own.copy(down(7, 1, 3))
    assert host.view(3) == sent
    device.view(1)[:] = bytes(SIZE)
    own.copy(up(7, 3, 2))
    assert device.view(2) == sent
    assert own.payload(spill(7, 3)) == sent


def test_a_hundred_trips_change_no_bit():
    own, device, _ = memory()
    sent = bytes(device.view(0))
    for _ in range(100):
        own.copy(down(7, 0, 2))
        own.copy(up(7, 2, 1))
        own.copy(down(7, 1, 0))
        own.copy(up(7, 0, 0))
    assert device.view(0) == sent


@given(bit=st.integers(0, 8 * SIZE - 1))
def test_any_flipped_bit_on_the_host_is_refused_on_every_way_out(bit):
    own, _, host = memory()
    own.copy(down(7, 1, 3))
    own.payload(spill(7, 3))
    host.view(3)[bit // 8] ^= 1 << bit % 8
    assert reason(own.copy, up(7, 3, 2)) == "checksum"
    assert reason(own.payload, spill(7, 3)) == "checksum"
    assert reason(own.payload, spill(7, 3, tokens=2)) == "checksum"
    assert reason(own.confirm, spill(7, 3)) == "checksum"
    own.copy(down(8, 0, 3))  # the slot itself is as good as before
    own.copy(up(8, 3, 2))


def test_a_misdirected_or_stale_block_is_refused():
    own, device, host = memory()
    own.copy(down(7, 0, 2))
    own.copy(down(8, 1, 3))
    stale = bytes(host.view(2))
    host.view(2)[:] = host.view(3)
    assert reason(own.copy, up(7, 2, 2)) == "checksum"
    own.copy(down(9, 3, 2))
    host.view(2)[:] = stale  # bytes that lay here before, and were right then
    assert reason(own.copy, up(9, 2, 2)) == "checksum"
    assert reason(own.copy, up(7, 3, 2)) == "key"
    own.copy(up(8, 3, 2))
    assert device.view(2) == device.view(1)


def test_a_slot_that_was_never_filled_has_nothing_to_give():
    own, _, _ = memory()
    with pytest.raises(KeyError):
        own.copy(up(7, 3, 2))


def test_a_tail_on_the_host_is_cleared_for_the_disk_and_still_good_afterwards():
    own, device, host = memory()
    own.copy(down(7, 1, 3))
    payload = own.payload(spill(7, 3, tokens=3))
    assert payload == host.view(3)
    kept, sent = (arena.blocks.view(torch.int32) for arena in (host, device))  # NaN equals nothing
    assert (kept[3, :, :, :, :3] == sent[1, :, :, :, :3]).all()
    assert not host.blocks[3, :, :, :, 3:].any()
    own.confirm(spill(7, 3, tokens=3))
    own.copy(up(7, 3, 2))
    host.view(3)[SIZE - 1] ^= 1  # in a row that nobody reads: refused all the same
    assert reason(own.copy, up(7, 3, 2)) == "checksum"


def test_spills_from_the_device_are_not_sealed():
    own, device, _ = memory()
    action = spill(7, 1, source=Tier.DEVICE)
    assert own.payload(action) == device.view(1)
    device.view(1)[5] ^= 1
    own.confirm(action)


def test_poison_shows_in_every_slot_that_did_not_land():
    own, device, _ = memory(Poisoned)
    fetch = Fetch(key(7), ROOT, (1,), Tier.DEVICE, 2)
    own.buffer(fetch)[: SIZE // 2] = bytes(SIZE // 2)
    assert device.blocks[2].isnan().sum() == device.blocks[2].numel() / 2
    own.abandon(fetch)
    assert device.blocks[2].isnan().all()


@pytest.mark.parametrize("pieces", [0.5, 1, 2.5])
def test_copying_in_pieces_hashes_as_one(pieces, monkeypatch):
    monkeypatch.setattr("tiers.hashed_copy._PIECE_BYTES", int(SIZE / pieces))
    _, device, host = memory()
    neighbours = [bytes(host.view(slot)) for slot in (0, 1, 3)]
    assert copy_block_hashed(device, 1, host, 2) == device.digest(1) == host.digest(2)
    assert host.view(2) == device.view(1)
    assert [bytes(host.view(slot)) for slot in (0, 1, 3)] == neighbours
    assert len({arena.digest(slot) for arena in (device, host) for slot in range(SLOTS)}) == 7


def test_blocks_of_another_shape_are_not_copied():
    other = Arena(Geometry(1, 2, 4, 4, "float32"), 1)
    with pytest.raises(AssertionError, match="different shapes"):
        copy_block_hashed(other, 0, memory()[1], 0)
