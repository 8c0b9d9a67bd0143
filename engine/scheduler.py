"""Which sequences run in the next step, and how many tokens of each. Pure: no clock, no tensors, no waiting.

Laws
    A step feeds at most `step_tokens` tokens, or one per running sequence if those are more.
    Every running sequence is in every plan: a sequence that only decodes gets its token, whatever others prefill.
    While anything decodes, prefills together get at most `mixed_tokens`, so a long prompt cannot stop running streams.
    Prefills share what is left evenly (a short delta beside a long prompt is done after one step); none gets nothing.
    Sequences are admitted in arrival order; one that does not fit holds back those behind it, so nothing starves.

How: `waiting` is a queue. `admissible` names its head when there is room for it; the engine then loads it. `plan` gives
decodes one token each and fills the rest by water-filling: the shortest pending first, each at most an even share.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.sequence import Phase

if TYPE_CHECKING:
    from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Feed the next `count` pending tokens of `sequence`."""

    sequence: Sequence
    count: int


class Scheduler:
    """Owns who waits, who loads and who runs. `device_slots` and `block_tokens` bound what may run at once."""

    def __init__(
        self,
        *,
        step_tokens: int,
        mixed_tokens: int,
        max_running: int,
        max_waiting: int,
        device_slots: int,
        block_tokens: int,
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.loading: list[Sequence] = []
        self.running: list[Sequence] = []
        self._step_tokens = step_tokens
        self._mixed_tokens = mixed_tokens
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._device_slots = device_slots
        self._block_tokens = block_tokens

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.loading or self.running)

    @property
    def context_limit(self) -> int:
        """Tokens one sequence can ever hold: the device less one slot for the private copy of a shared block."""
        return (self._device_slots - 1) * self._block_tokens

    def accepts(self) -> bool:
        return len(self.waiting) < self._max_waiting

    def enqueue(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def admissible(self) -> Sequence | None:
        """The head of the queue, if it may start beside those that hold slots already."""
        if not self.waiting:
            return None
        head = self.waiting[0]
        active = [*self.loading, *self.running]
        if not active:
            return head
        if len(active) >= self._max_running:
            return None
        needed = sum(map(self._slots_for, active)) + self._slots_for(head)
        return head if needed <= self._device_slots else None

    def start_loading(self, sequence: Sequence) -> None:
        assert self.waiting[0] is sequence
        self.waiting.popleft()
        sequence.phase = Phase.LOADING
        self.loading.append(sequence)

    def start_running(self, sequence: Sequence) -> None:
        self.loading.remove(sequence)
        sequence.phase = Phase.RUNNING
        self.running.append(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue: it has waited already."""
        self.running.remove(sequence)
        sequence.phase = Phase.WAITING
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        match sequence.phase:
            case Phase.WAITING:
                self.waiting.remove(sequence)
            case Phase.LOADING:
                self.loading.remove(sequence)
            case Phase.RUNNING:
                self.running.remove(sequence)

    def victim(self, keep: Sequence) -> Sequence | None:
        """Whom to preempt so that `keep` can go on: the one that started last, never `keep` itself."""
        return next((s for s in reversed(self.running) if s is not keep), None)

    def plan(self) -> list[Chunk]:
        """The next step's chunks, decodes first. Every running sequence has exactly one."""
        decodes = [s for s in self.running if s.pending == 1]
        prefills = sorted((s for s in self.running if s.pending > 1), key=lambda s: s.pending)
        chunks = [Chunk(s, 1) for s in decodes]
        budget = self._step_tokens - len(decodes)
        if decodes:
            budget = min(budget, self._mixed_tokens)
        for position, sequence in enumerate(prefills):
            share = budget // (len(prefills) - position)
            count = max(1, min(sequence.pending, share))
            chunks.append(Chunk(sequence, count))
            budget = max(0, budget - count)
        return chunks

    def _slots_for(self, sequence: Sequence) -> int:
        """Slots of its tokens so far and the next one, and one for the private copy of a shared tail."""
        return len(sequence.tokens) // self._block_tokens + 2
