"""The arenas of the memory tiers, and the bytes of each action. Decides nothing: the tables said what moves where.

Copies are made at once. For a spill, `payload` is what the disk writer reads: on a CPU arena the live bytes of a slot
that stays put until the answer, on a CUDA arena a host copy. For a fetch, `buffer` is where a disk reader puts the
verified bytes: the slot itself where memory is addressable, else a staging buffer that `settle` moves to the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiers.arena import Arena, copy_block
from tiers.block import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tiers.block import Copy, Fetch, Spill


class Memory:
    """Arenas by tier; DISK has none."""

    def __init__(self, arenas: Mapping[Tier, Arena], block_tokens: int) -> None:
        self._arenas = dict(arenas)
        self._block_tokens = block_tokens
        self._staging: dict[Fetch, bytearray] = {}

    @property
    def block_bytes(self) -> int:
        return self._arenas[Tier.DEVICE].block_bytes

    def copy(self, action: Copy) -> None:
        copy_block(
            self._arenas[action.source],
            action.source_slot,
            self._arenas[action.target],
            action.target_slot,
        )

    def payload(self, action: Spill) -> memoryview:
        """The block's bytes; a tail's unused rows are zeroed first, so that no other session's rows reach the disk."""
        arena = self._arenas[action.source]
        if len(action.tokens) < self._block_tokens:
            arena.clear_from(action.source_slot, len(action.tokens))
        return arena.read(action.source_slot)

    def buffer(self, action: Fetch) -> memoryview:
        arena = self._arenas[action.target]
        if arena.device.type == "cpu":
            return arena.view(action.target_slot)
        staging = bytearray(arena.block_bytes)
        self._staging[action] = staging
        return memoryview(staging)

    def settle(self, action: Fetch) -> None:
        """The fetched bytes are complete: move them on if they were staged."""
        if staging := self._staging.pop(action, None):
            self._arenas[action.target].write(action.target_slot, memoryview(staging))

    def abandon(self, action: Fetch) -> None:
        self._staging.pop(action, None)
