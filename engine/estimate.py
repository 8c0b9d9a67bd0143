"""A cost that is a sum of rates times counts, learnt from few and noisy observations. Pure arithmetic.

    seconds = rates[0] * counts[0] + rates[1] * counts[1] + ...

Least squares of the relative error over the last observations, each weighing `KEEP` of the one after it. The rates that
it began with count as some observations of each rate alone, made before the first.

Laws
    Rates stay positive.
    An observation counts as at most `STRANGE` times the prediction, or one part in so many of it: a hiccup of any
    length moves a prediction by some tenth, and a lasting change is followed within some twenty observations.
    `forget` takes the rates back towards those that it began with.
"""

from __future__ import annotations

KEEP = 0.9  # ten observations matter; guessed
STRANGE = 2.0  # hiccups are common; guessed
FORGET = 0.95  # each `forget` makes the logarithm of the distance so much shorter; guessed
BEGINNING = 5.0  # how many observations the first rates are worth; guessed
PULL = 1e-3  # what the calibrated rates weigh for ever: next to nothing, for a rate of which nothing is ever seen
LEAST = 0.01  # of a calibrated rate: what an estimate may fall to
_SWEEPS = 40  # coordinate descent on two or three unknowns, begun where the last one ended


class Estimate:
    """In terms of the calibrated rates: `_scale[i]` is how many times as slow rate i is now."""

    def __init__(self, calibrated: tuple[float, ...]) -> None:
        assert all(rate > 0 for rate in calibrated)
        self._calibrated = calibrated
        self._scale: list[float]
        # Weighted sums over the observations; a share is what a calibrated rate makes of the prediction
        self._products: list[list[float]]  # of shares
        self._targets: list[float]  # of shares and seconds / prediction
        self._begin_at([1.0] * len(calibrated))

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(
            rate * scale for rate, scale in zip(self._calibrated, self._scale, strict=True)
        )

    def predict(self, *counts: float) -> float:
        return sum(rate * count for rate, count in zip(self.rates, counts, strict=True))

    def observe(self, seconds: float, *counts: float) -> None:
        """What took so long had these counts. A clock that stood still says nothing."""
        predicted = self.predict(*counts)
        if seconds <= 0 or predicted <= 0:
            return
        error = min(max(seconds / predicted, 1 / STRANGE), STRANGE)
        shares = [
            rate * count / predicted for rate, count in zip(self._calibrated, counts, strict=True)
        ]
        for row, share in zip(self._products, shares, strict=True):
            row[:] = [KEEP * old + share * other for old, other in zip(row, shares, strict=True)]
        self._targets = [
            KEEP * old + share * error for old, share in zip(self._targets, shares, strict=True)
        ]
        self._solve()

    def forget(self) -> None:
        """A step back towards the calibrated rates, as if this were where they began."""
        self._begin_at([scale**FORGET for scale in self._scale])

    def _begin_at(self, scale: list[float]) -> None:
        self._scale = scale
        size = range(len(scale))
        self._products = [
            [BEGINNING / scale[at] ** 2 if at == other else 0.0 for other in size] for at in size
        ]
        self._targets = [BEGINNING / each for each in scale]

    def _solve(self) -> None:
        scale = self._scale
        for _ in range(_SWEEPS):
            for at, (row, target) in enumerate(zip(self._products, self._targets, strict=True)):
                others = sum(row[each] * scale[each] for each in range(len(scale)) if each != at)
                scale[at] = max(LEAST, (target + PULL - others) / (row[at] + PULL))
