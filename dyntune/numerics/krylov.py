"""A Krylov space grown one product at a time: the recurrence that eigenvalues and quadrature share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dyntune.errors import NonFiniteError
from dyntune.numerics.certificate import PolynomialTrack, RitzState
from dyntune.numerics.operator import Product
from dyntune.numerics.vectors import Basis, VectorSpace

__all__ = ["FLOOR_EPS", "NON_FINITE_PRODUCT", "KrylovRun", "UnitScale"]

NON_FINITE_PRODUCT = (
    "a product of the operator is NaN or infinite, so its eigenvalues are undefined. Check the parameters and the loss "
    "(torch.isfinite), and loss functions whose second derivative is infinite (sqrt or norm at 0)."
)

# Rounding leaves eigenvalues of the projected problem uncertain by a few eps * ||A||; nothing is asked below that.
FLOOR_EPS = 8.0


# Products with entries beyond 2^+-30 are rescaled: in float32 the squares of 2^-63 are lost, and sums of them at 2^64.
SAFE_EXPONENT = 30
MOST_EXPONENT = 120  # a factor that float32 holds


class UnitScale:
    """A product times a power of two, chosen at the first product, so that squares neither overflow nor vanish.

    Args:
        product: Product of the operator.
        space: Where its vectors live; needed where they are spread over processes.

    The attribute ``factor`` is the power of two; 1 unless the operator is extremely large or small.
    """

    def __init__(self, product: Product, space: VectorSpace | None = None) -> None:
        self.factor = 1.0
        self._product = product
        self._space = space
        self._chosen = False

    def __call__(self, vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One product, scaled."""
        result = [t.detach() for t in self._product(vector)]
        if not self._chosen:
            self._choose(result)
        return result if self.factor == 1.0 else list(torch._foreach_mul(result, self.factor))

    def _choose(self, result: Sequence[torch.Tensor]) -> None:
        self._chosen = True
        largest = 0.0
        if filled := [t for t in result if t.numel()]:
            norms = torch._foreach_norm(filled, ord=math.inf)
            largest = float(torch.stack([x.to(norms[0].device, torch.float64) for x in norms]).max())
        if (
            self._space is not None and self._space.spread is not None
        ):  # a sum of maxima will do: only the order of magnitude counts
            entry = torch.tensor([largest], dtype=torch.float64, device=self._space.device)
            largest = float(self._space.agree(self._space.total(entry)))
        if largest > 0 and math.isfinite(largest):
            exponent = math.frexp(largest)[1]
            if abs(exponent) > SAFE_EXPONENT:
                self.factor = 2.0 ** -max(-MOST_EXPONENT, min(MOST_EXPONENT, exponent))


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
        self.leak = np.zeros((first, basis.rows))  # parts of A times each row that lie in the locked space
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
        self.basis.load(row + 1, list(product(self.basis.views(row))))
        coefficients = self.basis.orthogonalise(row + 1, row + 1)
        beta = self.basis.norm(row + 1)
        # beta = 0 makes the next row infinite; it is never used, since an invariant space ends the run.
        self.basis.scale(row + 1, beta.reciprocal())
        *column, self.beta = self.basis.space.agree(torch.cat([coefficients, beta[None]])).tolist()
        if not math.isfinite(self.beta) or not all(map(math.isfinite, column)):
            raise NonFiniteError(NON_FINITE_PRODUCT)
        j = self.size
        self.projected[j, j] = column[self.first + j]
        self.leak[:, j] = column[: self.first]
        self.size += 1
        self.scale = max(self.scale, abs(column[self.first + j]) + self.beta)
        stray = np.abs(column[self.first : self.first + max(j - 1, 0)])
        if j > self._linked and stray.size and self.scale > 0:
            self.asymmetry = max(self.asymmetry, float(stray.max()) / self.scale)
        exhausted = self.first + self.size == self.basis.space.numel
        # A product is right to eps times its own length. That it is short beside ||A|| ends nothing: in the complement
        # of the locked pairs, where A may be all rounding, an eigenvalue above it still stands out as steps go on.
        length = math.hypot(self.beta, *column)
        seen = 0.0 if exhausted else max(self.beta, eps * length)
        if exhausted or self.beta <= FLOOR_EPS * eps * length:
            self.beta = 0.0
        if self.size < len(self.projected):
            self.projected[self.size, self.size - 1] = self.projected[self.size - 1, self.size] = self.beta
        self.track.log_betas += math.log(seen) if seen > 0 else -math.inf

    def ritz(self) -> RitzState:
        """Eigenpairs of the projected matrix."""
        matrix = self.projected[: self.size, : self.size]
        values, vectors = np.linalg.eigh(matrix)
        return RitzState(values, self.beta * np.abs(vectors[-1]), vectors)

    def leaks(self, ritz: RitzState, which: NDArray[np.int_]) -> NDArray[np.float64]:
        """Norms of the parts of ``A y`` in the locked space, for the Ritz pairs `which`."""
        norms: NDArray[np.float64] = np.linalg.norm(self.leak[:, : self.size] @ ritz.vectors[:, which], axis=0)
        return norms

    def restart(self, ritz: RitzState, keep: NDArray[np.int_]) -> None:
        """Keep the Ritz vectors with indices `keep` and the last basis vector; forget the rest."""
        count = len(keep)
        self.basis.rotate(self.first, self.size, torch.from_numpy(np.ascontiguousarray(ritz.vectors[:, keep])))
        self.basis.move(self.first + self.size, self.first + count)
        self.track.discarded += np.delete(ritz.values, keep).tolist()
        couplings = self.beta * ritz.vectors[-1, keep]
        self.leak[:, :count] = self.leak[:, : self.size] @ ritz.vectors[:, keep]
        self.projected[:] = 0.0
        self.projected[range(count), range(count)] = ritz.values[keep]
        self.projected[:count, count] = self.projected[count, :count] = couplings
        self.size = self._linked = count
