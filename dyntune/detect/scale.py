"""A loss that is not of the size that the network's own answers give it: :class:`LossScale`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dyntune.detect.course import Course
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows

__all__ = ["LossScale"]

ENTROPY = "logits/entropy"
# Of a network that has not learnt to be over-confident yet, the mean cross-entropy is about the entropy of its answers.
FACTOR = 4.0
EARLY = 128  # steps, by which the first look was taken
SAFE = 0.5  # nats; of answers that are surer than this, the ratio says little


class LossScale:
    """At the first look into the network, the loss is four times the entropy of its answers, or a quarter of it.

    A sum where a mean is meant, a mean taken twice, or another loss than the cross-entropy of these logits. Critical
    only for optimizers whose steps scale with the loss (not of Adam's kind); else a warning.

    Assumes:
        A classifier trained by its cross-entropy; a sum of several losses may be four times as large by right.

    Args:
        course: Shared with other detectors.
    """

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._done = False

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        for moment in self._course.take(rows):
            entropy, loss = moment.known.single(ENTROPY), moment.first.level
            if self._done or math.isnan(entropy):
                continue
            self._done = True
            ratio = loss / entropy if SAFE < entropy < math.inf else math.nan
            late = moment.known.latest[ENTROPY].step - moment.first.begun > EARLY
            if late or not (ratio > FACTOR or 0.0 <= ratio < 1.0 / FACTOR):
                continue
            yield Alert(
                kind="loss-scale",
                severity="warning" if moment.settings.is_adam else "critical",
                step=moment.step,
                text=f"the loss is {ratio:.2g} times the entropy of the network's answers, {entropy:.3g}: a mean "
                "cross-entropy would be about as large as that, this early.",
                advice="Look at the reduction of the loss, and at factors on it.",
                evidence={"train/loss": loss, ENTROPY: entropy},
                causes=(Cause.LOSS_SCALE, Cause.WRONG_LOSS),
            )
