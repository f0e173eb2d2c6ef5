"""Where a noisy curve is lowest, with an interval: a cubic through paired values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Optimum", "cubic_optimum"]

Floats = npt.NDArray[np.float64]

DEGREE = 3
# Fewest points: a cubic through five leaves one degree of freedom to say how well it fits.
FEWEST = DEGREE + 2
# Points at which the derivative is looked at; over three octaves, 0.004 octaves apart.
RESOLUTION = 801


@dataclass(frozen=True)
class Optimum:
    """The minimum of a fitted curve.

    Args:
        value: Where it is.
        low: Lower end of its interval; that of the points where nothing else bounds it.
        high: Upper end.
        height: The fitted curve there, averaged over the rows.
        bounded_below: Whether the lower end lies inside of the points.
        bounded_above: Whether the upper end does.
    """

    value: float
    low: float
    high: float
    height: float
    bounded_below: bool
    bounded_above: bool


def cubic_optimum(x: npt.ArrayLike, y: npt.ArrayLike, *, level: float) -> Optimum | None:
    r"""Minimum of the mean curve, from rows of values that share their noise along a row.

    Through each row a cubic :math:`a_s + b_s x + c_s x^2 + d_s x^3`; a row's own height drops out. That the mean curve
    is lowest at m makes a linear statement on the coefficients, :math:`b + 2 c m + 3 d m^2 = 0`, so the m at which it
    is not rejected form the profile-likelihood interval (Fieller's, with one term more), exactly for normal errors.
    Two errors are held against it, each with Student's t, and the larger decides:

    - between rows: the derivative of each row's own cubic, rows being independent; errors may be correlated along a row
      and differ in size from point to point;
    - of the shape: what the mean over the rows keeps beside the cubic.

    A parabola is too little: a loss falls slowly below its best rate and rises steeply above. On the steep and the
    gentle curve of ``tests/numerics/test_optimum.py`` its 95% interval, with the same two errors, covered the optimum
    in 4 to 37% of 400 draws (two to five rows, two noises); this one in 94% or more, there and on the other curves.

    Args:
        x: Shape (r,), ascending, r at least 5.
        y: Shape (s, r): s rows; of one row the shape alone speaks.
        level: Probability with which the interval covers the minimum.

    Returns:
        None where the mean cubic has no minimum between the points.
    """
    from scipy.special import stdtrit

    points, rows = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(points) < FEWEST:
        raise ValueError(f"{len(points)} points: a cubic and its error take {FEWEST}.")
    middle = float(points.mean())
    design = np.vander(points - middle, DEGREE + 1, increasing=True)  # (r, 4)
    solve = np.linalg.pinv(design)
    coefficients = rows @ solve.T  # (s, 4)
    grid = np.linspace(points[0], points[-1], RESOLUTION) - middle
    derivative = np.stack([n * grid ** max(n - 1, 0) for n in range(DEGREE + 1)])  # (4, grid)
    slopes = coefficients @ derivative  # (s, grid)
    slope = slopes.mean(axis=0)
    height = np.vander(grid, DEGREE + 1, increasing=True) @ coefficients.mean(axis=0)
    rising = [i for i in range(RESOLUTION - 1) if slope[i] <= 0 < slope[i + 1]]
    if not rising:
        return None
    best = min(rising, key=lambda i: height[i])

    def quantile(freedom: int) -> float:
        return float(stdtrit(freedom, (1 + level) / 2))

    count = len(rows)
    freedom = len(points) - design.shape[1]
    left = rows.mean(axis=0) - design @ coefficients.mean(axis=0)
    leverage = np.linalg.norm(solve.T @ derivative, axis=0)  # (grid,)
    error: Floats = quantile(freedom) * math.sqrt(float(left @ left) / freedom) * leverage
    if count > 1:
        error = np.maximum(error, quantile(count - 1) * slopes.std(axis=0, ddof=1) / math.sqrt(count))
    inside = np.abs(slope) <= error
    low, high = best, best + 1
    while low > 0 and inside[low - 1]:
        low -= 1
    while high < RESOLUTION - 1 and inside[high + 1]:
        high += 1
    # Linear between two points of the grid: exact zeros come out where they are.
    share = float(slope[best] / (slope[best] - slope[best + 1]))
    value = float(grid[best] + share * (grid[best + 1] - grid[best]))
    return Optimum(
        value=value + middle,
        low=float(grid[low]) + middle,
        high=float(grid[high]) + middle,
        height=float(height[best]),
        bounded_below=low > 0,
        bounded_above=high < RESOLUTION - 1,
    )
