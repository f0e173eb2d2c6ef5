"""Ratios of means: the averages first, the division last, and an interval that knows when the divisor may be zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dyntune.errors import InvalidArgumentError

__all__ = ["Ratio", "ratio_of_means"]

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means.

    Args:
        value: The ratio of the averages.
        low: Lower end of Fieller's interval; -inf where the divisor is not told from zero.
        high: Upper end; inf likewise.
        divisor: The divisor's mean.
        divisor_error: Standard error of the divisor over its value; infinite where there is one unit only.
        divisor_resolved: Whether the divisor's own interval leaves out zero.
        count: Units.
    """

    value: float
    low: float
    high: float
    divisor: float
    divisor_error: float
    divisor_resolved: bool
    count: int


def ratio_of_means(top: npt.ArrayLike, bottom: npt.ArrayLike, *, level: float = 0.95) -> Ratio:
    """``mean(top) / mean(bottom)`` over independent units, with Fieller's interval.

    A mean of ratios would be biased, and meaningless where some of the divisors are near zero or below.

    Args:
        top: One number per unit. Shape (n,).
        bottom: Likewise. Shape (n,).
        level: Of the interval, with Student's t of n - 1 degrees of freedom.

    Returns:
        The ratio; both ends infinite for one unit, or where the divisor's interval at `level` holds zero: the set of
        ratios that agree with the data is then unbounded.

    Raises:
        InvalidArgumentError: No unit, or lists of different lengths.

    Assumes: independent units; their sums about normal. Parts of one series are not: add up blocks of them first.
    Source: Fieller (1954), J. R. Stat. Soc. B 16(2).

    Example:
        >>> ratio = ratio_of_means([2.0, 4.1, 5.9], [1.0, 2.0, 3.0])
        >>> ratio.value, ratio.low, ratio.high, ratio.divisor_resolved
        (2.0, -inf, inf, False)
        >>> ratio = ratio_of_means([2.0, 2.1, 1.9, 2.0], [1.0, 1.1, 0.9, 1.0])
        >>> ratio.low < 2 < ratio.high, ratio.divisor_resolved
        (True, True)
    """
    from scipy.special import stdtrit

    x, y = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise InvalidArgumentError(f"tops of shape {x.shape}, bottoms of {y.shape}: one of each per unit is needed.")
    count, a, b = len(x), float(x.mean()), float(y.mean())
    value = a / b if b else math.nan
    if count < 2:
        return Ratio(value, -math.inf, math.inf, b, math.inf, False, count)
    (aa, ab), (_, bb) = (np.cov(x, y) / count).tolist()
    error = math.sqrt(bb) / abs(b) if b else math.inf
    t = float(stdtrit(count - 1, (1 + level) / 2))
    # Ratios r with |a - r b| <= t se(a - r b) lie between the roots of A r^2 - 2 B r + C.
    square, middle, rest = b * b - t * t * bb, a * b - t * t * ab, a * a - t * t * aa
    if not square > 0:
        return Ratio(value, -math.inf, math.inf, b, error, False, count)
    root = math.sqrt(max(middle * middle - square * rest, 0.0))
    low, high = (middle - root) / square, (middle + root) / square
    return Ratio(
        value, min(low, value), max(high, value), b, error, True, count
    )  # rounding: an interval holds its value
