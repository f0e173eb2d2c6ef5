"""Medians with their spread, paired ratios with a bootstrap interval, counts with an exact one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

LEVEL = 0.95
NUM_RESAMPLES = 10_000

Column = Sequence[float]


@dataclass(frozen=True)
class Summary:
    """Median, extremes and quartiles of one column."""

    median: float
    low: float
    high: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """A ratio with its percentile bootstrap interval at `LEVEL`."""

    value: float
    low: float
    high: float


def summary(values: Column) -> Summary:
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75])
    return Summary(float(median), float(min(values)), float(max(values)), (float(first), float(third)))


def _resampled_log_medians(numerator: Column, denominator: Column, seed: int = 0) -> tuple[float, np.ndarray]:
    """The log of the median paired ratio, and the same for resampled repeats: pairs are kept together."""
    logs = np.log(np.asarray(numerator) / np.asarray(denominator))
    picks = np.random.default_rng(seed).integers(len(logs), size=(NUM_RESAMPLES, len(logs)))
    return float(np.median(logs)), np.median(logs[picks], axis=1)


def _interval(value: float, resampled: np.ndarray) -> Interval:
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.exp(np.quantile(resampled, tails))
    return Interval(float(np.exp(value)), float(low), float(high))


def paired_ratio(numerator: Column, denominator: Column) -> Interval:
    """Median over repeats of numerator / denominator, repeat by repeat: what drifts in a round cancels."""
    return _interval(*_resampled_log_medians(numerator, denominator))


def geometric_mean_ratio(pairs: Sequence[tuple[Column, Column]]) -> Interval:
    """Geometric mean over problems of the median paired ratios; problems are fixed, repeats are resampled."""
    columns = [_resampled_log_medians(*pair, seed=i) for i, pair in enumerate(pairs)]
    values, resampled = zip(*columns, strict=True)
    return _interval(float(np.mean(values)), np.mean(resampled, axis=0))


def exact_interval(num_failures: int, num_runs: int) -> tuple[float, float]:
    """Clopper and Pearson (1934) at `LEVEL` for a failure rate."""
    tail, successes = (1 - LEVEL) / 2, num_runs - num_failures
    low = float(beta.ppf(tail, num_failures, successes + 1)) if num_failures else 0.0
    high = float(beta.ppf(1 - tail, num_failures + 1, successes)) if successes else 1.0
    return low, high
