"""Which sequences run in the next step, and how many tokens of each. Pure: no clock, no tensors, no waiting; how long a step
took, it is told.

Laws
    A step feeds at most `step_tokens` tokens, or one per running sequence if those are more.
    Every sequence that only decodes is in every plan and gets its token, whatever others prefill.
    While anything decodes, prefills together get at most `mixed_tokens` of a step, which bounds the gap between two tokens of
    a stream, and at most `prefill_share` of the time, which bounds the mean gap: with three quarters, streams are a
    quarter as fast as alone, whatever the machine. What a step took for prefills is owed to decodes, which run alone
    until they have had it; then prefills are in the plan again, so they do not starve.
    Prefills share what is left evenly (a short delta beside a long prompt is done after one step); none gets nothing.
    The tenant who has the fewest sequences under way is next, each tenant's own in arrival order, as are tenants who have
    as many. One that is next and does not fit holds back those behind it, so nothing starves.
    At most `max_loading` sequences restore from disk at once. Those that wait for that, or for the disk to say what it
    has of them, hold nothing and are passed by others that need no disk.
    A chunk never crosses the end of a range: what stands behind a hole has its KV already.

How: `waiting` is a queue. `admissible` names the one that may start; the engine then loads it. `plan` gives
decodes one token each and fills the rest by water-filling: the shortest range first, each at most an even share.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.sequence import Phase

if TYPE_CHECKING:
    from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Feed tokens [begin, end) of `sequence`: the first of its next range. Behind a decode's, what it may say next."""

    sequence: Sequence
    begin: int
    end: int
    draft: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Tokens that the model is fed."""
        return self.end - self.begin + len(self.draft)

    @property
    def decodes(self) -> bool:
        """One token whose KV is missing, and then the next one."""
        return self.samples and self.end - self.begin == 1

    @property
    def samples(self) -> bool:
        """Whether the logits of its last token choose the next one."""
        return self.end == len(self.sequence.tokens) and not self.sequence.prefill_only


class Scheduler:
    """Owns who waits, who loads and who runs. `device_slots` and `block_tokens` bound what may run at once."""

    def __init__(
        self,
        *,
        step_tokens: int,
        mixed_tokens: int,
        prefill_share: float,
        max_running: int,
        max_waiting: int,
        max_loading: int,
        device_slots: int,
        block_tokens: int,
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.loading: list[Sequence] = []
        self.running: list[Sequence] = []
        self._step_tokens = step_tokens
        self._mixed_tokens = mixed_tokens
        self._owed_per_second = (1 - prefill_share) / prefill_share
        self._owed_s = 0.0  # to decodes, for the last step that also prefilled
        self._decode_s = 0.0  # what decodes alone took last
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._max_loading = max_loading
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

    def may_read(self) -> bool:
        """Whether one more sequence may restore from disk."""
        return sum(each.reads_disk for each in self.loading) < self._max_loading

    def admissible(self) -> Sequence | None:
        """Who is next of those that do not wait for the disk, if it may start beside those that hold slots."""
        may_read = self.may_read()
        active = [*self.loading, *self.running]
        under_way = Counter(s.tenant for s in active)
        first = min(
            (s for s in self.waiting if not s.looking_up and (may_read or not s.reads_disk)),
            key=lambda s: under_way[s.tenant],
            default=None,
        )
        if first is None or not active:
            return first
        if len(active) >= self._max_running:
            return None
        needed = sum(map(self._slots_for, active)) + self._slots_for(first)
        return first if needed <= self._device_slots else None

    def start_loading(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
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

    def took(self, decodes: int, prefills: int, seconds: float) -> None:
        """A step of so many chunks is over."""
        if not prefills:
            self._decode_s = seconds
            self._owed_s -= seconds
        elif decodes:
            self._owed_s = (seconds - self._decode_s) * self._owed_per_second

    def plan(self) -> list[Chunk]:
        """The next step's chunks, decodes first. A running sequence has one at most: none if it prefills and decodes are owed time."""
        decodes = [s for s in self.running if s.pending == 1]
        prefills = sorted((s for s in self.running if s.pending > 1), key=_next_tokens)
        chunks = [Chunk(s, *s.next_range) for s in decodes]
        budget = self._step_tokens - len(decodes)
        if decodes:
            budget = min(budget, self._mixed_tokens)
            if self._owed_s > 0:
                return chunks
        for position, sequence in enumerate(prefills):
            share = budget // (len(prefills) - position)
            begin, until = sequence.next_range
            end = min(until, begin + max(1, share))
            chunks.append(Chunk(sequence, begin, end))
            budget = max(0, budget - (end - begin))
        return chunks

    def _slots_for(self, sequence: Sequence) -> int:
        """Slots of its tokens so far and the next one, and one for the private copy of a shared tail."""
        return len(sequence.tokens) // self._block_tokens + 2


def _next_tokens(sequence: Sequence) -> int:
    begin, end = sequence.next_range
    return end - begin
