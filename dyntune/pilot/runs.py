"""Short guarded runs: where does training blow up, and which learning rate gets furthest?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dyntune.numerics.bracket import first_rise
from dyntune.numerics.vectors import Vector
from dyntune.pilot.twin import Twin

__all__ = ["Ramp", "ShortRun", "blew_up", "critical_lr", "ramp", "short_run", "tail_length"]

# A loss this many times its starting magnitude above its start counts as a blow-up, the published criterion of
# "peaks above twice the initial loss" for a positive loss.
BLOW_UP = 1.0
# Doublings from a step of one percent of the largest weight: 24 of them reach 2e5 times the weights.
CRITICAL_DOUBLINGS = 24


def blew_up(loss: float, initial: float) -> bool:
    """Whether a loss is non-finite, or above twice its initial value (``initial + |initial|`` for any sign)."""
    return not math.isfinite(loss) or loss > initial + BLOW_UP * abs(initial)


@dataclass(frozen=True)
class Ramp:
    """A range test that stops itself.

    Args:
        lrs: Learning rates of the steps taken.
        losses: Loss before each step; the last may be non-finite.
        blow_up: Learning rate of the step whose loss exceeded the limit; None if the ramp ended first.
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


def ramp(twin: Twin, lrs: Sequence[float], *, progress: Callable[[float], None] | None = None) -> Ramp:
    """Step once at each learning rate, ascending, until the loss blows up."""
    losses: list[float] = []
    for count, lr in enumerate(lrs):
        loss = twin.step(lr)
        losses.append(loss)
        if progress is not None:
            progress(lr)
        if blew_up(loss, losses[0]):
            # The loss is that before this step: the step that raised it was the one before.
            return Ramp(tuple(lrs[: count + 1]), tuple(losses), lrs[max(count - 1, 0)])
    return Ramp(tuple(lrs), tuple(losses), None)


def short_run(twin: Twin, lr: float, *, steps: int, warmup: int, initial: float) -> ShortRun:
    """Train `steps` steps at `lr` after a linear warm-up; stop at a blow-up.

    Args:
        twin: Stepped in place.
        lr: Peak learning rate.
        steps: All steps, the warm-up included.
        warmup: Steps in which the rate rises linearly to `lr`.
        initial: Loss before training, the reference of the blow-up.
    """
    losses: list[float] = []
    for step in range(steps):
        losses.append(twin.step(lr * min(1.0, (step + 1) / (warmup + 1))))
        if blew_up(losses[-1], initial):
            return ShortRun(lr, tuple(losses), diverged=True)
    return ShortRun(lr, tuple(losses), diverged=False)
