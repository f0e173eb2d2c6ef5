"""A Krylov space grown one product at a time: the recurrence that eigenvalues and quadrature share."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from dyntune.errors import NonFiniteError
from dyntune.numerics.certificate import PolynomialTrack, RitzState
from dyntune.numerics.operator import Product
from dyntune.numerics.vectors import Basis

__all__ = ["FLOOR_EPS", "KrylovRun"]

# Rounding leaves eigenvalues of the projected problem uncertain by a few eps * ||A||; nothing is asked below that.
FLOOR_EPS = 8.0


class KrylovRun:
    """One Krylov space: the projected matrix, and the rows of the basis from `first` on.

    The projected matrix is tridiagonal until a thick restart turns its leading block into an arrow; inner products
    are float64 throughout. Every vector is orthogonalised against *all* rows before it, locked ones included.

    Args:
        basis: Where the vectors are kept; row `first` must hold the unit start vector.
        first: First row of this run; the rows before it are locked.
        scale: Estimate of ``||A||`` from earlier runs.
    """

    def __init__(self, basis: Basis, first: int, *, scale: float) -> None:
        self.basis = basis
        self.first = first
        self.size = 0
        self.projected = np.zeros((basis.rows, basis.rows))
        self.beta = 0.0
        self.track = PolynomialTrack()
        self.scale = scale  # estimate of ||A||, shared by all runs: the complement alone may be all rounding
        self.asymmetry = 0.0
        self._linked = 0  # rows of the last restart that the next vector is coupled to

    @property
    def full(self) -> bool:
        """Whether no row is left for another product."""
        return self.first + self.size + 1 >= self.basis.rows

    def step(self, product: Product, eps: float) -> None:
        """One product, orthogonalised against everything before it; one device synchronisation.

        Raises:
            NonFiniteError: The product is NaN or infinite.
        """
        row = self.first + self.size
        self.basis.load(row + 1, [t.detach() for t in product(self.basis.views(row))])
        coefficients = self.basis.orthogonalise(row + 1, row + 1)
        beta = self.basis.norm(row + 1)
        # beta = 0 makes the next row infinite; it is never used, since an invariant space ends the run.
        self.basis.scale(row + 1, beta.reciprocal())
        *column, self.beta = torch.cat([coefficients, beta[None]]).tolist()
        if not math.isfinite(self.beta) or not all(map(math.isfinite, column)):
            raise NonFiniteError(
                "a product of the operator is NaN or infinite, so its eigenvalues are undefined. Check the parameters "
                "and the loss (torch.isfinite), and loss functions whose second derivative is infinite (sqrt or norm "
                "at 0)."
            )
        j = self.size
        self.projected[j, j] = column[self.first + j]
        self.size += 1
        self.scale = max(self.scale, abs(column[self.first + j]) + self.beta)
        stray = np.abs(column[self.first : self.first + max(j - 1, 0)])
        if j > self._linked and stray.size and self.scale > 0:
            self.asymmetry = max(self.asymmetry, float(stray.max()) / self.scale)
        exhausted = self.first + self.size == self.basis.space.numel
        if exhausted or self.beta <= FLOOR_EPS * eps * self.scale:
            self.beta = 0.0
        if self.size < len(self.projected):
            self.projected[self.size, self.size - 1] = self.projected[self.size - 1, self.size] = self.beta
        self.track.log_betas += math.log(self.beta) if self.beta > 0 else -math.inf

    def ritz(self) -> RitzState:
        """Eigenpairs of the projected matrix."""
        matrix = self.projected[: self.size, : self.size]
        values, vectors = np.linalg.eigh(matrix)
        return RitzState(values, self.beta * np.abs(vectors[-1]), vectors)

    def restart(self, ritz: RitzState, keep: NDArray[np.int_]) -> None:
        """Keep the Ritz vectors with indices `keep` and the last basis vector; forget the rest."""
        count = len(keep)
        self.basis.rotate(self.first, self.size, torch.from_numpy(np.ascontiguousarray(ritz.vectors[:, keep])))
        self.basis.move(self.first + self.size, self.first + count)
        self.track.discarded += np.delete(ritz.values, keep).tolist()
        couplings = self.beta * ritz.vectors[-1, keep]
        self.projected[:] = 0.0
        self.projected[range(count), range(count)] = ritz.values[keep]
        self.projected[:count, count] = self.projected[count, :count] = couplings
        self.size = self._linked = count
