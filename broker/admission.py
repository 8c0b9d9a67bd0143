"""Which turns may be under way, which wait, and for how long: bounded in turns and in tokens, and fair to tenants.

`Queue` is the rule: pure, with `now` passed in. `Admission` is its edge: who waits, sleeps on an event with a deadline.
A turn's tokens are those that its prompt is thought to have (`Port` weighs it), whether they will be computed or
restored: a hundred sessions that come back at once are work too.

Laws
    At most `max_turns` turns of `max_tokens` in all are admitted; one turn is, however large. At most `max_queued` turns
    of `max_queued_tokens` wait.
    Where there are several tenants, an eighth of either is kept for those who have nothing admitted: one who fills the
    rest with long answers makes nobody wait for their end.
    A place that becomes free goes to the waiting tenant with the fewest tokens admitted; among those that have the same, to
    the one that was served longest ago. A tenant's own turns are served as they came, and who is next is not
    overtaken because he is large.
    Where the line is full, the newest turn of the tenant that has most in it makes room for a tenant with less. Otherwise
    whoever arrives is refused, at once and never silently.
    A turn that `check` refuses would be refused when it arrives, so nobody need read it.
    Whose deadline has passed is not admitted. Who leaves while waiting costs nothing. Admitted work is never shed, nor is
    a patient turn, which was promised to somebody who does not wait.
    A place is for work: who has only words left to say gives it back, so a client that does not read holds up nobody.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from broker.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

AT_ONCE = "Too many turns are waiting; try again."
IN_THE_LINE = (
    "Too many turns are waiting: this one waited, and no place became free for it; try again."
)
_KEPT = 0.125  # of the places, for tenants who have none (guessed)
_PACE = 0.2  # weight of the newest turn in the running mean of their lengths (guessed)
_FIRST_MEAN_S = 5.0  # until a turn has ended (guessed)


class Ticket:
    """One turn's place. Compared by identity."""

    __slots__ = ("admitted_at", "due", "patient", "refused", "tenant", "tokens")

    def __init__(self, tenant: str, tokens: int, due: float, *, patient: bool) -> None:
        self.tenant = tenant
        self.tokens = tokens
        self.due = due  # until when it is worth admitting
        self.patient = patient
        self.admitted_at: float | None = None
        self.refused = False  # while it waited: it made room for another tenant's


@dataclass(frozen=True, slots=True)
class AdmissionStatistics:
    admitted: int
    waiting: int
    refused_total: int
    admitted_tokens: int = 0
    waiting_tokens: int = 0


