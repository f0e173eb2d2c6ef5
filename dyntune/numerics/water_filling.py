r"""Shares with floors that make a sum of squares over shares smallest: water-filling by its exact active set.

A weighted mean of several sources is estimated from rows of which a share :math:`p_i` comes from source i. The error
per row is :math:`V(p) = \sum_i a_i^2 / p_i - G`, what a row costs is :math:`C(p) = \sum_i t_i p_i`, and for a given
budget the error is proportional to

.. math:: C(p)\,V(p), \qquad \sum_i p_i = 1,\quad p_i \ge f_i .

In counts :math:`n_i = p_i N` under a budget :math:`\sum_i t_i n_i \le T`, with floors
:math:`n_i \ge f_i \sum_j n_j`, the constraints are linear, and the conditions of Karush, Kuhn and Tucker are

.. math:: p_i = \max\Bigl(f_i,\ \frac{c\,a_i}{\sqrt{t_i + \theta}}\Bigr), \qquad
          \theta = G c^2 + \sum_{p_j = f_j} f_j \Bigl(t_j + \theta - \frac{c^2 a_j^2}{f_j^2}\Bigr),

with c from the sum of the shares. With equal costs theta drops out: c alone is left, found by moving what lies below
its floor to the floor, at most once per source. Without floors in the way and with G = 0, theta is zero, and the shares
are those of Neyman with costs, :math:`a_i / \sqrt{t_i}`. Otherwise theta is a root in one dimension: exactly one where
G = 0, as the problem is convex; where G > 0 all roots are compared.

Sources: Neyman (1934), J. R. Statist. Soc. 97(4) (shares without floors); Cochran (1977), "Sampling techniques",
section 5.5 (costs); the floors with costs are derived above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError

__all__ = ["checked_floors", "error_per_cost", "water_filling"]

Numbers: TypeAlias = "Sequence[float] | NDArray[np.float64]"
Vector: TypeAlias = NDArray[np.float64]

# theta in units of the dearest row, as powers of 4: beyond 4^26 = 2^52 costs differ by less than rounding, below its
# inverse theta does.
FARTHEST = 26
HALVINGS = 60  # of a factor of 4: to less than rounding


def error_per_cost(amounts: Numbers, shares: Numbers, *, costs: Numbers | None = None, offset: float = 0.0) -> float:
    """``C(p) V(p)``: the error of one row times what a row costs; the smaller, the better for a given budget.

    Args:
        amounts: a_i >= 0, such as weight times standard deviation. Shape (k,).
        shares: p_i >= 0; where the amount is zero, a share of zero does no harm. Shape (k,).
        costs: t_i of one row, > 0; default one each. Shape (k,).
        offset: G, what is the same for all shares.

    Example:
        >>> error_per_cost([1.0, 3.0], [0.25, 0.75])
        16.0
    """
    a, p = np.asarray(amounts, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    used = a > 0
    if bool((p[used] <= 0).any()):
        return math.inf
    mean_cost = 1.0 if costs is None else float(p @ np.asarray(costs, dtype=np.float64))
    return mean_cost * (float((a[used] ** 2 / p[used]).sum()) - offset)


def checked_floors(floors: Numbers | None, count: int) -> Vector:
    """The floors as an array: zeros where there are none.

    Raises:
        InvalidArgumentError: Not `count` of them, one that is negative or not finite, or more than one in all.
    """
    found = np.zeros(count) if floors is None else np.array(floors, dtype=np.float64)
    if found.shape != (count,) or not bool(np.isfinite(found).all()) or bool((found < 0).any()):
        raise InvalidArgumentError(
            f"floors={found.tolist()}: a floor is a share of 0 or more, one for each of the {count} sources."
        )
    # Floors that are meant to add up to one do so up to rounding.
    if math.fsum(found) > 1 + count * np.finfo(np.float64).eps:
        raise InvalidArgumentError(
            f"floors={found.tolist()} add up to {math.fsum(found):.6g}: shares add up to one, so that no shares keep "
            "these floors. Lower them until they leave room."
        )
    return found


def water_filling(
    amounts: Numbers, floors: Numbers | None = None, costs: Numbers | None = None, *, offset: float = 0.0
) -> Vector:
    """The shares that make :func:`error_per_cost` smallest.

    Args:
        amounts: a_i >= 0, not all zero. Shape (k,).
        floors: f_i >= 0, at most one in all; default zero. Shape (k,).
        costs: t_i > 0; default equal. Shape (k,).
        offset: G >= 0, at most what the amounts leave over it; it matters with unequal costs only.

    Returns:
        Shape (k,), float64. No share is below its floor, not even by rounding; those at it are equal to it. They add up
        to one within rounding. A source of amount zero has its floor.

    Raises:
        InvalidArgumentError: Numbers outside these ranges, or floors that add up to more than one.

    Accuracy: ``tests/numerics/test_water_filling.py`` compares with SLSQP on 500 random problems: never above it by
    more than 1e-10 of the value.
    Cost: k passes over k numbers; with unequal costs about a hundred times that.
    Source: the module's docstring.

    Example:
        >>> water_filling([1.0, 1.0, 2.0], [0.5, 0.0, 0.0]).round(6).tolist()
        [0.5, 0.166667, 0.333333]
    """
    a = np.array(amounts, dtype=np.float64)
    if a.ndim != 1 or not a.size or not bool(np.isfinite(a).all()) or bool((a < 0).any()) or not bool(a.any()):
        raise InvalidArgumentError(
            f"amounts={a.tolist()}: one finite number of 0 or more is needed for each source, and one above 0 at "
            "least: without it all shares are as good."
        )
    f = checked_floors(floors, a.size)
    t = np.ones_like(a) if costs is None else np.array(costs, dtype=np.float64)
    if t.shape != a.shape or not bool(np.isfinite(t).all()) or not bool((t > 0).all()):
        raise InvalidArgumentError(f"costs={t.tolist()}: what a row costs is positive, one number for each source.")
    if not 0 <= offset < math.inf:
        raise InvalidArgumentError(f"offset={offset}: a squared length is finite and 0 or more.")
    offset = offset / float(a.max()) ** 2 if offset else 0.0
    a, t = a / a.max(), t / t.max()
    equal = _filled(a, f)[0]
    if bool((t == t[0]).all()):
        return equal
    candidates = [equal, *(_filled(a / np.sqrt(t + theta), f)[0] for theta in _thetas(a, f, t, offset))]
    return min(candidates, key=lambda p: error_per_cost(a, p, costs=t, offset=offset))


def _filled(b: Vector, f: Vector) -> tuple[Vector, float, NDArray[np.bool_]]:
    """``max(f, c b)`` that adds up to one, with c and with what lies at its floor."""
    floored = b == 0
    while True:
        room = max(0.0, 1.0 - math.fsum(f[floored]))
        level = 0.0 if floored.all() else room / math.fsum(b[~floored])
        # The level only falls: what is at its floor stays there.
        below = ~floored & (level * b <= f)
        if not below.any():
            break
        floored = floored | below
    # All can end there only where the floors leave nothing, or rounding of it.
    return np.where(floored, f, level * b), level, floored


def _thetas(a: Vector, f: Vector, t: Vector, offset: float) -> list[float]:
    """All roots of the condition on theta, from zero on."""

    def residual(theta: float) -> float:
        _, level, floored = _filled(a / np.sqrt(t + theta), f)
        held = floored & (f > 0)
        priced = f[held] * (t[held] + theta) - level**2 * a[held] ** 2 / f[held]
        return theta - offset * level**2 - float(priced.sum())

    grid = [0.0, *(4.0**power for power in range(-FARTHEST, FARTHEST + 1))]
    signs = [residual(theta) for theta in grid]
    roots = [0.0]
    for low, high, left, right in zip(grid, grid[1:], signs, signs[1:], strict=False):
        if left < 0 <= right or right <= 0 < left:
            roots.append(_bisected(residual, low, high, rising=left < 0))
    return roots


def _bisected(residual: Callable[[float], float], low: float, high: float, *, rising: bool) -> float:
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high) if low > 0 else high / 2
        below = residual(middle) < 0
        low, high = (middle, high) if below == rising else (low, middle)
    return (low + high) / 2
