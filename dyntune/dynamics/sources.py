r"""How noisy the gradients of several sources of data are: their moments, with what the sample leaves open.

From n gradients of source i, each the mean over b rows, with the matrix K of their inner products (S its trace, T the
sum of all its entries):

.. math:: \hat v = \frac{S - T / n}{n - 1}, \qquad \hat\sigma^2 = b\,\hat v, \qquad
          \widehat{|\mu|^2} = \frac{T - S}{n (n - 1)}, \qquad \hat m = (b - 1)\,\hat v + S / n

are unbiased for the trace of one row's covariance, the squared length of the mean, and one row's raw second moment
:math:`\sigma^2 + |\mu|^2`. Inner products of different sources' means are plain averages.

The interval is a bootstrap over the gradients of each source. A resample's covariance is smaller by (n - 1) / n on
average, and its squared mean larger by twice :math:`\hat v / n` than what is estimated: both are put right.

Source: one-way analysis of variance, as in :mod:`dyntune.dynamics.noise`; Efron (1979) (bootstrap).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError, NonFiniteError

__all__ = ["SourceMoments", "blended_moments", "source_moments"]

Array: TypeAlias = NDArray[np.float64]
DRAWS = 400  # 2.5% is then ten draws


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceMoments:
    """Moments of one row's gradient, by source.

    Args:
        variance: Trace of its covariance, >= 0. Shape (k,).
        second: Raw second moment, >= 0. Shape (k,).
        means: Inner products of the sources' mean gradients, unbiased (a diagonal entry may be negative). Shape (k, k).
        variance_draws: Bootstrap of the above. Shape (d, k).
        second_draws: Likewise. Shape (d, k).
        means_draws: Likewise. Shape (d, k, k).
        counts: Gradients behind it. Shape (k,).
        measurements: How many looks were averaged.
    """

    variance: Array
    second: Array
    means: Array
    variance_draws: Array
    second_draws: Array
    means_draws: Array
    counts: tuple[int, ...]
    measurements: float = 1.0


def source_moments(
    gram: Array, counts: Sequence[int], *, rows: int = 1, draws: int = DRAWS, seed: int = 0
) -> SourceMoments:
    """Moments from the inner products of gradients.

    Args:
        gram: Inner products of all gradients, those of one source side by side. Shape (n, n).
        counts: How many are of each source, two at least.
        rows: Rows that each gradient is the mean of.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        InvalidArgumentError: Shapes that do not fit, or fewer than two gradients of a source.
        NonFiniteError: An inner product is NaN or infinite.

    Example:
        >>> moments = source_moments(np.array([[1.0, -1.0], [-1.0, 1.0]]), [2])
        >>> moments.variance.tolist(), moments.second.tolist()
        ([2.0], [1.0])
    """
    gram = np.asarray(gram, dtype=np.float64)
    if not counts or gram.shape != (sum(counts), sum(counts)) or rows < 1:
        raise InvalidArgumentError(
            f"inner products of shape {gram.shape} for counts={list(counts)} and rows={rows}: one row and one column "
            "for each gradient, and a row at least in each."
        )
    if min(counts) < 2:
        raise InvalidArgumentError(
            f"counts={list(counts)}: noise is told apart from the mean by two gradients of every source at least; give "
            "each more rows, or smaller parts."
        )
    if not bool(np.isfinite(gram).all()):
        raise NonFiniteError(
            "a gradient has entries that are NaN or infinite: its variance is none. Look for the rows that cause it."
        )
    rng = np.random.default_rng(seed)
    ends = np.cumsum([0, *counts])
    picks = np.zeros((draws, len(gram)))
    for start, n in zip(ends, counts, strict=False):
        picks[:, start : start + n] = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    whole = _moments(gram, np.ones((1, len(gram))), ends, rows, resampled=False)
    again = _moments(gram, picks, ends, rows, resampled=True)
    return SourceMoments(
        variance=whole[0][0],
        second=whole[1][0],
        means=whole[2][0],
        variance_draws=again[0],
        second_draws=again[1],
        means_draws=again[2],
        counts=tuple(int(n) for n in counts),
    )


def _moments(gram: Array, picks: Array, ends: Array, rows: int, *, resampled: bool) -> tuple[Array, Array, Array]:
    """Moments for each row of how often each gradient counts."""
    k = len(ends) - 1
    member = np.zeros((len(gram), k))
    for i in range(k):
        member[ends[i] : ends[i + 1], i] = 1.0
    n = member.sum(0)
    squares = (picks * np.diag(gram)) @ member
    sums = np.empty((len(picks), k, k))
    for i in range(k):
        part = slice(ends[i], ends[i + 1])
        sums[:, i] = (picks * (picks[:, part] @ gram[part])) @ member
    totals = np.diagonal(sums, axis1=1, axis2=2)
    # Rounding may leave a variance of zero a little below it.
    spread = np.maximum(squares - totals / n, 0.0) / (n - 1)
    spread *= n / (n - 1) if resampled else 1.0
    means = sums / np.outer(n, n)
    own = np.arange(k)
    means[:, own, own] -= spread * ((2 if resampled else 1) / n)
    return rows * spread, (rows - 1) * spread + squares / n, means


def blended_moments(before: SourceMoments, now: SourceMoments, *, memory: float) -> SourceMoments:
    """An average over looks at a training: of all, until there are `memory` of them, then one that forgets.

    Args:
        before: What is known.
        now: A new look, independent of it.
        memory: Looks that count, >= 1; 1 forgets at once.

    Raises:
        InvalidArgumentError: Other sources or draws, or a memory below one.
    """
    if before.variance_draws.shape != now.variance_draws.shape:
        raise InvalidArgumentError(
            f"moments of {before.variance.size} sources ({len(before.variance_draws)} draws) do not go on with those "
            f"of {now.variance.size} ({len(now.variance_draws)} draws): previous=... has to be about the same sources."
        )
    if not memory >= 1:
        raise InvalidArgumentError(f"memory={memory}: at least the present look counts.")
    share = 1 / min(before.measurements + now.measurements, memory)

    def mixed(old: Array, new: Array) -> Array:
        return (1 - share) * old + share * new

    return SourceMoments(
        variance=mixed(before.variance, now.variance),
        second=mixed(before.second, now.second),
        means=mixed(before.means, now.means),
        # Errors of independent looks are independent: so are the draws.
        variance_draws=mixed(before.variance_draws, now.variance_draws),
        second_draws=mixed(before.second_draws, now.second_draws),
        means_draws=mixed(before.means_draws, now.means_draws),
        counts=tuple(a + b for a, b in zip(before.counts, now.counts, strict=True)),
        measurements=before.measurements + now.measurements,
    )
