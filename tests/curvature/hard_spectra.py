"""A distribution of hard spectra; `benchmarks/spectra.py` publishes figures on it.

Five families, equally likely; n is log-uniform in 100..5000, the scale in 1e-8..1e8, the relative gap g in 1e-4..1, and
eigenvectors are dense (two random reflections, so products carry rounding):

- ``gap``: the largest eigenvalue is 1, all others are uniform in (-1, 1 - g).
- ``negative``: the same, and 1 to 10 eigenvalues between -2 and -100 that dominate in magnitude.
- ``cluster``: 2 to 20 eigenvalues within g of the largest, the others uniform in (-1, 1 - 2 g).
- ``heavy``: Student's t with 1.5 to 4 degrees of freedom.
- ``decay``: i^-a with a in 0.5..2, or exp(-i / t) with t in 1..n/10, with random signs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.operators import FLOOR, rotated

FAMILIES = ("gap", "negative", "cluster", "heavy", "decay")


@dataclass(frozen=True)
class Spectrum:
    """One draw: its family, its eigenvalues, and an operator that has them."""

    family: str
    values: NDArray[np.float64]
    operator: tuple

    @property
    def norm(self) -> float:
        return float(np.abs(self.values).max())


def draw(index: int) -> Spectrum:
    """Draw number `index`; always the same one."""
    rng = np.random.default_rng([20240, index])
    family = FAMILIES[index % len(FAMILIES)]
    n = int(np.exp(rng.uniform(np.log(100), np.log(5000))))
    gap = 10 ** rng.uniform(-4, 0)
    values = _shape(family, n, gap, rng) * 10 ** rng.uniform(-8, 8)
    values = values.astype(np.float32).astype(np.float64)
    return Spectrum(family, values, rotated(values, rng))


def _shape(family: str, n: int, gap: float, rng: np.random.Generator) -> NDArray[np.float64]:
    if family == "heavy":
        return rng.standard_t(rng.uniform(1.5, 4), n)
    if family == "decay":
        i = np.arange(1, n + 1)
        sizes = i ** -rng.uniform(0.5, 2) if rng.random() < 0.5 else np.exp(-i / rng.uniform(1, n / 10))
        return sizes * rng.choice([-1, 1], n)
    if family == "cluster":
        count = int(rng.integers(2, 21))
        cluster = 1 - gap * rng.random(count)
        return np.concatenate([[1.0], cluster[1:], rng.uniform(-1, 1 - 2 * gap, n - count)])
    values = np.concatenate([[1.0], rng.uniform(-1, 1 - gap, n - 1)])
    if family == "negative":
        count = int(rng.integers(1, 11))
        values[1 : count + 1] = -(10 ** rng.uniform(np.log10(2), 2, count))
    return values


def error_and_tolerance(value: float, truth: float, norm: float, rtol: float) -> tuple[float, float]:
    """Error of a value, and what a converged one is allowed: `rtol`, the floor, and as much again for the products.

    The reflections round like a dense product does: a few eps ||A||, below the floor.
    """
    return abs(value - truth), max(rtol * abs(value), FLOOR * norm) + FLOOR * norm
