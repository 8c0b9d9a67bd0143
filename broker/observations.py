"""What the sockets' side has seen since it started: the last turns, and how long everything took. No clock of its own.

Laws
    A turn is observed exactly once, when it is over, however it ended: in the histograms, in the ring, as one log line,
    and by whoever else was given as `exporters`.
    What is kept is bounded: `KEPT_TURNS` turns, and numbers.
    Nothing here bears a prompt or a text, and no number a tenant's name.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from broker.breakdown import Breakdown, Stage
from broker.histogram import LOOP_S, TOKEN_S, TURN_S, Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from broker.breakdown import Origin, TurnRecord
    from broker.histogram import HistogramReport

log = logging.getLogger(__name__)

KEPT_TURNS = 512  # about 1 MB


@dataclass(frozen=True, slots=True)
class Observed:
    """A snapshot for `/metrics`."""

    first_token: HistogramReport
    inter_token: HistogramReport
    turn: HistogramReport
    stages: Mapping[str, HistogramReport]
    loop_lag: HistogramReport
    ended_total: Mapping[str, int]  # {status: turns}
    restore_s_total: Mapping[str, float] = field(default_factory=dict)  # {tier: seconds}


class Observations:
    """`exporters` are told of every turn, at once and without waiting."""

    def __init__(self, exporters: Iterable[Callable[[TurnRecord], None]] = ()) -> None:
        self._exporters = tuple(exporters)
        self._turns: deque[TurnRecord] = deque(maxlen=KEPT_TURNS)
        self._first_token = Histogram(TURN_S)
        self._inter_token = Histogram(TOKEN_S)
        self._turn = Histogram(TURN_S)
        self._parts = {stage: Histogram(TURN_S) for stage in Stage}
        self._loop_lag = Histogram(LOOP_S)
        self._ended: Counter[str] = Counter()
        self._restore_s: dict[str, float] = {}

    def begin(self, origin: Origin, now: float) -> Breakdown:
        return Breakdown(origin, now, gap=self._inter_token.observe)

    def ended(self, turn: TurnRecord) -> None:
        self._turns.append(turn)
        self._ended[turn.status.value] += 1
        self._turn.observe(turn.total_s)
        for stage, seconds in turn.stages.items():
            self._parts[stage].observe(seconds)
        if turn.first_token_s is not None:
            self._first_token.observe(turn.first_token_s)
        for tier, seconds in turn.restore_s.items():
            self._restore_s[tier] = self._restore_s.get(tier, 0.0) + seconds
        log.info("%s", turn.as_logfmt())
        for export in self._exporters:
            export(turn)

    def looped(self, late_s: float) -> None:
        """The event loop came to something so much later than it was due."""
        self._loop_lag.observe(late_s)

    def last(self, most: int) -> list[TurnRecord]:
        """The turns that ended last, newest first."""
        newest_first = reversed(self._turns)
        return [turn for turn, _ in zip(newest_first, range(most), strict=False)]

    @property
    def ended_total(self) -> int:
        return self._ended.total()

    def after(self, seen: int, most: int) -> list[TurnRecord]:
        """Of the turns that ended after the first `seen` ones, the last, newest first."""
        return self.last(min(most, max(0, self.ended_total - seen)))

    def report(self) -> Observed:
        return Observed(
            first_token=self._first_token.report(),
            inter_token=self._inter_token.report(),
            turn=self._turn.report(),
            stages={stage.value: one.report() for stage, one in self._parts.items()},
            loop_lag=self._loop_lag.report(),
            ended_total=dict(self._ended),
            restore_s_total=dict(self._restore_s),
        )
