"""A loss that is not of the size that the network's own answers give it: :class:`LossScale`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from dyntune.detect.readings import Readings
from dyntune.detect.watch import Watch
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows

__all__ = ["LossScale"]

# Of a network that has not learnt to be over-confident yet, the mean cross-entropy is about the entropy of its answers.
FACTOR = 4.0
EARLY = 128  # steps, by which the first look was taken
SAFE = 0.5  # of ln(10): with answers that are surer than this, the ratio says little


class LossScale:
    """At the first look into the network, the loss is four times the entropy of its answers, or a quarter of it.

    A sum where a mean is meant, a mean taken twice, or another loss than the cross-entropy of these logits. Critical
    only for optimizers whose steps scale with the loss (not of Adam's kind); else a warning.

    Assumes:
        A classifier trained by its cross-entropy; a sum of several losses may be four times as large by right.

    Args:
        watch: Shared with other detectors.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch, self._readings = watch or Watch(), Readings()
        self._is_adam = self._done = False

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        if self._done:
            return
        self._readings.take(rows)
        self._is_adam = self._is_adam or "optimizer/beta2" in rows.names
        for seen in self._watch.take(rows):
            self._readings.advance(int(seen.block.steps[-1]))
            entropy = self._readings.single("logits/entropy")
            losses = seen.block.loss[np.isfinite(seen.block.loss)]
            if math.isnan(entropy):
                continue
            self._done = True
            if self._readings.latest["logits/entropy"].step > EARLY or entropy < SAFE or not losses.size:
                return
            ratio = float(np.median(losses)) / entropy
            if not (ratio > FACTOR or 0.0 <= ratio < 1.0 / FACTOR):
                return
            yield Alert(
                kind="loss-scale",
                severity="warning" if self._is_adam else "critical",
                step=int(seen.block.steps[-1]),
                text=f"the loss is {ratio:.2g} times the entropy of the network's answers, {entropy:.3g}: a mean "
                "cross-entropy would be about as large as that, this early.",
                advice="Look at the reduction of the loss, and at factors on it.",
                evidence={"train/loss": float(np.median(losses)), "logits/entropy": entropy},
                causes=(Cause.LOSS_SCALE, Cause.WRONG_LOSS),
            )
            return
