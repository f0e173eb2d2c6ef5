"""Short guarded runs: where does training blow up, and which learning rate gets furthest?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dyntune.numerics.bracket import first_rise
from dyntune.numerics.vectors import Vector
from dyntune.pilot.twin import Twin

__all__ = ["InitialLosses", "Ramp", "ShortRun", "critical_lr", "ramp", "short_run", "tail_length"]

# A batch's loss this many times the mean initial loss above its own initial one counts as a blow-up: the published
# criterion of "peaks above twice the initial loss", batch by batch. Against the mean alone, a batch of four rows with a
# heavy-tailed loss blows up by itself: 4 of 49 workloads of benchmarks/lr then had a blow-up octaves below their best.
BLOW_UP = 1.0
# That many losses in a row: of four rows one batch is high by chance, and a run that blows up stays high.
IN_A_ROW = 2
# The share of a ramp that is so far below the critical rate that its losses are still the initial ones.
STILL_INITIAL = 0.25
# Doublings from a step of one percent of the largest weight: 24 of them reach 2e5 times the weights.
CRITICAL_DOUBLINGS = 24


class InitialLosses:
    """Losses before training, step by step: what a run's losses are compared with, batch by batch.

    Args:
        twin: One that is not stepped; forward passes are made as they are asked for, once.
    """

    def __init__(self, twin: Twin) -> None:
        self._twin = twin
        self._known: dict[int, float] = {}

    def note(self, step: int, loss: float) -> None:
        """Take the loss of a step whose learning rates so far were too small to change it."""
        self._known.setdefault(step % self._period, loss)

    @property
    def _period(self) -> int:
        count, per_step = len(self._twin.objective.batches), self._twin.training.accumulate
        return count // math.gcd(count, per_step)  # after as many steps the same batches come up again

    def of(self, step: int) -> float:
        """Mean loss before training over the batches of a step."""
        step %= self._period
        if step not in self._known:
            per_step, count = self._twin.training.accumulate, len(self._twin.objective.batches)
            micro = [self._twin.loss_at((step * per_step + i) % count, None, 0.0) for i in range(per_step)]
            self._known[step] = float(np.mean(micro))
        return self._known[step]

    @property
    def mean(self) -> float:
        """Mean over all steps that were asked for or noted."""
        return float(np.mean(list(self._known.values()))) if self._known else self.of(0)

    def blew_up(self, step: int, loss: float) -> bool:
        """Whether the loss of a step is non-finite, or risen by more than the magnitude of the mean initial loss."""
        return not math.isfinite(loss) or loss > self.of(step) + BLOW_UP * abs(self.mean)


@dataclass(frozen=True)
class Ramp:
    """A range test that stops itself.

    Args:
        lrs: Learning rates of the steps taken.
        losses: Loss before each step; the last may be non-finite.
        blow_up: Learning rate of the step that raised the loss beyond the limit; None if the ramp ended first.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    blow_up: float | None


@dataclass(frozen=True)
class ShortRun:
    """One constant learning rate for a few steps.

    Args:
        lr: Peak learning rate.
        losses: Loss before each step.
        diverged: Whether it was stopped.
    """

    lr: float
    losses: tuple[float, ...]
    diverged: bool

    @property
    def score(self) -> float:
        """Mean loss over the second half; inf when diverged."""
        if self.diverged:
            return math.inf
        return float(np.mean(self.losses[-tail_length(len(self.losses)) :]))


def tail_length(steps: int) -> int:
    """How many of the last losses of a run make its score: half, since small batches are noisy."""
    return max(1, steps // 2)


def critical_lr(twin: Twin, index: int, direction: Vector, *, guess: float) -> float:
    """Smallest step along ``-direction`` (to within a factor 2) that raises the loss: forward passes only.

    inf when even the largest step tried lowers the loss, 0 when even the smallest raises it.

    Source: Kalra and Barkeshli (2023); critical sharpness 2 / lr in arXiv:2601.16979.
    """
    low, high = first_rise(
        lambda lr: twin.loss_at(index, direction if lr else None, lr), guess=guess, most=CRITICAL_DOUBLINGS
    )
    return 0.0 if low == 0.0 else high


def ramp(
    twin: Twin, lrs: Sequence[float], initial: InitialLosses, *, progress: Callable[[float], None] | None = None
) -> Ramp:
    """Step once at each learning rate, ascending, until the loss blows up; its first losses are noted in `initial`."""
    losses: list[float] = []
    high = 0
    for count, lr in enumerate(lrs):
        losses.append(twin.step(lr))
        if progress is not None:
            progress(lr)
        if count < STILL_INITIAL * len(lrs) and math.isfinite(losses[-1]):
            initial.note(count, losses[-1])
            continue
        high = high + 1 if initial.blew_up(count, losses[-1]) else 0
        if high == IN_A_ROW or not math.isfinite(losses[-1]):
            # A loss is that before its step: the step that raised the first of them was the one before.
            return Ramp(tuple(lrs[: count + 1]), tuple(losses), lrs[max(count - high, 0)])
    return Ramp(tuple(lrs), tuple(losses), None)


def short_run(twin: Twin, lr: float, *, steps: int, warmup: int, initial: InitialLosses) -> ShortRun:
    """Train `steps` steps at `lr` after a linear warm-up; stop at a blow-up.

    Args:
        twin: Stepped in place.
        lr: Peak learning rate.
        steps: All steps, the warm-up included.
        warmup: Steps in which the rate rises linearly to `lr`.
        initial: Losses before training, the reference of the blow-up.
    """
    losses: list[float] = []
    high = 0
    for step in range(steps):
        place = twin.steps
        losses.append(twin.step(lr * min(1.0, (step + 1) / (warmup + 1))))
        high = high + 1 if initial.blew_up(place, losses[-1]) else 0
        if high == IN_A_ROW or not math.isfinite(losses[-1]):
            return ShortRun(lr, tuple(losses), diverged=True)
    return ShortRun(lr, tuple(losses), diverged=False)
