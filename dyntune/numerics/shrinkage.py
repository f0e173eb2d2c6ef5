r"""Shrinkage of several noisy numbers towards their mean, by as much as their noise accounts for their differences.

With values :math:`x_i`, sampling variances :math:`s_i^2` and their spread,

.. math:: \tau^2 = \max\Bigl(0,\ \tfrac{1}{k-1} \sum (x_i - \bar x)^2 - \tfrac{1}{k} \sum s_i^2\Bigr), \qquad
          B_i = \frac{\tau^2}{\tau^2 + s_i^2}, \qquad \tilde x_i = \bar x + B_i\,(x_i - \bar x) .

Source: Efron and Morris (1975), J. Am. Stat. Assoc. 70 (empirical Bayes); tau by moments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["kept_shares"]


def kept_shares(values: NDArray[np.float64], variances: NDArray[np.float64]) -> NDArray[np.float64]:
    """B_i: how much of each value's distance from the mean is kept, in [0, 1].

    Args:
        values: x_i. Shape (k,).
        variances: s_i^2 >= 0. Shape (k,).

    Returns:
        Shape (k,); ones where nothing is noisy, zeros where noise alone explains the differences.

    Example:
        >>> kept_shares(np.array([0.0, 2.0]), np.array([0.5, 0.5])).tolist()
        [0.75, 0.75]
    """
    if len(values) < 2:
        return np.ones(len(values))
    between = max(0.0, float(values.var(ddof=1)) - float(variances.mean()))
    total = between + variances
    return np.divide(between, total, out=np.ones(len(values)), where=total > 0)
