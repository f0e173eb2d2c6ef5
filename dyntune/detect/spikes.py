"""Single steps that stand out, in the loss and in the gradient: :class:`LossSpike`, :class:`GradientSpike`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dyntune.detect.course import Course
from dyntune.detect.watch import Judged, Seen
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows

__all__ = ["GradientSpike", "LossSpike"]

REFRACTORY = 256  # steps after an alarm without another one: several spikes of one trouble are one alarm
# Share of the loss at the start that a jump has to be: at a loss of 1e-4 tens of standard deviations are no harm.
EFFECT = 0.1
GREW = 3.0  # times the usual gradient: where clipping makes all of one length, a hair more is many standard deviations
TOGETHER = 8  # steps between a spike of the gradient and one of the loss that belong together (Adam's follow in 1 to 8)


class _Spike(ABC):
    """Scores above a threshold; the first of a block, then silence for a while."""

    kind: Literal["loss-spike", "gradient-spike"]

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._quiet_until = -1

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        for moment in self._course.take(rows):
            seen = moment.seen
            judged = self._judged(seen)
            if not judged.top > judged.threshold.value:
                continue
            above = self._above(seen)
            if above.size and seen.block.steps[above[0]] > self._quiet_until:
                self._quiet_until = int(seen.block.steps[above[-1]]) + REFRACTORY
                yield self._alert(seen, int(above[0]))

    @abstractmethod
    def _judged(self, seen: Seen) -> Judged:
        """The series that this is about."""

    @abstractmethod
    def _above(self, seen: Seen) -> NDArray[np.intp]:
        """Places in the block that stand out."""

    @abstractmethod
    def _alert(self, seen: Seen, at: int) -> Alert:
        """Of a place in the block."""


class LossSpike(_Spike):
    """The loss of a step far above what its own scatter explains.

    A warning, at most once in 256 steps; the threshold is made for 1e5 healthy steps between two. A spike of the
    gradient in the same step points to the batch, one in the eight steps before to the step that it caused.

    Args:
        course: Shared with other detectors.
    """

    def _judged(self, seen: Seen) -> Judged:
        return seen.loss

    def _above(self, seen: Seen) -> NDArray[np.intp]:
        judged, losses = seen.loss, seen.block.loss
        return np.flatnonzero(
            (judged.scores > judged.threshold.value) & (losses - judged.level > EFFECT * abs(seen.start))
        )

    def _alert(self, seen: Seen, at: int) -> Alert:
        level, value, score = seen.loss.level, float(seen.block.loss[at]), float(seen.loss.scores[at])
        limit = seen.norm.threshold.value
        near = seen.norm.scores[max(0, at - TOGETHER) : at + 1]
        causes: tuple[Cause, ...] = (Cause.BAD_BATCH, Cause.LR_TOO_HIGH)
        text = f"the loss jumped to {value:.4g} from {level:.4g}, {score:.0f} standard deviations."
        if (near[:-1] > limit).any():
            causes = (Cause.STALE_SECOND_MOMENT, Cause.LR_TOO_HIGH, Cause.BAD_BATCH)
            text += " The gradient had jumped in the steps before."
        elif near[-1] > limit:
            text += " The gradient of the same batch jumped with it."
        return Alert(
            kind="loss-spike",
            severity="warning",
            step=int(seen.block.steps[at]),
            text=f"{text} ({seen.loss.threshold.said})",
            advice="Look at the batch of that step; if it is sound, lower the learning rate or clip the gradient.",
            evidence={"train/loss": value, "level": level, "score": score, "grad/norm": float(seen.block.norm[at])},
            causes=causes,
        )


class GradientSpike(_Spike):
    """The gradient of a step far longer than its own scatter explains; a warning, as :class:`LossSpike`.

    Args:
        course: Shared with other detectors.
    """

    def _judged(self, seen: Seen) -> Judged:
        return seen.norm

    def _above(self, seen: Seen) -> NDArray[np.intp]:
        judged = seen.norm
        return np.flatnonzero((judged.scores > judged.threshold.value) & (seen.block.norm > GREW * judged.level))

    def _alert(self, seen: Seen, at: int) -> Alert:
        level, value, score = seen.norm.level, float(seen.block.norm[at]), float(seen.norm.scores[at])
        said = f"{value / level:.3g} times as long as before, {score:.0f} standard deviations"
        return Alert(
            kind="gradient-spike",
            severity="warning",
            step=int(seen.block.steps[at]),
            text=f"the gradient is {said}. ({seen.norm.threshold.said})",
            advice="Look at the batch of that step; clip the gradient if such batches are to stay.",
            evidence={"grad/norm": value, "level": level, "score": score, "train/loss": float(seen.block.loss[at])},
            causes=(Cause.BAD_BATCH, Cause.EXPLODING),
        )
