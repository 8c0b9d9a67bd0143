"""How many turns may be under way, how many may wait, and for how long.

`Queue` is the rule: pure, with `now` passed in. `Admission` is its edge: who waits, sleeps on an event with a deadline.

Laws
    At most `max_turns` turns are admitted and `max_queued` wait; one more is refused at once, never silently.
    First come, first served: nobody who waits is overtaken, and a place that becomes free is given away at once.
    Who leaves while waiting costs nothing, and admitted work is never shed.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from broker.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_PACE = 0.2  # weight of the newest turn in the running mean of their lengths (guessed)
_FIRST_MEAN_S = 5.0  # until a turn has ended (guessed)


class Ticket:
    """One turn's place. Compared by identity."""

    __slots__ = ("admitted_at",)

    def __init__(self) -> None:
        self.admitted_at: float | None = None


@dataclass(frozen=True, slots=True)
class AdmissionStatistics:
    admitted: int
    waiting: int
    refused_total: int


class Queue:
    """The bounded first-in first-out rule."""

    def __init__(self, *, max_turns: int, max_queued: int) -> None:
        self._max_turns = max_turns
        self._max_queued = max_queued
        self._admitted: set[Ticket] = set()
        self._waiting: deque[Ticket] = deque()
        self._mean_s = _FIRST_MEAN_S
        self._refused = 0

    def arrive(self, now: float) -> Ticket:
        """A place, or a place in the line. Raises Overloaded when the line is full."""
        ticket = Ticket()
        if len(self._admitted) < self._max_turns:
            self._admit(ticket, now)
        elif len(self._waiting) < self._max_queued:
            self._waiting.append(ticket)
        else:
            raise self.refusal()
        return ticket

    def depart(self, ticket: Ticket, now: float) -> Ticket | None:
        """Give a place back, admitted or waiting; returns whom it went to."""
        if ticket.admitted_at is None:
            self._waiting.remove(ticket)
            return None
        self._admitted.remove(ticket)
        self._mean_s += _PACE * (now - ticket.admitted_at - self._mean_s)
        if not self._waiting:
            return None
        following = self._waiting.popleft()
        self._admit(following, now)
        return following

    def refusal(self) -> Overloaded:
        """Count a refusal and word it. The hint is how long the present line should take, within reason."""
        self._refused += 1
        wait_s = self._mean_s * (len(self._waiting) + 1) / self._max_turns
        return Overloaded(
            "Too many turns are waiting; try again.", retry_after_s=min(max(wait_s, 1.0), 60.0)
        )

    def statistics(self) -> AdmissionStatistics:
        return AdmissionStatistics(len(self._admitted), len(self._waiting), self._refused)

    def _admit(self, ticket: Ticket, now: float) -> None:
        ticket.admitted_at = now
        self._admitted.add(ticket)


class Admission:
    """The edge of `Queue`: `async with admission.place()` around a turn."""

    def __init__(self, *, max_turns: int, max_queued: int, queue_timeout_s: float) -> None:
        self._queue = Queue(max_turns=max_turns, max_queued=max_queued)
        self._timeout_s = queue_timeout_s
        self._admitted: dict[Ticket, trio.Event] = {}  # {who waits: set when admitted}

    @asynccontextmanager
    async def place(self, *, patient: bool = False) -> AsyncIterator[None]:
        """Wait for a place and hold it. Raises Overloaded when the line is full, or too slow for someone who waits.

        A `patient` turn has nobody who waits: it stays in the line as long as it takes.
        """
        ticket = self._queue.arrive(trio.current_time())
        try:
            if ticket.admitted_at is None:
                await self._wait(ticket, math.inf if patient else self._timeout_s)
            yield
        finally:
            following = self._queue.depart(ticket, trio.current_time())
            if following is not None:
                self._admitted[following].set()

    def statistics(self) -> AdmissionStatistics:
        return self._queue.statistics()

    async def _wait(self, ticket: Ticket, timeout_s: float) -> None:
        self._admitted[ticket] = trio.Event()
        try:
            with trio.move_on_after(timeout_s):
                await self._admitted[ticket].wait()
        finally:
            del self._admitted[ticket]
        if ticket.admitted_at is None:
            raise self._queue.refusal()
