"""Batches that come again and again, or resemble their neighbours: :class:`DataOrder`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from dyntune.detect.course import Course
from dyntune.detect.steps import median
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Array, Rows

__all__ = ["DataOrder", "repetition"]

WINDOW = 192  # losses that are compared with themselves; three times the longest period
EVERY = 2  # blocks from one look to the next
CORRELATION = "grad/autocorr_raw_lag1"
SHORTEST, LONGEST = 3, 64  # periods; two in turn are what the edge of stability looks like
REPEATS = 0.7  # correlation with the loss a period ago; of 48 healthy runs of the tune half none passed 0.41
ELSEWHERE = 0.5  # typical size of the correlation at other lags, above which the loss oscillates and does not repeat
NEARLY = 0.9  # of the largest correlation
WINDOWS = 3  # in a row with the same period
CLIP = 4.0  # robust standard deviations, so that a spike is no period
UNLIKE = -0.2  # lag-1 correlation of changes; of batches that differ it is -1/2, of a smooth oscillation positive
# Lag-1 correlation of gradients, its lower limit, that batches have that resemble each other. In 78 healthy runs of the
# tune half only training on the full batch passes it, where the loss is smooth.
ALIKE = 0.5
WILD = 0.05  # median change of the loss from a step to the next, by the loss
SAME = 0.95  # above it a gradient is the one before, and a little more


class DataOrder:
    """The loss repeats itself with a period, or neighbouring batches have similar losses.

    - *Repeats*: changes of the loss correlate to 0.7 and more with those a fixed number of steps, 3 to 64, earlier, in
      three windows of 192 steps in a row, and not at other lags: the loader deals the same few batches again and again.
    - *Alike*: gradients of neighbouring steps correlate to more than 0.5 (lower limit of a burst's interval), while
      the loss changes by more than 5% from step to step: neighbouring batches resemble each other, as sorted rows do,
      or gradients add up because nothing clears them.

    False alarms: training on the full batch has correlated gradients, and a smooth loss, hence the change that is asked
    for.

    Args:
        course: Shared with other detectors.
    """

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._losses: Array = np.empty(0)
        self._blocks = 0
        self._period, self._same = 0, 0
        self._said: set[str] = set()

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        for moment in self._course.take(rows):
            seen = moment.seen
            for reading in moment.new:
                low = reading.single.get(f"{CORRELATION}.low")
                yield from self._neighbours(reading.step, reading.single.get(CORRELATION), low)
            if seen.changed:
                self._losses, self._same = np.empty(0), 0
            self._losses = np.concatenate([self._losses, seen.block.loss])[-WINDOW:]
            self._blocks += 1
            if self._losses.size == WINDOW and self._blocks % EVERY == 0:
                logs = self._logs
                if logs.size:
                    yield from self._repeats(logs, int(seen.block.steps[-1]))

    @property
    def _logs(self) -> Array:
        """Logarithms of the latest losses; empty where not all have one."""
        losses = self._losses
        return np.log(losses) if losses.size and losses.min() > 0.0 and losses.max() < math.inf else np.empty(0)

    def _repeats(self, logs: Array, step: int) -> Iterable[Alert]:
        period, correlation, elsewhere, next_one = repetition(logs)
        if correlation > REPEATS and elsewhere < ELSEWHERE and next_one < UNLIKE:
            self._same = self._same + 1 if period == self._period else 1
            self._period = period
        else:
            self._same = 0
        if self._same >= WINDOWS and "repeats" not in self._said:
            self._said.add("repeats")
            yield Alert(
                kind="data-repeats",
                severity="critical",
                step=step,
                since=step + 1 - WINDOW - (WINDOWS - 1) * EVERY * 32,
                text=f"the loss repeats itself every {period} steps (correlation {correlation:.2f}): the same {period} "
                "batches come again and again.",
                advice="Look at the loader: is it made anew, or its generator or seed set again, every few steps? Is "
                "shuffle off?",
                evidence={"period": float(period), "correlation": correlation},
                causes=(Cause.DATA_ORDER,),
            )

    def _neighbours(self, step: int, correlation: float | None, low: float | None) -> Iterable[Alert]:
        if correlation is None or low is None:
            return
        if not low > ALIKE or self._said:
            return
        wild = median(np.abs(np.diff(self._logs)))
        if wild > WILD:
            self._said.add("alike")
            yield Alert(
                kind="data-alike",
                severity="critical",
                step=step,
                text=f"gradients of neighbouring steps correlate to {correlation:.2f} (above {low:.2f}), though the "
                f"loss changes by {wild:.0%} from one to the next: their batches resemble each other, or "
                "gradients add up.",
                advice="Shuffle the rows, and make sure that gradients are cleared at every step.",
                evidence={CORRELATION: correlation, "change": wild},
                causes=(Cause.ACCUMULATED_GRADIENTS, Cause.DATA_ORDER)
                if correlation > SAME
                else (Cause.DATA_ORDER, Cause.ACCUMULATED_GRADIENTS),
            )


def repetition(logs: Array) -> tuple[int, float, float, float]:
    """Where changes of a series correlate the most: that lag, the correlation, the usual size of all, that of lag 1.

    Args:
        logs: Shape (n,), with n at least three times the longest period.
    """
    changes = np.diff(logs)
    scale = 1.4826 * median(np.abs(changes))
    if not scale > 0.0:
        return 0, 0.0, 1.0, 1.0
    changes = np.clip(changes / scale, -CLIP, CLIP)
    changes = changes - changes.mean()
    # Each is scaled by the part of the series that it is over. Of so few points, sums are faster than an FFT.
    lagged = np.correlate(changes, changes, "full")[changes.size - 1 :][: LONGEST + 1]
    parts = changes.size - np.arange(LONGEST + 1)
    correlations = (lagged / parts) / (lagged[0] / changes.size)
    tried = correlations[SHORTEST:]
    # Multiples of a period correlate as well, so the first that nearly does is the period.
    best = int(np.argmax(tried > NEARLY * max(float(tried.max()), 0.0)))
    return best + SHORTEST, float(tried[best]), median(np.abs(tried)), float(correlations[1])
