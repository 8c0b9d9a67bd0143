"""Whether work that exists moves. A daemon whose turns hang must say so to whoever can restart it.

`Watch` is the rule: pure, told now and then what there is and what changed. `Liveness` is its edge: a task that asks.

Laws
    No work: alive, however still. Work, and nothing about it has changed for `stall_s`: stalled, until something does.
    An engine that does not answer is one of which nothing changes. A busy one answers between two steps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from broker.port import Port
    from engine.api import EngineReport

log = logging.getLogger(__name__)

_LOOKS = 8  # while a stall grows old enough to be one (guessed)


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen: how much there is to do, and everything that changes when some of it is done."""

    work: int
    marks: tuple[int, ...]


class Watch:
    """`stalled_s` is for how long there was work and nothing moved, once that is long enough; else None."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._moved_at: float | None = None
        self._last: Look | None = None
        self.stalled_s: float | None = None

    def see(self, look: Look | None, now: float) -> None:
        """None: the engine did not answer."""
        if self._moved_at is None or (look is not None and (not look.work or look != self._last)):
            self._moved_at = now
        if look is not None:
            self._last = look
        still_s = now - self._moved_at
        self.stalled_s = still_s if still_s >= self._stall_s else None


class Liveness:
    def __init__(self, port: Port) -> None:
        self._port = port
        self._stall_s = port.config.server.stall
        self._watch = Watch(self._stall_s)

    @property
    def stalled_s(self) -> float | None:
        """For how long nothing has moved; None: all is well."""
        return self._watch.stalled_s

    async def serve(self) -> None:
        """Look, now and then, until cancelled."""
        every_s = self._stall_s / _LOOKS
        while True:
            began = trio.current_time()
            look: Look | None = None
            with trio.move_on_after(self._stall_s):
                look = self._look(await self._port.engine.inspect(sessions=False))
            was = self._watch.stalled_s
            self._watch.see(look, trio.current_time())
            if was is None and self._watch.stalled_s is not None:
                log.error(
                    "nothing has moved for %.0f s though there is work: liveness fails",
                    self._watch.stalled_s,
                )
            elif was is not None and self._watch.stalled_s is None:
                log.warning("work moves again after %.0f s", was)
            await trio.sleep_until(began + every_s)

    def _look(self, engine: EngineReport) -> Look:
        turns = self._port.admission.statistics()
        work = turns.admitted + turns.waiting + engine.running + engine.waiting + engine.loading
        return Look(
            work,
            (
                turns.admitted,
                turns.waiting,
                turns.refused_total,
                sum(self._port.turns_total.values()),
                engine.running,
                engine.waiting,
                engine.loading,
                engine.output_tokens_total,
                sum(engine.tokens_total.values()),
                engine.fetches_total,
                engine.spills_total,
            ),
        )
