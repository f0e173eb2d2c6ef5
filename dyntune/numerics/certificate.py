r"""How surely does a Krylov space from a random start contain the extreme eigenvalue?

A small residual proves closeness to *an* eigenvalue, never to the largest. What can be proved about the largest comes
from the randomness of the start vector. Lanczos builds :math:`v_j = p_j(A) v_0` with orthonormal :math:`v_j`, so for a
unit eigenvector :math:`u` of eigenvalue :math:`\lambda`, Bessel's inequality reads

.. math:: \langle u, v_0\rangle^2 \; \sum_j p_j(\lambda)^2 \le 1 .

If an eigenvalue :math:`\ge \lambda^*` exists, the start vector must therefore be almost orthogonal to its eigenvector:
:math:`\langle u, v_0\rangle^2 \le 1 / C(\lambda^*)` with the (inverse) Christoffel function :math:`C = \sum_j p_j^2`,
which grows beyond the largest Ritz value. For a start drawn uniformly on the sphere that has probability at most
:math:`\delta` once :math:`1/C(\lambda^*)` falls below the :math:`\delta`-quantile of Beta(1/2, (n-1)/2). The event
concerns the start vector alone, so the bound holds however the stopping time was chosen.

Source: van Dorsselaer, Hochstenbach and van der Vorst (2000), "Computing probabilistic bounds for extreme eigenvalues
of symmetric matrices with the Lanczos method", SIAM J. Matrix Anal. Appl. 22(3). We evaluate the sum of all
polynomials rather than the last one, and carry it through thick restarts (:class:`PolynomialTrack`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["PolynomialTrack", "RitzState", "level_reached", "level_still_needed", "log_needed", "probable_bound"]

Array = NDArray[np.float64]

# Below this probability the quantile of the weight comes from its leading term, F(w) = 2 sqrt(w) / B(1/2, (n-1)/2),
# whose relative error is about n w < 1e-190 there; the library function nears the smallest float.
TAIL = 1e-100


def log_needed(n: int, failure_probability: float, *, random_share: float = 1.0) -> float:
    r"""The value log C must reach for a failure probability of at most `failure_probability`.

    Args:
        n: Dimension in which the random direction was drawn.
        failure_probability: :math:`\delta`, in [0, 1].
        random_share: Length of the random component before normalisation over the sum of the lengths of both
            components (1 for a purely random start, 1/2 for an equal mix). A fixed component only shifts the weight,
            and a centred weight is the most likely to be small, so the mix costs ``-2 log(random_share)``.
    """
    from scipy.special import betaincinv, betaln

    if n == 1:
        return -2 * math.log(random_share)
    if failure_probability == 0.0:
        return math.inf
    b = (n - 1) / 2
    if failure_probability < TAIL:
        log_weight = 2 * (math.log(failure_probability) + float(betaln(0.5, b)) - math.log(2))
    else:
        log_weight = math.log(float(betaincinv(0.5, b, failure_probability)))
    return -log_weight - 2 * math.log(random_share)


def level_reached(n: int, log_christoffel: float, *, random_share: float = 1.0) -> float:
    """The failure probability that log C = `log_christoffel` stands for: the inverse of :func:`log_needed`."""
    from scipy.special import betainc

    weight = math.exp(min(0.0, -log_christoffel - 2 * math.log(random_share)))
    if n == 1:
        return 1.0 if weight == 1.0 else 0.0
    return float(betainc(0.5, (n - 1) / 2, weight))


def level_still_needed(failure_probability: float, earlier: Sequence[float]) -> float:
    """The level that one more independent run must reach, after runs that reached the levels `earlier`.

    Starts from independent random vectors miss an eigenvector together only if each is nearly orthogonal to it. The
    product of r uniform variables falls below x with probability ``Q(r, -log x)``, Q the regularised upper gamma
    function (Fisher's method of combining tests).
    """
    from scipy.special import gammainccinv

    reached = sum(math.log(level) if level > 0 else -math.inf for level in earlier)
    return math.exp(min(0.0, -float(gammainccinv(len(earlier) + 1, failure_probability)) - reached))


@dataclass(frozen=True)
class RitzState:
    """The projected problem at one moment.

    Args:
        values: Ritz values, ascending, shape (m,).
        residuals: Norms ``||A y - theta y||`` of the Ritz pairs, shape (m,).
        vectors: Coefficients of the Ritz vectors in the basis, shape (m, m).
    """

    values: Array
    residuals: Array
    vectors: Array


@dataclass
class PolynomialTrack:
    """Everything needed to evaluate C after any number of thick restarts.

    A thick restart keeps some Ritz vectors and filters the rest out of the start vector: the last basis vector stays a
    polynomial of A times the first one, whose roots are the present Ritz values and all those discarded so far, and
    whose leading coefficient is the inverse product of all off-diagonal entries. Kept Ritz vectors y contribute
    through ``(lambda - theta) <u, y> = residual <u, v_last>``.
    """

    log_betas: float = 0.0
    discarded: list[float] = field(default_factory=list)

    def log_christoffel(self, ritz: RitzState, at: float) -> float:
        """log C(`at`) for a point outside the discarded Ritz values; inf when the space is invariant."""
        if self.log_betas == -math.inf:
            return math.inf
        gaps = np.abs(at - ritz.values)
        old = np.abs(at - np.asarray(self.discarded))
        if not np.all(gaps > 0) or not np.all(old > 0):
            return -math.inf
        log_last = float(np.log(gaps).sum() + np.log(old).sum()) - self.log_betas
        return 2 * log_last + float(np.log1p(np.square(ritz.residuals / gaps).sum()))


def probable_bound(track: PolynomialTrack, ritz: RitzState, *, needed: float, upper: bool) -> float:
    """The point beyond which no eigenvalue lies, up to the failure probability behind `needed`.

    Bisection on log C, which increases away from the Ritz values; the answer is accurate to 1e-6 of the distance to
    the extreme Ritz value.
    """
    sign = 1.0 if upper else -1.0
    edge = float(ritz.values[-1] if upper else ritz.values[0])
    scale = max(float(np.abs(ritz.values).max()), math.ulp(0.0) * 1e20)
    low, high = scale * 1e-12, scale
    while track.log_christoffel(ritz, edge + sign * high) < needed:
        high *= 2
        if high > 1e30 * scale:
            return sign * math.inf
    if track.log_christoffel(ritz, edge + sign * low) >= needed:
        return edge
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        if track.log_christoffel(ritz, edge + sign * middle) >= needed:
            high = middle
        else:
            low = middle
    return edge + sign * high
