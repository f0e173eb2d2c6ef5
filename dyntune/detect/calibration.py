r"""How far a healthy run strays by chance: thresholds to a stated average run length.

A threshold is asked for by the *average run length* that it shall have, the mean number of healthy steps between two
false alarms. The largest score of each healthy block is kept; correlation within a block does not matter then. Above
their median the maxima follow a generalised Pareto distribution, and the threshold is its quantile:

.. math:: h = u + \frac{\sigma}{\xi} \left[ \left( \frac{2 b}{\mathrm{ARL}} \right)^{-\xi} - 1 \right]

with b the steps in a block, u the median and the mean excess sigma / (1 - xi). The shape is never taken below that of
Student's t with 4 degrees of freedom, 1/4: a few hundred maxima cannot show that a tail is lighter than what training
runs have shown. That costs reach where tails are light, and is why the threshold holds where they are not.

Source: Pickands (1975), Ann. Statist. 3(1), theorem 7; Hosking and Wallis (1987), Technometrics 29(3), eq. 3 (moments
by probability weights); block maxima under correlation: Leadbetter (1974), Z. Wahrscheinlichkeitstheorie 28.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dyntune.detect.steps import BLOCK
from dyntune.monitor.rows import Array

__all__ = ["CRITICAL", "WARNING", "Threshold", "prior_threshold", "tail_threshold"]

WARNING = 1e5  # steps between two false warnings of one detector
# Between two false critical alarms: at most 4 in a million over all detectors together, of which there are some twenty.
CRITICAL = 1e7
LEAST_SHAPE = 0.25  # of Student's t with 4 degrees of freedom
MOST_SHAPE = 0.5  # beyond it the variance is infinite and a fit of a few dozen excesses means nothing
ENOUGH = 32  # maxima: 1,024 healthy steps
# Robust standard deviations (1.4826 MAD = 1.098) of Student's t with 4 degrees of freedom; its tail is 3 / x^4.
TAIL_CONSTANT, TAIL_SCALE = 3.0, 1.098


@dataclass(frozen=True)
class Threshold:
    """A score above which there is an alarm.

    Args:
        value: In robust standard deviations.
        run_length: Steps between two false alarms that it is made for.
        calibrated: Whether the run's own healthy steps set it; else the heavy-tailed prior did.
    """

    value: float
    run_length: float
    calibrated: bool

    @property
    def said(self) -> str:
        """Where it comes from, for a text."""
        if self.calibrated:
            return (
                f"threshold {self.value:.1f}, set by this run's healthy steps to {self.run_length:.0e} between alarms"
            )
        return f"threshold {self.value:.1f}, of heavy-tailed noise, since there were too few healthy steps to set it by"


def prior_threshold(run_length: float) -> Threshold:
    """What Student's t with 4 degrees of freedom exceeds once in so many steps.

    Args:
        run_length: Steps, far above 1.

    Returns:
        In robust standard deviations.

    Example:
        >>> round(prior_threshold(1e5).value, 1)
        21.3
    """
    return Threshold((TAIL_CONSTANT * run_length) ** 0.25 / TAIL_SCALE, run_length, calibrated=False)


def tail_threshold(maxima: Array, run_length: float, *, block: int = BLOCK) -> Threshold:
    """Threshold for a score by the largest scores of healthy blocks.

    Args:
        maxima: One of each block. Shape (n,).
        run_length: Steps between two false alarms.
        block: Steps in a block.

    Returns:
        With fewer than 32 maxima the prior's, or, if that is more, what the largest of them becomes in so many steps
        where the tail falls like x^-4.

    Assumes:
        Blocks to come are like those.

    Example:
        >>> maxima = np.random.default_rng(0).standard_normal((128, 32)).max(1)
        >>> 4.3 < tail_threshold(maxima, 1e5).value < 10.0  # 4.26 is the quantile of normal noise
        True
    """
    if maxima.size < ENOUGH:
        return _cautious(maxima, run_length, block)
    middle = float(np.median(maxima))
    excesses = np.sort(maxima[maxima > middle]) - middle
    if excesses.size == 0:
        return _cautious(maxima, run_length, block)
    shape = _shape(excesses)
    scale = float(excesses.mean()) * (1.0 - shape)
    # Seen so far is no proof of what comes: two standard errors of the mean excess on top.
    scale *= 1.0 + 2.0 / math.sqrt(excesses.size)
    rare = 2.0 * block / run_length
    return Threshold(middle + scale / shape * (rare**-shape - 1.0), run_length, calibrated=True)


def _cautious(maxima: Array, run_length: float, block: int) -> Threshold:
    prior = prior_threshold(run_length)
    if maxima.size == 0:
        return prior
    longer = max(run_length / (block * maxima.size), 1.0) ** LEAST_SHAPE
    return Threshold(max(prior.value, float(maxima.max()) * longer), run_length, calibrated=False)


def _shape(excesses: Array) -> float:
    """By probability-weighted moments: xi = 2 - a0 / (a0 - 2 a1), with ascending excesses."""
    n = excesses.size
    above = 1.0 - (np.arange(1, n + 1) - 0.35) / n  # plotting positions of Hosking and Wallis
    first, second = float(excesses.mean()), float((above * excesses).mean())
    found = 2.0 - first / (first - 2.0 * second) if first > 2.0 * second else MOST_SHAPE
    return min(max(found, LEAST_SHAPE), MOST_SHAPE)
