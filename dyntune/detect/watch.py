"""Loss and gradient norm against what they do in health: :class:`Watch`, which detectors share."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np

from dyntune.detect.baseline import Baseline
from dyntune.detect.calibration import WARNING, Threshold
from dyntune.detect.steps import Block, Steps
from dyntune.monitor.rows import Array, Rows

__all__ = ["Judged", "Seen", "Watch"]

# A learning rate that changes by more than this within a block is a step of the schedule or the start of a warm-up:
# the scatter of the loss is another one then, and what was learnt of it is forgotten. A quarter of the learning rate is
# a quarter of the excess loss that noise causes (to first order both are in proportion).
CHANGED = math.log(1.25)
START = 10  # losses whose median is the start, as in the monitor's verdict
NEW_LEVEL = 4  # blocks in a row that lie mostly above the threshold: this is the level now, whatever was said about it


@dataclass(frozen=True, eq=False)
class Judged:
    """Scores of a block, and what they are against."""

    scores: Array  # (BLOCK,) NaN without a baseline
    top: float  # the largest of them
    level: float
    threshold: Threshold  # of a warning


@dataclass(frozen=True, eq=False)
class Seen:
    """A block, and how far its points lie above the baseline before it.

    Args:
        block: The steps.
        loss: Of the loss.
        norm: Of the length of the gradient.
        changed: Whether the learning rate was changed on purpose.
        start: Median of the first ten losses of the run; NaN before there are ten.
    """

    block: Block
    loss: Judged
    norm: Judged
    changed: bool
    start: float


class _Judge:
    """A baseline that is fed with what did not exceed it."""

    def __init__(self) -> None:
        self.baseline = Baseline()
        self._above = 0

    def __call__(self, values: Array) -> Judged:
        baseline = self.baseline
        scores = baseline.scores(values)
        top = float(np.fmax.reduce(scores))
        found = Judged(scores, top, baseline.level, baseline.threshold(WARNING))
        if not top > found.threshold.value:
            baseline.learn(values, top=top)
            self._above = 0
            return found
        flagged = scores > found.threshold.value
        self._above = self._above + 1 if 2 * np.count_nonzero(flagged) > values.size else 0
        if self._above >= NEW_LEVEL:
            baseline.restart()
            self._above = 0
            baseline.learn(values)
        else:
            baseline.learn(values[~flagged])
        return found


class Watch:
    """Blocks with scores; expected changes of the learning rate restart the baselines instead of being scored.

    Several detectors may share one: rows are judged once.

    Example:
        >>> from dyntune.monitor.rows import Row
        >>> rng = np.random.default_rng(0)
        >>> losses = np.exp(0.1 * rng.standard_normal(640))
        >>> losses[600] = 30.0
        >>> rows = Rows.of(Row(step=i, values={"train/loss": float(x)}) for i, x in enumerate(losses))
        >>> seen = Watch().take(rows)
        >>> last = seen[-2].loss
        >>> int(seen[-2].block.steps[last.scores.argmax()]), bool(last.scores.max() > last.threshold.value)
        (600, True)
    """

    def __init__(self) -> None:
        self._steps = Steps()
        self._loss, self._norm = _Judge(), _Judge()
        self._first: list[float] = []
        self._lr = math.nan  # the last one
        self._rows: Rows | None = None
        self._seen: list[Seen] = []

    def take(self, rows: Rows) -> list[Seen]:
        """More rows; the blocks that are full now. The same rows again: the same blocks."""
        if rows is not self._rows:
            self._rows = rows
            self._seen = [self._judge(block) for block in self._steps.take(rows)]
        return self._seen

    def _judge(self, block: Block) -> Seen:
        changed = self._is_changed(block.lr)
        if changed:
            self._loss.baseline.restart()
            self._norm.baseline.restart()
        if len(self._first) < START:
            self._first += block.loss[np.isfinite(block.loss)][: START - len(self._first)].tolist()
        start = statistics.median(self._first) if len(self._first) == START else math.nan
        return Seen(block, self._loss(block.loss), self._norm(block.norm), changed, start)

    def _is_changed(self, lr: Array) -> bool:
        high, low = float(np.fmax.reduce(lr)), float(np.fmin.reduce(lr))
        before, self._lr = self._lr, float(lr[-1])
        high, low = (max(high, before), min(low, before)) if not math.isnan(before) else (high, low)
        if math.isnan(high) or high <= 0.0:
            return False
        return low <= 0.0 or math.log(high / low) > CHANGED
