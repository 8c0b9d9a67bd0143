"""Bytes in, the same bytes out, and nothing beside them."""

import numpy as np
import pytest
import torch

from tiers.arena import Arena, Geometry, copy_block

DTYPES = ("float32", "bfloat16")


def arena(dtype_name: str = "float32", slots: int = 5) -> Arena:
    made = Arena(Geometry(3, 2, 8, 4, dtype_name), slots)
    made.blocks.view(torch.uint8).random_(0, 255)
    return made


def test_geometry_counts_bytes():
    geometry = Geometry(layers=30, kv_heads=3, head_dim=64, block_tokens=32, dtype_name="float32")
    assert geometry.token_bytes == 45 * 1024
    assert geometry.block_bytes == 32 * 45 * 1024
    assert geometry.shape == (30, 2, 3, 32, 64)
    with pytest.raises(AssertionError, match="not a torch dtype"):
        _ = Geometry(1, 1, 1, 1, "nn").dtype


def test_every_slot_of_whole_sectors_begins_with_one():
    """Else a disk cannot write into it, and each block is copied once more, which nothing but the clock would tell."""
    for layers in (1, 3):
        arena = Arena(Geometry(layers, 1, 64, 32, "float32"), 5)
        begins = [torch.from_numpy(np.asarray(arena.view(slot))).data_ptr() for slot in range(5)]
        assert begins[0] % 4096 == 0
        assert all(begin % 512 == 0 for begin in begins)
        assert arena.blocks.is_contiguous()


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_views_are_the_memory_itself(dtype_name):
    own = arena(dtype_name)
    view = own.view(3)
    assert view.nbytes == own.block_bytes == own.geometry.block_bytes
    assert not view.readonly
    view[:] = bytes(own.block_bytes)
    assert own.blocks[3].count_nonzero() == 0
    own.blocks[3, 0, 0, 0, 0, 0] = 1.0
    assert bytes(view).count(0) < own.block_bytes
    assert own.read(3).obj is not None
    assert own.read(3) == view


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_write_then_read_gives_the_bytes_and_touches_no_neighbour(dtype_name):
    own = arena(dtype_name)
    before = [bytes(own.view(slot)) for slot in range(5)]
    fresh = bytes(reversed(before[2]))
    own.write(2, memoryview(fresh))
    assert own.read(2) == fresh
    assert [bytes(own.view(s)) for s in (0, 1, 3, 4)] == [before[s] for s in (0, 1, 3, 4)]


def test_write_takes_a_block_and_nothing_else():
    own = arena()
    with pytest.raises(AssertionError, match="bytes for"):
        own.write(0, memoryview(bytes(own.block_bytes - 1)))


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_copies_keep_every_bit_even_of_nan(dtype_name):
    here, there = arena(dtype_name), arena(dtype_name, slots=2)
    here.write(4, memoryview(b"\xff\x7f\xc1\xff" * (here.block_bytes // 4)))  # NaN with payloads
    sent, other = bytes(here.view(4)), bytes(there.view(0))
    copy_block(here, 4, there, 1)
    copy_block(there, 1, here, 0)
    assert bytes(there.view(1)) == bytes(here.view(0)) == bytes(here.view(4)) == sent
    assert bytes(there.view(0)) == other


def test_blocks_of_another_shape_are_not_copied():
    with pytest.raises(AssertionError, match="different shapes"):
        copy_block(arena("float32"), 0, arena("bfloat16"), 0)


@pytest.mark.parametrize("row", [0, 1, 3, 4])
def test_clear_from_zeroes_the_rows_of_every_layer(row):
    own = arena()
    own.blocks.fill_(2.0)
    own.clear_from(1, row)
    assert torch.all(own.blocks[1, :, :, :, :row] == 2)
    assert own.blocks[1, :, :, :, row:].count_nonzero() == 0
    assert torch.all(own.blocks[[0, 2, 3, 4]] == 2)
