r"""Stochastic Lanczos quadrature: the spectral density of an operator from a few random probes.

For a unit vector v, Lanczos with m steps gives the m-point Gauss quadrature of the measure
:math:`\sum_i \langle u_i, v\rangle^2 \delta(\lambda - \lambda_i)`: nodes are the Ritz values, weights the squared first
components of the eigenvectors of the tridiagonal matrix, exact for polynomials up to degree 2m - 1. Averaged over
random v it estimates the spectral density.

Source: Golub and Welsch (1969); Lin, Saad and Yang (2016), "Approximating spectral densities of large matrices", SIAM
Review 58(1); Ghorbani, Krishnan and Xiao (2019), arXiv:1901.10159, for neural networks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dyntune.numerics.krylov import KrylovRun, UnitScale
from dyntune.numerics.operator import Product
from dyntune.numerics.vectors import Basis

__all__ = ["gauss_quadrature", "smoothed_density"]

Array = NDArray[np.float64]


def gauss_quadrature(product: Product, basis: Basis, *, num_steps: int, key: tuple[int, ...]) -> tuple[Array, Array]:
    """Nodes and weights (each (num_steps,)) for one random probe; padded with weight 0 if the space is invariant.

    Args:
        product: Product of the operator.
        basis: At least ``num_steps + 1`` rows; overwritten.
        num_steps: Products, and quadrature points.
        key: Names the random probe.
    """
    basis.load(0, basis.space.normal(*key))
    basis.scale(0, basis.norm(0).reciprocal())
    run = KrylovRun(basis, 0, scale=0.0)
    eps = torch.finfo(basis.space.dtype).eps
    unit = UnitScale(product, basis.space)
    while run.size < num_steps:
        run.step(unit, eps)
        if run.beta == 0.0:
            break
    ritz = run.ritz()
    padding = num_steps - run.size
    # Padding repeats the last node: a node at 0 would stretch the range of a spectrum that does not reach there.
    nodes: Array = np.pad(ritz.values / unit.factor, (0, padding), mode="edge")
    return nodes, np.pad(np.square(ritz.vectors[0]), (0, padding))


def smoothed_density(nodes: Array, weights: Array, grid: Array, bandwidth: float) -> Array:
    """Quadratures (probes, m) as densities (probes, len(grid)): a Gaussian of width `bandwidth` on every node."""
    scaled = (grid[None, :, None] - nodes[:, None, :]) / bandwidth
    kernel = np.exp(-0.5 * np.square(scaled)) / (bandwidth * np.sqrt(2 * np.pi))
    density: Array = np.einsum("pgm,pm->pg", kernel, weights)
    return density
