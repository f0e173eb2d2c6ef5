"""What a series does when it is healthy, kept up to date: :class:`Baseline`."""

from __future__ import annotations

import math

import numpy as np

from dyntune.detect.calibration import Threshold, prior_threshold, tail_threshold
from dyntune.detect.steps import BLOCK
from dyntune.monitor.rows import Array

__all__ = ["Baseline"]

LEVEL = 2 * BLOCK  # latest healthy points whose median is the level
SPREAD = 8 * BLOCK  # deviations from the level before them that the scale is over
LEAST = 2 * BLOCK  # deviations before there is a score: quartiles of 64 are known to 15%
MAXIMA = 128  # largest scores of healthy blocks that thresholds are made of: some 4,000 steps
REFIT = 16  # blocks between two fits of 60 microseconds: a tenth of one per step
MAD_TO_SD = 1.4826  # of normal noise
TENTH_TO_SD = 1.2816  # the same by the largest tenth
# A scale below this share of the largest number so far (in logarithms: of 1) is rounding, as of a constant series.
SMALLEST = 1e-6


class _Ring:
    """The latest numbers; in no order once it is full."""

    def __init__(self, size: int) -> None:
        self._held, self._count = np.empty(size), 0

    def extend(self, values: Array) -> None:
        size = self._held.size
        values = values[-size:]
        n = values.size
        at = self._count % size
        head = min(n, size - at)
        self._held[at : at + head] = values[:head]
        self._held[: n - head] = values[head:]
        self._count += n

    def clear(self) -> None:
        self._count = 0

    def __len__(self) -> int:
        return min(self._count, self._held.size)

    @property
    def values(self) -> Array:
        return self._held[: len(self)]


class Baseline:
    """Level and scatter of the healthy points of a series, by medians; scores of new points against them.

    A point's deviation is taken from the median of the 64 healthy points before its block, and its score is that
    deviation, less the usual one, in robust standard deviations of the latest 256: by their MAD or, where the series is
    skewed upwards as squares are, by their largest tenth. What a trend, a slow wave or
    correlation do within a block is in these deviations, so it widens the scale and is no alarm. Points that were
    flagged never enter. Positive series are taken in logarithms; the first value that is not positive makes it signed,
    for good, and begins anew. Scores do not depend on the unit of the series.

    Args:
        signed: Take the series as it is from the start.

    Cost:
        25 microseconds for a block of 32 points, whatever came before.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> baseline = Baseline()
        >>> for _ in range(20):
        ...     baseline.learn(np.exp(0.1 * rng.standard_normal(BLOCK)))
        >>> scores = baseline.scores(np.array([1.0, 1.1, 3.0]))
        >>> bool(scores[2] > 8 > abs(scores[1]))
        True
    """

    def __init__(self, *, signed: bool = False) -> None:
        self.signed = signed
        self._level, self._spread, self._maxima = _Ring(LEVEL), _Ring(SPREAD), _Ring(MAXIMA)
        self._centre = math.nan  # what is taken from a point: the level and the usual deviation
        self._at = math.nan  # the level
        self._scale = math.nan
        self._largest = 0.0
        self._thresholds: dict[float, Threshold] = {}
        self._fresh = 0  # maxima since they were made

    @property
    def ready(self) -> bool:
        """Whether there are enough healthy points for a score."""
        return not math.isnan(self._scale)

    @property
    def level(self) -> float:
        """Median of the latest healthy points, in the unit of the series; NaN before there are some."""
        return self._at if self.signed else math.exp(min(self._at, 700.0))

    def scores(self, values: Array) -> Array:
        """Robust standard deviations above the level, shape (n,); NaN where there is no value or no baseline yet.

        Infinite values have infinite scores. In a logarithmic series a value of zero or less has none.
        """
        if not self.ready:
            return np.full(values.shape, np.nan)
        return (self._inside(values) - self._centre) / self._scale

    def threshold(self, run_length: float) -> Threshold:
        """Of a score; see :func:`dyntune.detect.calibration.tail_threshold`. Made again after every 16 blocks."""
        if self._fresh >= REFIT:
            self._thresholds, self._fresh = {}, 0
        found = self._thresholds.get(run_length)
        if found is None:
            maxima = self._maxima.values
            found = tail_threshold(maxima, run_length) if maxima.size else prior_threshold(run_length)
            self._thresholds[run_length] = found
        return found

    def learn(self, values: Array, *, top: float = math.nan) -> None:
        """Take in healthy points.

        Args:
            values: Without those that were flagged; what is not finite is left out. Shape (n,).
            top: The largest of their scores, for the threshold; NaN: not for that.
        """
        inside = self._inside(values)
        if not self.signed and not math.isfinite(float(inside.sum())):
            values = values[np.isfinite(values)]
            if values.size and values.min() <= 0.0:
                self.restart()
                self.signed = True
            inside = self._inside(values)
        elif self.signed:
            inside = inside[np.isfinite(inside)]
        if inside.size == 0:
            return
        if self.signed:
            self._largest = max(self._largest, float(np.abs(inside).max()))
        if not math.isnan(self._at):
            self._spread.extend(inside - self._at)
        self._level.extend(inside)
        if math.isfinite(top):
            self._maxima.extend(np.array([top]))
            self._fresh += 1
        self._settle()

    def restart(self) -> None:
        """Forget everything: something was changed on purpose, and the series is another one now."""
        for ring in (self._level, self._spread, self._maxima):
            ring.clear()
        self._thresholds, self._fresh = {}, 0
        self._centre = self._at = self._scale = math.nan

    def _inside(self, values: Array) -> Array:
        if self.signed:
            return values
        if np.fmin.reduce(values, initial=math.inf) > 0.0:
            return np.log(values)
        return np.log(np.where(values > 0.0, values, np.nan))

    def _settle(self) -> None:
        held = self._level.values
        self._at = float(np.partition(held, held.size // 2)[held.size // 2])
        if len(self._spread) < LEAST:
            return
        deviations = self._spread.values
        n = deviations.size
        tenth = n - 1 - n // 10
        ordered = np.partition(deviations, (n // 2, tenth))
        usual, high = float(ordered[n // 2]), float(ordered[tenth])
        spread = float(np.partition(np.abs(deviations - usual), n // 2)[n // 2])
        floor = SMALLEST * (self._largest if self.signed else 1.0)
        self._centre = self._at + usual
        self._scale = max(MAD_TO_SD * spread, (high - usual) / TENTH_TO_SD, floor, 1e-300)
