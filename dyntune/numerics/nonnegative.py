r"""Projection of a direction onto all that no other direction opposes, from a triangular factor instead of a Gramian.

Given g_0 and g_1 .. g_m, the point of :math:`\{d : \langle g_i, d \rangle \ge 0\}` nearest to g_0 is, by Moreau's
decomposition, :math:`d = g_0 + \sum_i v_i g_i` with :math:`v = \arg\min_{v \ge 0} \|g_0 + \sum_i v_i g_i\|`:
non-negative least squares. A Gramian has the square of the gradients' condition, and half of its digits are gone where
two tasks nearly agree; here the long matrix of directions is reduced by QR, a block of rows after the other, and each
direction is scaled to length one, which leaves the cone as it is.

Sources: Moreau (1962); Lawson, Hanson (1974), chapter 23 (NNLS); Demmel et al. (2012), arXiv:0808.2664 (QR by blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dyntune.errors import InvalidArgumentError, NonFiniteError

__all__ = ["ConeProjection", "cone_projection", "triangular_factor"]

BLOCK = 1 << 20  # rows at once: 8 MB for each direction
# Least length of what is left, of directions of length one: below, rounding in float64 (a few 1e-16) makes up more than
# a millionth of its cosines.
VANISHING = 1e-9


@dataclass(frozen=True, kw_only=True)
class ConeProjection:
    """The nearest direction that nothing opposes.

    Args:
        multipliers: v, for directions as given (not scaled); shape (m,).
        length: Norm of the direction g_0 + sum v_i g_i.
        cosines: Of it with g_0 and each g_i; shape (m + 1,); 0 for a direction of length zero.
        residual: Largest violation of the optimality conditions, for directions of length one: 0 is exact.
    """

    multipliers: np.ndarray
    length: float
    cosines: np.ndarray
    residual: float


def triangular_factor(directions: Sequence[Sequence[torch.Tensor]]) -> np.ndarray:
    """R of the QR decomposition of directions as columns; shape (k, k) for k directions, float64.

    Inner products of the columns of R are those of the directions.

    Args:
        directions: Each a list of tensors of the same shapes.

    Raises:
        InvalidArgumentError: None given.
        NonFiniteError: An entry is NaN or infinite.

    Example:
        >>> r = triangular_factor([[torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])]])
        >>> (r.T @ r).round(9).tolist()
        [[25.0, 8.0], [8.0, 4.0]]
    """
    if not directions or not directions[0]:
        raise InvalidArgumentError("no directions: a projection takes one at least, with one tensor at least.")
    count = len(directions)
    factor = torch.zeros(0, count, dtype=torch.float64)
    for parts in zip(*directions, strict=True):
        flat = [p.detach().reshape(-1) for p in parts]
        for start in range(0, max(1, len(flat[0])), BLOCK):
            block = torch.stack([f[start : start + BLOCK] for f in flat], 1).to("cpu", torch.float64)
            if not bool(torch.isfinite(block).all()):
                raise NonFiniteError(
                    "a gradient is NaN or infinite: there is no direction to take. Look at the losses."
                )
            factor = torch.linalg.qr(torch.cat([factor, block]), mode="r").R
    made: np.ndarray = factor.numpy()
    return made


def cone_projection(factor: np.ndarray) -> ConeProjection:
    """Project the first column onto the directions that no other column opposes.

    Args:
        factor: Directions as columns, or their :func:`triangular_factor`; shape (any, m + 1). Columns of zeros oppose
            nothing.

    Raises:
        InvalidArgumentError: Not a matrix.

    Accuracy:
        Cosines with the others at least -1e-6, up to condition 1e12; what is shorter than 1e-9 of the first direction
        counts as nothing (``tests/numerics``).

    Example:
        >>> found = cone_projection(np.array([[-4.0, 6.0], [1.0, 1.0], [1.0, 1.0]]))
        >>> found.multipliers.round(4).tolist()
        [0.5789]
    """
    a = np.asarray(factor, dtype=np.float64)
    if a.ndim != 2 or a.shape[1] == 0:
        raise InvalidArgumentError(f"factor of shape {a.shape}: directions are the columns of a matrix.")
    lengths = np.linalg.norm(a, axis=0)
    unit = a / np.where(lengths > 0, lengths, 1.0)
    count = a.shape[1] - 1
    scaled = np.zeros(count)
    if count and lengths[0] > 0:
        from scipy.optimize import nnls

        scaled, _ = nnls(unit[:, 1:], -unit[:, 0])
    direction = unit[:, 0] + unit[:, 1:] @ scaled
    length = float(np.linalg.norm(direction))
    if length <= VANISHING:
        direction, length = np.zeros_like(direction), 0.0
    inner = unit[:, 1:].T @ direction
    residual = float(max(np.maximum(-inner, 0).max(initial=0.0), np.abs(scaled * inner).max(initial=0.0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        multipliers = np.where(lengths[1:] > 0, scaled * lengths[0] / lengths[1:], 0.0)
    cosines = unit.T @ direction / length if length else np.zeros(count + 1)
    return ConeProjection(
        multipliers=multipliers, length=length * float(lengths[0]), cosines=cosines, residual=residual
    )
