"""What is measured on learning rates, defined once.

Losses are clipped at the initial loss throughout, and a run that was stopped counts as the initial loss: a learning
rate cannot do worse than not to train at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

OK, NON_FINITE, MIDPOINT, PEAK = 0, 1, 2, 3  # why a run failed
PEAK_FACTOR = 2.0  # a run whose training loss peaks above this many times the initial loss has failed
LEVEL = 0.95

Curve = dict[float, list[float]]  # learning rate -> losses, one per seed


def clipped(loss: float, initial: float) -> float:
    """min(loss, initial); what is not finite counts as the initial loss."""
    return min(loss, initial) if math.isfinite(loss) else initial


def regret(losses: Sequence[float], best: Sequence[float], initial: Sequence[float]) -> float:
    """(loss - best) / (initial - best), each the mean over seeds: 0 as good as the best, 1 as bad as no training.

    Negative where the learning rate beats the grid's best on these seeds; the mean over scenarios is unbiased only if
    that is left in.

    Args:
        losses: Final losses at the suggestion, one per seed.
        best: Those at the grid's best on the same seeds.
        initial: Initial losses of those seeds.
    """
    at = np.mean([clipped(loss, start) for loss, start in zip(losses, initial, strict=True)])
    floor = np.mean([clipped(loss, start) for loss, start in zip(best, initial, strict=True)])
    room = float(np.mean(initial) - floor)
    if not room > 0:
        raise ValueError(f"best={floor} is not below initial={np.mean(initial)}: nothing was learnt to lose.")
    return float(at - floor) / room


def failure(train: float, peak: float, failed: int, *, initial: float, best: float) -> int:
    """``OK`` or why a run failed: not finite, a peak above twice the initial loss, an end above the midpoint.

    Args:
        train: Final training loss.
        peak: Peak training loss.
        failed: What was found during the run.
        initial: Initial loss.
        best: Final training loss at the best learning rate.
    """
    if failed != OK:
        return failed
    if not math.isfinite(train):
        return NON_FINITE
    if peak > PEAK_FACTOR * initial:
        return PEAK
    return MIDPOINT if train > (initial + best) / 2 else OK


def octaves(a: float, b: float) -> float:
    """|log2(a / b)|."""
    return abs(math.log2(a / b))


def best_lr(curve: Curve) -> float:
    """The learning rate with the smallest mean loss (already clipped)."""
    return min(curve, key=lambda lr: (float(np.mean(curve[lr])), lr))


def loss_at(curve: Curve, lr: float) -> float:
    """The mean loss, interpolated over log LR; beyond the ends that of the end.

    For developing only: a figure that is reported comes from real training.
    """
    grid = sorted(curve)
    return float(np.interp(math.log(lr), np.log(grid), [np.mean(curve[point]) for point in grid]))


def onset(fails: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest exponent found to fail, bisected to neighbours.

    Args:
        fails: Whether the learning rate with this exponent fails for at least half of the seeds.
        low: An exponent that does not.
        high: One that does.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    return high


def share(count: int, total: int, *, level: float = LEVEL) -> dict[str, float]:
    """A rate with its exact (Clopper-Pearson) interval: safety, coverage, "within a factor of two"."""
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, count, total - count + 1)) if count else 0.0
    high = float(stats.beta.ppf(1 - tail, count + 1, total - count)) if count < total else 1.0
    return {"count": count, "of": total, "rate": count / total, "low": low, "high": high}


def spread(lrs: Sequence[float]) -> float:
    """Standard deviation in octaves over seeds (n - 1 in the denominator)."""
    return float(np.std(np.log2(lrs), ddof=1))


def mean_interval(
    values: Sequence[float], *, level: float = LEVEL, resamples: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """The mean with its percentile bootstrap interval over scenarios.

    For a comparison, pass the paired differences: it counts if the interval excludes zero.
    """
    array = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    low, high = np.quantile(array[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}
