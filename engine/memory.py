"""The arenas of the memory tiers, and the bytes of each action. Decides nothing: the tables said what moves where.

Here copies are made at once; where the device is a GPU, engine/transfers.py lets them overlap. What goes to the host
tier is sealed: the key and a digest of the bytes are kept beside the slot, and whatever leaves it, towards the device or
the disk, must still match. So neither a flipped bit in memory, nor another block's bytes, nor an older block's in a slot
that was given away, is ever attended to or written to disk.

Laws
    `copy` and `payload` raise `StoreError` with reason checksum or key where a host slot does not hold what was put
    there. The target slot's bytes are then undefined, as after any failed load. The block is worth nothing on the host.
    `confirm` is asked after a spill was written, and before it is believed: bytes that changed on the way to the disk
    have a valid record there, which must be dropped.

For a spill, `payload` is what the disk writer reads: on a CPU arena the live bytes of a slot
that stays put until the answer, on a CUDA arena a host copy, which is there after `arrival`. For a fetch, `buffer` is
where a disk reader puts the verified bytes: the slot itself where memory is addressable, else a staging buffer that
`settle` moves to the device.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiers.arena import Arena, copy_block, copy_block_hashed
from tiers.block import StoreError, Tier
from tiers.disk import nothing_to_wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from engine.batch import Batch
    from tiers.block import BlockKey, Copy, Fetch, Slot, Spill


@dataclass(frozen=True, slots=True)
class Seal:
    """What a host slot was filled with."""

    key: BlockKey
    digest: int

    def check(self, slot: Slot, found: Seal) -> None:
        """Raises `StoreError` where something else was found."""
        if self.key != found.key:
            raise StoreError("key", f"host slot {slot} holds another block than the tables say")
        if self.digest != found.digest:
            raise StoreError("checksum", f"host slot {slot} does not hold what was put there")


class Memory:
    """Arenas by tier; DISK has none."""

    def __init__(self, arenas: Mapping[Tier, Arena], block_tokens: int) -> None:
        self._arenas = dict(arenas)
        self._block_tokens = block_tokens
        self._staging: dict[Fetch, mmap.mmap] = {}  # begins with a page: see tiers/arena.py
        self._seals: dict[Slot, Seal] = {}  # {host slot: the last block that was put there}

    @property
    def block_bytes(self) -> int:
        return self._arenas[Tier.DEVICE].block_bytes

    def copy(self, action: Copy) -> bool:
        """Whether it has landed. If not, it is answered with `Landed` or `Failed`, like what goes to the disk."""
        self.copy_now(action)
        return True

    def copy_now(self, action: Copy) -> None:
        source, target = self._arenas[action.source], self._arenas[action.target]
        if Tier.HOST not in (action.source, action.target):
            copy_block(source, action.source_slot, target, action.target_slot)
            return
        digest = copy_block_hashed(source, action.source_slot, target, action.target_slot)
        if action.target is Tier.HOST:
            self._seals[action.target_slot] = Seal(action.key, digest)
        else:
            self._check(action.source_slot, Seal(action.key, digest))

    def payload(self, action: Spill) -> memoryview:
        """The block's bytes; a tail's unused rows are zeroed first, so that no other session's rows reach the disk."""
        arena, slot = self._arenas[action.source], action.source_slot
        self.confirm(action)
        if len(action.tokens) < self._block_tokens:
            arena.clear_from(slot, len(action.tokens))
            if action.source is Tier.HOST:
                self._seals[slot] = Seal(action.key, arena.digest(slot))
        return arena.read(slot)

    def arrival(self) -> Callable[[], None]:
        """Waits until all payloads so far hold their bytes. For any thread."""
        return nothing_to_wait_for

    def fence(self, batch: Batch) -> None:
        """Before a batch runs: nothing reads the slots that it writes."""

    def confirm(self, action: Spill) -> None:
        """Raises `StoreError` if the slot that was to be written does not hold what it should."""
        if action.source is Tier.HOST:
            slot = action.source_slot
            self._check(slot, Seal(action.key, self._arenas[Tier.HOST].digest(slot)))

    def _check(self, slot: Slot, found: Seal) -> None:
        self._seals[slot].check(slot, found)

    def distance(self, slot: Slot, other: Slot) -> float:
        """How far apart two device blocks are: of the worst token, relative to its length over all layers."""
        blocks = self._arenas[
            Tier.DEVICE
        ].blocks  # [slots, layers, 2, kv_heads, block_tokens, head_dim]
        one, two = blocks[slot].float(), blocks[other].float()
        all_but_token = (0, 1, 2, 4)
        apart = (one - two).square().sum(all_but_token).sqrt()
        return float((apart / one.square().sum(all_but_token).sqrt()).max())

    def buffer(self, action: Fetch) -> memoryview:
        arena = self._arenas[action.target]
        if arena.device.type == "cpu":
            return arena.view(action.target_slot)
        staging = mmap.mmap(-1, arena.block_bytes)
        self._staging[action] = staging
        return memoryview(staging)

    def settle(self, action: Fetch) -> None:
        """The fetched bytes are complete: move them on if they were staged."""
        if staging := self._staging.pop(action, None):
            self._arenas[action.target].write(action.target_slot, memoryview(staging))

    def abandon(self, action: Fetch) -> None:
        self._staging.pop(action, None)
