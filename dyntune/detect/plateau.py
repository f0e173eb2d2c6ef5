"""A loss that no longer falls, because of noise or because a layer is stuck: :class:`Plateau`."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

import numpy as np

from dyntune.detect.course import Course, Moment
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows

__all__ = ["Plateau"]

BLOCKS = 16  # of 32 steps that the loss has been flat for, as for a loss that never moved
CAME_DOWN = 0.1  # of the start: a loss that has not is for dyntune.detect.level
LEFT = 0.1  # of the start, above which there is something left to learn
MOVED = 0.01  # of the progress, between the halves of the window
ERRORS = 2.0  # standard errors of the difference of the halves: what noise alone may show
# A tensor's gradient has died off: a hundredth of its first length, where the median tensor's is above a tenth.
DIED, ALIVE = math.log(100.0), math.log(10.0)
SILENT = 0.6  # of a layer's units, as in dyntune.detect.tensors.DeadUnits
# Noise of a batch over the squared length of the mean gradient: above it the mean is a third of a batch's gradient.
# Gradients of neighbouring steps then correlate to less than 1 / (1 + NOISY), which is what is measured.
NOISY = 10.0
GRADIENT, DEAD, NEIGHBOURS = "grad/log_rms/", "units/dead/", "grad/autocorr_raw_lag1"


class Plateau:
    """After progress the loss has been flat for 512 steps, at one learning rate and with something left to learn.

    - *Stuck*: the gradient of some tensors has fallen to a hundredth of what it was while that of the others has not,
      or most units of a layer answer to nothing: lowering the learning rate would not help.
    - *Noise*: the mean gradient is small against the noise of a batch. Steps move the weights about and no further
      down; a lower learning rate, or a larger batch, lowers the loss.

    Healthy runs at a constant rate end in noise by their nature, so that it is a warning and not on by default.

    Args:
        course: Shared with other detectors.
    """

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._levels: deque[float] = deque(maxlen=BLOCKS)
        self._best = math.inf
        self._said: set[str] = set()

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        for moment in self._course.take(rows):
            if moment.seen.changed:
                self._levels.clear()
            level = moment.seen.block.level
            if math.isnan(level):
                continue
            self._levels.append(level)
            self._best = min(self._best, level)
            if len(self._levels) == BLOCKS and self._is_flat(moment):
                yield from self._told(moment)

    def _is_flat(self, moment: Moment) -> bool:
        start = moment.seen.start
        progress = start - self._best
        if not (progress > CAME_DOWN * abs(start) and self._levels[-1] > LEFT * abs(start)):
            return False
        values = np.array(self._levels)
        first, last = values[: BLOCKS // 2], values[BLOCKS // 2 :]
        # Medians of consecutive blocks are near enough independent; changes between them do not count a slope as noise.
        scatter = float(np.sqrt(np.mean(np.diff(values) ** 2) / 2))
        error = scatter * math.sqrt(4 / BLOCKS)
        change = abs(float(last.mean() - first.mean()))
        return change < max(ERRORS * error, MOVED * progress) and change < MOVED * 5 * progress

    def _told(self, moment: Moment) -> Iterable[Alert]:
        known, first = moment.known, moment.known.first.get(GRADIENT)
        fallen: dict[str, float] = {}
        if first is not None:
            before = first.kinds[GRADIENT]
            fallen = {n: before[n] - x for n, x in known.of(GRADIENT).items() if n in before and math.isfinite(x)}
        middle = statistics.median(fallen.values()) if fallen else math.nan
        died = sorted(n for n, x in fallen.items() if x > DIED and middle < ALIVE)
        silent = sorted(layer for layer, share in known.of(DEAD).items() if share > SILENT)
        alike = known.single(NEIGHBOURS)
        if (died or silent) and "stuck" not in self._said:
            self._said.add("stuck")
            where = died or silent
            what = "gradients a hundredth of their first" if died else "most units silent"
            yield self._alert(
                moment,
                "plateau-stuck",
                f"{', '.join(where[:3])}{' and others' if len(where) > 3 else ''}: {what}.",
                "Look at these layers: activations, initial weights, normalisation. A lower rate would not help.",
                (Cause.DEAD_UNITS, Cause.VANISHING) if silent else (Cause.VANISHING, Cause.DEAD_UNITS),
                where=tuple(where[:3]),
            )
        elif not died and not silent and alike < 1 / (1 + NOISY) and not self._said:
            self._said.add("noise")
            yield self._alert(
                moment,
                "plateau-noise",
                f"gradients of neighbouring steps have nothing in common (correlation {alike:.2g}): they are noise.",
                "Lower the learning rate (by three, say), or take larger batches: the loss should fall.",
                (Cause.NOISE_PLATEAU, Cause.LR_TOO_HIGH),
                evidence={NEIGHBOURS: alike},
                recommender="dyntune.suggest_schedule",
            )

    def _alert(
        self,
        moment: Moment,
        kind: str,
        why: str,
        advice: str,
        causes: tuple[Cause, ...],
        *,
        where: tuple[str, ...] = (),
        evidence: dict[str, float] | None = None,
        recommender: str = "",
    ) -> Alert:
        step, length = moment.step, BLOCKS * len(moment.seen.block.steps)
        return Alert(
            kind=kind,
            severity="warning",
            step=step,
            since=step + 1 - length,
            text=f"the loss has been at {self._levels[-1]:.4g} for {length} steps; {why}",
            advice=advice,
            evidence={"train/loss": self._levels[-1]} | (evidence or {}),
            where=where,
            causes=causes,
            recommender=recommender,
        )
