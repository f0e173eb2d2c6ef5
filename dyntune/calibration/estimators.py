r"""Four estimators of calibration error of one yes-or-no problem, for many sets of weights at once.

All take confidences f, what came true y, and rows of weights (draws of a bootstrap: how often each row was drawn), so
that a bootstrap is one call. *Binned* and *equal-mass* are the plug-in
:math:`\sum_b \frac{n_b}{n} |\bar f_b - \bar y_b|`, biased upwards: above zero for a perfect forecaster. *Debiased*
takes the noise's part off each bin's square,

.. math:: \sum_b \frac{n_b}{n} \Bigl[(\bar f_b - \bar y_b)^2 - \frac{\bar y_b (1 - \bar y_b)}{n_b - 1}\Bigr] ,

and is its signed root. *Smooth* has no bins: residuals y - f smoothed with a Gaussian of width sigma, reflected at 0
and 1, have an absolute integral that falls with sigma; the error is where it equals sigma.

Sources: Naeini et al. (2015); Kumar, Liang, Ma (2019), arXiv:1909.10155; Blasiok, Nakkiran (2023), arXiv:2309.12236.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np

__all__ = ["ESTIMATORS", "Kind", "bin_edges", "smoothed_residuals"]

Kind: TypeAlias = Literal["smooth", "debiased", "equal-mass", "binned"]
BINS = 15  # Guo et al. (2017), Table 1
# Cells of the smooth estimator: their half width, 1/4096, is far below any error that rows could establish (the
# standard error of a mean of 10^6 residuals is 1/2000).
CELLS = 2048
BISECTIONS = 20  # of [0, 1]: to 1e-6


def binned(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Plug-in error over bins of equal width; (B,) for weights of shape (B, N)."""
    return _plug_in(bin_edges(confidence, equal_mass=False), confidence, correct, weights)


def equal_mass(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Plug-in error over bins of as many rows each, ties together."""
    return _plug_in(bin_edges(confidence, equal_mass=True), confidence, correct, weights)


def debiased(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Root of the squared error less its noise, negative where the noise is more."""
    count, f, y = _sums(bin_edges(confidence, equal_mass=True), confidence, correct, weights)
    enough = count > 1
    n = np.where(enough, count, 2.0)
    mean_f, mean_y = f / n, y / n
    parts = np.where(enough, count * ((mean_f - mean_y) ** 2 - mean_y * (1 - mean_y) / (n - 1)), 0.0)
    total = parts.sum(-1) / np.where(enough, count, 0.0).sum(-1).clip(1)
    root: np.ndarray = np.sign(total) * np.sqrt(np.abs(total))
    return root


def smooth(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The width at which the smoothed residuals' absolute integral equals the width."""
    from scipy.fft import dct

    cells = dct(_residual_cells(confidence, correct, weights), type=2, axis=-1)
    low, high = np.zeros(len(cells)), np.ones(len(cells))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = np.abs(_heat(cells, middle)).sum(-1) > middle
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


ESTIMATORS: dict[Kind, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "smooth": smooth,
    "debiased": debiased,
    "equal-mass": equal_mass,
    "binned": binned,
}


def bin_edges(confidence: np.ndarray, *, equal_mass: bool) -> np.ndarray:
    """Inner edges of the bins; a confidence on an edge is in the bin above it."""
    if not equal_mass:
        return np.linspace(0, 1, BINS + 1)[1:-1]
    ordered = np.sort(confidence)
    return np.unique(ordered[(np.arange(1, BINS) * len(ordered)) // BINS])


def smoothed_residuals(confidence: np.ndarray, correct: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean residual y - f and share of rows, smoothed, as densities over cells; both of shape (CELLS,)."""
    from scipy.fft import dct

    ones = np.ones((1, len(confidence)))
    residuals = dct(_residual_cells(confidence, correct, ones), type=2, axis=-1)
    rows = dct(_in_cells(confidence, np.ones(len(confidence)), ones), type=2, axis=-1)
    wide = np.array([width])
    residual: np.ndarray = _heat(residuals, wide)[0] * CELLS
    density: np.ndarray = _heat(rows, wide)[0] * (CELLS / len(confidence))
    return residual, density


def _plug_in(edges: np.ndarray, confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    count, f, y = _sums(edges, confidence, correct, weights)
    error: np.ndarray = np.abs(f - y).sum(-1) / count.sum(-1)
    return error


def _sums(
    edges: np.ndarray, confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By bin: rows, their confidences, those that came true; each (B, bins)."""
    member = np.zeros((len(confidence), len(edges) + 1))
    member[np.arange(len(confidence)), np.searchsorted(edges, confidence, side="right")] = 1.0
    correct = np.broadcast_to(correct, weights.shape)
    return weights @ member, (weights * confidence) @ member, (weights * correct) @ member


def _residual_cells(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Residuals of each draw in cells over [0, 1], divided by the number of rows; (B, CELLS)."""
    residual = (np.broadcast_to(correct, weights.shape) - confidence) * weights
    cells: np.ndarray = _in_cells(confidence, residual, weights) / weights.sum(-1, keepdims=True)
    return cells


def _in_cells(confidence: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Values at the cells' centres, each shared by the two beside it in proportion; (B, CELLS)."""
    place = (confidence * CELLS - 0.5).clip(0, CELLS - 1)
    left = np.floor(place).astype(int).clip(0, CELLS - 2)
    share = place - left
    values = np.broadcast_to(values, weights.shape)
    made = np.empty((len(weights), CELLS))
    for row, value in zip(made, values, strict=True):
        row[:] = np.bincount(left, value * (1 - share), CELLS) + np.bincount(left + 1, value * share, CELLS)
    return made


def _heat(cosines: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Cells smoothed by a Gaussian reflected at both ends: each cosine of [0, 1] is damped by itself."""
    from scipy.fft import idct

    order = np.arange(cosines.shape[-1])
    damped = cosines * np.exp(-0.5 * (np.pi * order * width[:, None]) ** 2)
    smoothed: np.ndarray = idct(damped, type=2, axis=-1)
    return smoothed