class Queue:
    """The bounded, fair rule."""

    def __init__(
        self,
        *,
        max_turns: int,
        max_queued: int,
        max_tokens: float = math.inf,
        max_queued_tokens: float = math.inf,
        several: bool = False,
    ) -> None:
        kept = _KEPT if several else 0.0
        self._max_turns = max_turns
        self._max_tokens = max_tokens
        self._most = max_turns - math.ceil(max_turns * kept), max_tokens * (1 - kept)
        self._max_queued = max_queued
        self._max_queued_tokens = max_queued_tokens
        self._admitted: set[Ticket] = set()
        self._admitted_tokens: Counter[str] = Counter()  # {tenant: tokens}
        self._admitted_turns: Counter[str] = Counter()  # {tenant: turns}
        self._lines: dict[str, deque[Ticket]] = {}  # {tenant: who waits}; served longest ago first
        self._waiting = 0
        self._waiting_tokens = 0
        self._mean_s = _FIRST_MEAN_S
        self._refused = 0

    def arrive(
        self,
        now: float,
        tenant: str = "",
        tokens: int = 0,
        *,
        wait_s: float = math.inf,
        patient: bool = False,
    ) -> tuple[Ticket, list[Ticket]]:
        """A place, or a place in the line, and whom that changed: admitted or refused. Raises Overloaded."""
        ticket = Ticket(tenant, tokens, now + wait_s, patient=patient)
        victim = self._makes_room(ticket)
        if not self._waiting and self._fits(ticket):
            self._admit(ticket, now)
            return ticket, []
        if victim is not None:
            self._leave(victim)
            victim.refused = True
        self._lines.setdefault(tenant, deque()).append(ticket)
        self._waiting += 1
        self._waiting_tokens += tokens
        changed = self._fill(now)
        return ticket, changed if victim is None else [victim, *changed]

    def check(self, tenant: str = "") -> None:
        """Raises Overloaded where `arrive` would, whatever the turn weighs; else nothing has happened."""
        self._makes_room(Ticket(tenant, 0, math.inf, patient=False))

    def depart(self, ticket: Ticket, now: float) -> list[Ticket]:
        """Give a place back, admitted or waiting; returns who was admitted for it."""
        if ticket.admitted_at is None:
            if not ticket.refused:
                self._leave(ticket)
        else:
            self._admitted.remove(ticket)
            self._admitted_tokens[ticket.tenant] -= ticket.tokens
            self._admitted_turns[ticket.tenant] -= 1
            self._mean_s += _PACE * (now - ticket.admitted_at - self._mean_s)
        return self._fill(now)

    def refusal(self, message: str = AT_ONCE) -> Overloaded:
        """Count a refusal and word it. The hint is how long the present line should take, within reason."""
        self._refused += 1
        wait_s = self._mean_s * (self._waiting + 1) / self._max_turns
        return Overloaded(message, retry_after_s=min(max(wait_s, 1.0), 60.0))

    def statistics(self) -> AdmissionStatistics:
        return AdmissionStatistics(
            len(self._admitted),
            self._waiting,
            self._refused,
            sum(self._admitted_tokens.values()),
            self._waiting_tokens,
        )

    def _fits(self, ticket: Ticket) -> bool:
        if not self._admitted:
            return True
        has_some = self._admitted_turns[ticket.tenant] > 0
        turns, tokens = self._most if has_some else (self._max_turns, self._max_tokens)
        in_all = sum(self._admitted_tokens.values()) + ticket.tokens
        return len(self._admitted) < turns and in_all <= tokens

    def _held_by(self, tenant: str) -> tuple[int, int]:
        return self._admitted_tokens[tenant], self._admitted_turns[tenant]

    def _makes_room(self, arriving: Ticket) -> Ticket | None:
        """Who must leave the line for it; None: nobody need. Raises Overloaded if nobody can."""
        if (not self._waiting and self._fits(arriving)) or not self._over(arriving):
            return None
        victim = self._heaviest(arriving)
        if victim is None or self._over(arriving, without=victim):
            raise self.refusal()
        return victim

    def _over(self, ticket: Ticket, without: Ticket | None = None) -> bool:
        """Whether the line has no room for one more. One turn may wait, however large."""
        if ticket.patient:
            return False
        waiting, tokens = self._waiting, self._waiting_tokens
        if without is not None:
            waiting, tokens = waiting - 1, tokens - without.tokens
        if waiting >= self._max_queued:
            return True
        return waiting > 0 and tokens + ticket.tokens > self._max_queued_tokens

    def _heaviest(self, arriving: Ticket) -> Ticket | None:
        """The newest waiting turn of the tenant that has most in the line, if that stays more than the arriving one's."""
        mine = len(self._lines.get(arriving.tenant, ()))
        tenant = max(self._lines, key=lambda one: len(self._lines[one]), default=None)
        if tenant is None or len(self._lines[tenant]) <= mine + 1:
            return None
        return next((one for one in reversed(self._lines[tenant]) if not one.patient), None)

    def _fill(self, now: float) -> list[Ticket]:
        """Admit whoever is next while there is room."""
        admitted: list[Ticket] = []
        while self._waiting:
            tenant = min(self._lines, key=self._held_by)
            line = self._lines[tenant]
            following = line[0]
            if following.due < now:  # its own task is about to say so
                self._leave(following)
                following.refused = True
                admitted.append(following)
                continue
            if not self._fits(following):
                break
            self._leave(following)
            if tenant in self._lines:  # served last from now on
                self._lines[tenant] = self._lines.pop(tenant)
            self._admit(following, now)
            admitted.append(following)
        return admitted

    def _leave(self, ticket: Ticket) -> None:
        line = self._lines[ticket.tenant]
        line.remove(ticket)
        if not line:
            del self._lines[ticket.tenant]
        self._waiting -= 1
        self._waiting_tokens -= ticket.tokens

    def _admit(self, ticket: Ticket, now: float) -> None:
        ticket.admitted_at = now
        self._admitted.add(ticket)
        self._admitted_tokens[ticket.tenant] += ticket.tokens
        self._admitted_turns[ticket.tenant] += 1


class Admission:
    """The edge of `Queue`: `async with admission.place()` around a turn."""

    def __init__(
        self,
        *,
        max_turns: int,
        max_queued: int,
        queue_timeout_s: float,
        max_tokens: float = math.inf,
        max_queued_tokens: float = math.inf,
        several: bool = False,
    ) -> None:
        self._queue = Queue(
            max_turns=max_turns,
            max_queued=max_queued,
            max_tokens=max_tokens,
            max_queued_tokens=max_queued_tokens,
            several=several,
        )
        self._timeout_s = queue_timeout_s
        self._changed: dict[Ticket, trio.Event] = {}  # {who waits: set when admitted or refused}

    @asynccontextmanager
    async def place(
        self, tenant: str = "", tokens: int = 0, *, patient: bool = False
    ) -> AsyncIterator[Callable[[], None]]:
        """Wait for a place and hold it: to the end, or until what this gives is called, whichever is first.

        Raises Overloaded when the line is full, or too slow for someone who waits. A `patient` turn has nobody who waits:
        it stays in the line as long as it takes.
        """
        wait_s = math.inf if patient else self._timeout_s
        ticket, changed = self._queue.arrive(
            trio.current_time(), tenant, tokens, wait_s=wait_s, patient=patient
        )
        self._tell(changed)
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._tell(self._queue.depart(ticket, trio.current_time()))

        try:
            if ticket.admitted_at is None:
                await self._wait(ticket)
            yield give_back
        finally:
            give_back()

    def check(self, tenant: str = "") -> None:
        """Raises Overloaded if a turn of this tenant would be refused at once, whatever it weighs: before it is read."""
        self._queue.check(tenant)

    def statistics(self) -> AdmissionStatistics:
        return self._queue.statistics()

    def _tell(self, changed: list[Ticket]) -> None:
        for ticket in changed:
            if ticket in self._changed:
                self._changed[ticket].set()

    async def _wait(self, ticket: Ticket) -> None:
        self._changed[ticket] = trio.Event()
        try:
            with trio.move_on_at(ticket.due):
                await self._changed[ticket].wait()
        finally:
            del self._changed[ticket]
        if ticket.admitted_at is None:
            raise self._queue.refusal(IN_THE_LINE)
