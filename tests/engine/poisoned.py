"""Memory whose arriving slots are scribbled over first, so that bytes which are used before they landed show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.memory import Memory

if TYPE_CHECKING:
    from tiers.block import Copy, Fetch, Tier

SCRIBBLE = 0xFF  # in every byte: NaN, in float32 and in bfloat16


class Poisoned(Memory):
    """For rigs: as `Memory`, for CPU arenas."""

    def buffer(self, action: Fetch) -> memoryview:
        self._scribble(action.target, action.target_slot)
        return super().buffer(action)

    def abandon(self, action: Fetch) -> None:
        super().abandon(action)
        self._scribble(action.target, action.target_slot)

    def copy(self, action: Copy) -> bool:
        self._scribble(action.target, action.target_slot)
        return super().copy(action)

    def _scribble(self, tier: Tier, slot: int) -> None:
        view = self._arenas[tier].view(slot)
        view[:] = bytes([SCRIBBLE]) * view.nbytes
