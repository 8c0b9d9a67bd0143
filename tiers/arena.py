"""The preallocated memory of a tier: KV bytes, addressed by slot. The only file here that knows torch.

Laws
    Memory is taken once, when the arena is made; nothing here allocates afterwards (but `read` off a GPU).
    A slot is one contiguous run of bytes, so moving a block is one copy, whatever the tiers are.
    The first slot begins with a page, so where blocks are whole sectors a disk can write into any slot by itself.
    An arena does not know what its slots mean: which are free, whose they are and what they hold is in the
    tables.
    `copy_block_hashed` and `digest` tell whether a slot's bytes are still those that were put there: memory forgets, too.

Layout of a block, row-major: [layers, 2 (K, V), kv_heads, block_tokens, head_dim]. Row r of a block is the
KV of its r-th token. Rows beyond a tail's tokens hold whatever was there; attention never reads them, and
`clear_from` zeroes them before a spill, so that equal blocks are equal bytes on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import xxhash

from tiers.hashed_copy import copy_hashed

if TYPE_CHECKING:
    from tiers.block import Slot


_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of one block. `dtype_name` is torch's name of the element type, such as `float32`."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype_name)
        assert isinstance(dtype, torch.dtype), f"{self.dtype_name} is not a torch dtype"
        return dtype

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, self.kv_heads, self.block_tokens, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens


class Arena:
    """`slots` blocks of one geometry on one device.

    A CPU arena is not touched when made: the operating system hands out its pages as blocks are first
    written.
    """

    __slots__ = ("_bytes", "block_bytes", "blocks", "device", "geometry", "slots")

    def __init__(self, geometry: Geometry, slots: int, device: str | torch.device = "cpu") -> None:
        assert slots > 0, "an arena needs at least one slot"
        self.geometry = geometry
        self.slots = slots
        self.device = torch.device(device)
        self.block_bytes = geometry.block_bytes
        # All the memory there will be: [slots, layers, 2, kv_heads, block_tokens, head_dim].
        shape = (slots, *geometry.shape)
        spare = _PAGE_BYTES // geometry.dtype.itemsize
        memory = torch.empty(math.prod(shape) + spare, dtype=geometry.dtype, device=self.device)
        skipped = -memory.data_ptr() % _PAGE_BYTES // geometry.dtype.itemsize
        self.blocks = memory[skipped : skipped + math.prod(shape)].view(shape)
        self._bytes = self.blocks.view(slots, -1).view(
            torch.uint8
        )  # [slots, block_bytes], the same memory

    def view(self, slot: Slot) -> memoryview:
        """One block's bytes in place, writable; for the disk threads. CPU arenas only."""
        assert self.device.type == "cpu", "only a CPU arena can be viewed in place"
        return self._bytes[slot].numpy().data

    def read(self, slot: Slot) -> memoryview:
        """One block's bytes for a spill: in place on the CPU, a fresh copy off a GPU, waited for."""
        if self.device.type == "cpu":
            return self.view(slot)
        return self._bytes[slot].cpu().numpy().data

    def write(self, slot: Slot, data: memoryview | bytes) -> None:
        """Put one block's bytes into a slot."""
        source = memoryview(data).cast("B")
        assert source.nbytes == self.block_bytes, f"{source.nbytes} bytes for {self.block_bytes}"
        if self.device.type == "cpu":
            self.view(slot)[:] = source
        else:
            staged = torch.empty(self.block_bytes, dtype=torch.uint8)
            staged.numpy().data[:] = source
            self._bytes[slot].copy_(staged)

    def digest(self, slot: Slot) -> int:
        """xxh3-64 of one block's bytes. CPU arenas only."""
        digest: int = xxhash.xxh3_64_intdigest(self.view(slot))
        return digest

    def clear_from(self, slot: Slot, row: int) -> None:
        """Zero rows [row, block_tokens) of every layer: what a tail does not use."""
        self.blocks[slot, :, :, :, row:].zero_()


def copy_block(source: Arena, source_slot: Slot, target: Arena, target_slot: Slot) -> None:
    """Copy one block between two arenas, or inside one."""
    assert source.geometry == target.geometry, "blocks of different shapes"
    target.blocks[target_slot].copy_(source.blocks[source_slot])


def copy_block_hashed(source: Arena, source_slot: Slot, target: Arena, target_slot: Slot) -> int:
    """Copy one block between two arenas; the digest of its bytes on the CPU, as they arrived where they arrive there.

    At least one of the two is on the CPU.
    """
    assert source.geometry == target.geometry, "blocks of different shapes"
    if target.device.type != "cpu":
        digest = source.digest(source_slot)
        copy_block(source, source_slot, target, target_slot)
        return digest
    if source.device.type != "cpu":
        copy_block(source, source_slot, target, target_slot)
        return target.digest(target_slot)
    hasher = xxhash.xxh3_64()
    copy_hashed(source.view(source_slot), target.view(target_slot), hasher)
    arrived: int = hasher.intdigest()
    return arrived
