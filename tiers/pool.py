"""The slot ids of one tier: which are free, and what the others are for.

Laws
    Every slot is in exactly one state, and moves only from the state its caller believes it to be in.
    A slot that bytes are travelling to is ARRIVING until the answer, whatever became of the reason.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiers.block import Slot

if TYPE_CHECKING:
    from collections.abc import Iterator


class SlotState(enum.Enum):
    FREE = "free"
    HELD = "held"  # a block's bytes
    LENT = "lent"  # a running sequence writes here
    ARRIVING = "arriving"  # a copy is on its way here


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Slots by state; they sum to `capacity`."""

    capacity: int
    free: int
    held: int
    lent: int
    arriving: int


class Pool:
    """Hands out slots, last freed first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._states = [SlotState.FREE] * capacity  # [slot]
        self._free = [Slot(slot) for slot in reversed(range(capacity))]

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, new: SlotState) -> Slot | None:
        """A free slot, now in state `new`; None when there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self.move(slot, SlotState.FREE, new)
        return slot

    def take_many(self, most: int, new: SlotState) -> list[Slot]:
        """As many free slots as there are, up to `most`, now in state `new`."""
        at = max(0, len(self._free) - most)
        taken = self._free[at:]
        del self._free[at:]
        for slot in taken:
            self._states[slot] = new
        return taken

    def give(self, slot: Slot, old: SlotState) -> None:
        self.move(slot, old, SlotState.FREE)
        self._free.append(slot)

    def move(self, slot: Slot, old: SlotState, new: SlotState) -> None:
        assert self._states[slot] is old, (slot, self._states[slot], old, new)
        self._states[slot] = new

    def slots(self, state: SlotState) -> Iterator[Slot]:
        return (Slot(slot) for slot, found in enumerate(self._states) if found is state)

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            capacity=self.capacity,
            free=self._states.count(SlotState.FREE),
            held=self._states.count(SlotState.HELD),
            lent=self._states.count(SlotState.LENT),
            arriving=self._states.count(SlotState.ARRIVING),
        )

    def check(self) -> None:
        assert sorted(self._free) == list(self.slots(SlotState.FREE))
