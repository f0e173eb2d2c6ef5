"""Symmetric operators whose eigenvalues are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

Matvec = Callable[[torch.Tensor], torch.Tensor]

FLOOR = 8 * torch.finfo(torch.float32).eps
"""The library asks for nothing finer than this times ||A|| in float32 (`dyntune.numerics.krylov.FLOOR_EPS`)."""


def diagonal(values: Sequence[float] | np.ndarray | torch.Tensor, dtype: torch.dtype = torch.float32):
    """``(matvec, n)`` of the diagonal matrix with these eigenvalues.

    A random start is as likely in every basis, so a diagonal matrix is no easier than any other; only its products are
    free of rounding.
    """
    entries = torch.as_tensor(np.asarray(values)).to(dtype)
    return (lambda v: entries * v), len(entries)


def rotated(values: np.ndarray, rng: np.random.Generator, dtype: torch.dtype = torch.float32):
    """``(matvec, n)`` with these eigenvalues and dense eigenvectors: two random Householder reflections."""
    entries = torch.from_numpy(values).to(dtype)
    normals = []
    for _ in range(2):
        u = rng.standard_normal(len(values))
        normals.append(torch.from_numpy(u / np.linalg.norm(u)).to(dtype))
    p, q = normals

    def reflect(v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return v - 2 * torch.dot(u, v) * u

    def matvec(v: torch.Tensor) -> torch.Tensor:
        return reflect(reflect(entries * reflect(reflect(v, p), q), q), p)

    return matvec, len(entries)


def wanted(values: Sequence[float] | np.ndarray, which: str, k: int) -> np.ndarray:
    """The eigenvalues that `eigenvalues(..., k, which=which)` should return, in its order."""
    ascending = np.sort(np.asarray(values, dtype=np.float64))
    descending = ascending[::-1]
    if which == "largest":
        return descending[:k]
    if which == "smallest":
        return ascending[:k]
    if which == "magnitude":
        return ascending[np.argsort(-np.abs(ascending), kind="stable")][:k]
    return np.concatenate([descending[:k], ascending[:k]])
