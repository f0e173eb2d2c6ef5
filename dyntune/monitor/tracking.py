"""The largest eigenvalue of an operator that changes a little from one time to the next: :class:`EigenvalueTracker`.

A search that is to prove its answer pays for the proof, not for the answer: warm-started or not, ``eigenvalues`` takes
some 20 products. A tracker proves now and then, and in between follows: Rayleigh-Ritz in the span of the last two Ritz
vectors, enlarged by residuals (the block of a Davidson method without a preconditioner). The value is a lower bound of
the largest eigenvalue; how far it may be below *the eigenvalue that it follows* is known from the residual. That no
other one has overtaken it is not: so the second Ritz vector is kept along, a tenth of a fresh random direction is mixed
into every enlargement (what is larger grows in the second vector from one time to the next), and the proof is repeated.

Source: Davidson (1975), J. Comput. Phys. 17; the residual bounds are Kato's and Temple's (Parlett, "The Symmetric
Eigenvalue Problem", section 11.7 and theorem 10.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dyntune.curvature.eigenvalues import Eigenvalues, eigenvalues
from dyntune.errors import NonFiniteError
from dyntune.numerics.operator import LinearOperator, Product
from dyntune.numerics.vectors import Vector
from dyntune.records import Estimate, Status

__all__ = ["EigenvalueTracker", "Tracked"]

KEPT = 2
# Products of an undisturbed measurement: two for the kept vectors and two to turn them after the operator.
USUAL = 4
MOST = 12  # half of what a proof takes; beyond it the proof is the better buy
# A proof that confirms what was followed doubles the time to the next one, up to this many measurements; one that does
# not makes it one. Nine of four products and one of 20 to 25 are 6 on average.
LONGEST = 10
# A value that has changed by more than this since the measurement before is proven at once: early in training, and
# where another eigenvalue takes over.
CHANGE = 0.1
RANDOM_SHARE = 0.1
# A followed value may be off by twice the tolerance: what two proven values may differ by.
FOLLOWED = 2.0
_STREAM = 0x7AC3


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """One measurement.

    Args:
        estimate: The value; its interval covers the solver's error about the eigenvalue that was followed.
        vector: Unit vector.
        residual: ``||A v - value v||`` over the value.
        proven: Whether it was proven to be the largest.
        num_products: Spent.
    """

    estimate: Estimate
    vector: Vector
    residual: float
    proven: bool
    num_products: int


class EigenvalueTracker:
    """Follows the largest eigenvalue.

    Args:
        rtol: Error that is aimed at, relative to the value.
        unit: Of the value.
        seed: Of the random directions; the global generators are not touched.

    Example:
        >>> import dyntune
        >>> model = torch.nn.Linear(20, 1, bias=False)
        >>> batch = (torch.diag(torch.linspace(3.0, 0.0, 20)), torch.zeros(20, 1))
        >>> tracker = EigenvalueTracker()
        >>> operator = dyntune.hessian(model, batch, criterion=torch.nn.MSELoss(reduction="sum"))
        >>> found = [tracker.measure(operator) for _ in range(4)]
        >>> round(float(found[2].estimate), 1), found[2].num_products, [f.proven for f in found]
        (18.0, 4, [True, True, False, True])
    """

    def __init__(self, *, rtol: float = 1e-2, unit: str = "loss / parameter^2", seed: int = 0) -> None:
        self.rtol = rtol
        self.unit = unit
        self.seed = seed
        self._kept: list[Vector] = []
        self._count = 0
        self._since_proof = 0
        self._interval = 1
        self._last: float | None = None

    def measure(self, operator: LinearOperator, *, prove: bool | None = None) -> Tracked:
        """The largest eigenvalue now.

        Args:
            operator: Of the same shapes as before.
            prove: Whether to prove it. Default: the first time, where the value has changed by more than a tenth or
                the residual does not settle it, and after a time that grows while proofs confirm what was followed.

        Returns:
            With status OK where it is proven, UNCERTAIN where it was followed and the residual settles it to 2 `rtol`
            (a residual is no proof that no other eigenvalue has become larger), else NOT_CONVERGED.

        Raises:
            NonFiniteError: A product is NaN or infinite; what was followed is forgotten.
        """
        self._count += 1
        try:
            if prove or self._last is None or operator.numel <= MOST:  # where following would span everything
                found = self._proven(operator)
            else:
                found = self._followed(operator)
                if prove is None and self._doubt(found):
                    found = self._confirmed(operator, found)
        except NonFiniteError:
            self._kept, self._last = [], None
            raise
        self._last = found.estimate.value
        return found

    def _doubt(self, found: Tracked) -> bool:
        """Whether to prove what was followed."""
        value, last = float(found.estimate), float(self._last or 0.0)
        changed = abs(value - last) > CHANGE * abs(last)
        return changed or found.estimate.status is Status.NOT_CONVERGED or self._since_proof >= self._interval

    def _confirmed(self, operator: LinearOperator, followed: Tracked) -> Tracked:
        """The proof, and what it says of following."""
        proven = self._proven(operator)
        value, other = float(proven.estimate), float(followed.estimate)
        agree = abs(value - other) <= 2 * self.rtol * abs(value)  # each is off by its tolerance
        self._interval = min(2 * self._interval, LONGEST) if agree else 1
        count = proven.num_products + followed.num_products
        return replace(proven, estimate=replace(proven.estimate, num_products=count), num_products=count)

    def _proven(self, operator: LinearOperator) -> Tracked:
        start: Sequence[torch.Tensor] | None = self._kept[0] if self._kept else None
        count = min(KEPT, operator.numel)
        pairs = eigenvalues(operator, count, rtol=self.rtol, start=start, seed=self.seed + self._count)
        vector = list(pairs.vectors[0])
        self._kept = [list(v) for v in pairs.vectors]
        self._since_proof = 0
        return _of(pairs, vector, self.unit)

    def _followed(self, operator: LinearOperator) -> Tracked:
        with operator.session() as product:
            basis = _Basis(operator, product)
            for index in range(KEPT):
                kept = self._kept[index] if index < len(self._kept) else operator.space.normal(_STREAM, self._seed(-1))
                basis.add(kept)
            values, residual, direction = basis.ritz()
            while basis.count < min(USUAL, operator.numel) or (
                _error(values, residual) > FOLLOWED * self.rtol * abs(values[0])
                and basis.count < min(MOST, operator.numel)
            ):
                fresh = operator.space.normal(_STREAM, self._seed(basis.count))
                share = RANDOM_SHARE * (residual or 1.0) / operator.space.norm(fresh)
                basis.add(list(torch._foreach_add(direction, fresh, alpha=share)))
                values, residual, direction = basis.ritz()
            self._kept = basis.vectors(KEPT)
            count = basis.count
        self._since_proof += 1
        error = _error(values, residual)
        settled = error <= FOLLOWED * self.rtol * abs(values[0])
        estimate = Estimate(
            value=values[0],
            low=values[0] - self.rtol * abs(values[0]),
            high=values[0] + max(error, self.rtol * abs(values[0])),
            level=None,
            unit=self.unit,
            method="Rayleigh-Ritz from the vectors of before",
            covers="numerical",
            status=Status.UNCERTAIN if settled else Status.NOT_CONVERGED,
            reason=f"followed for {self._since_proof} measurements since it was proven to be the largest"
            if settled
            else f"{count} products leave an error of {error / abs(values[0] or 1.0):.1%} possible",
            num_products=count,
        )
        size = abs(values[0]) or 1.0
        return Tracked(
            estimate=estimate, vector=self._kept[0], residual=residual / size, proven=False, num_products=count
        )

    def _seed(self, index: int) -> int:
        return (self.seed * 1_000_003 + self._count) * 64 + index + 1


class _Basis:
    """An orthonormal basis with its products."""

    def __init__(self, operator: LinearOperator, product: Product) -> None:
        self._operator, self._product = operator, product
        self._q: list[Vector] = []
        self._aq: list[Vector] = []
        self._t = np.zeros((0, 0))
        self._y = np.zeros((0, 0))

    @property
    def count(self) -> int:
        return len(self._q)

    def add(self, vector: Sequence[torch.Tensor]) -> None:
        space = self._operator.space
        v = [t.clone() for t in vector]
        for _ in range(2):  # once is not enough in floating point, twice is (Parlett, section 6.9)
            for q in self._q:
                torch._foreach_add_(v, q, alpha=-space.dot(q, v))
        size = space.norm(v)
        if not (math.isfinite(size) and size > 0):
            raise NonFiniteError("a product is NaN or infinite: has the run diverged?")
        torch._foreach_div_(v, size)
        image = [t.detach().clone() for t in self._product(v)]
        self._q.append(v)
        self._aq.append(image)
        grown = np.zeros((self.count, self.count))
        grown[:-1, :-1] = self._t
        column = np.array([space.dot(q, image) for q in self._q])
        grown[-1, :], grown[:, -1] = column, column
        if not np.isfinite(column).all():
            raise NonFiniteError("a product is NaN or infinite: has the run diverged?")
        self._t = grown

    def ritz(self) -> tuple[list[float], float, Vector]:
        """Ritz values, descending, with the norm of the first's residual and the residual itself."""
        values, vectors = np.linalg.eigh(self._t)
        order = np.argsort(values)[::-1]
        self._y = vectors[:, order]
        found = [float(values[i]) for i in order]
        residual = _combined(self._aq, self._y[:, 0])
        torch._foreach_add_(residual, _combined(self._q, self._y[:, 0]), alpha=-found[0])
        return found, self._operator.space.norm(residual), residual

    def vectors(self, count: int) -> list[Vector]:
        return [_combined(self._q, self._y[:, i]) for i in range(min(count, self.count))]


def _combined(vectors: Sequence[Vector], weights: np.ndarray) -> Vector:
    total = [t * float(weights[0]) for t in vectors[0]]
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        torch._foreach_add_(total, vector, alpha=float(weight))
    return total


def _error(values: Sequence[float], residual: float) -> float:
    """How far the eigenvalue that the first Ritz value belongs to may be above it."""
    gap = values[0] - values[1] if len(values) > 1 else 0.0
    return min(residual, residual * residual / gap) if gap > 0 else residual


def _of(pairs: Eigenvalues, vector: Vector, unit: str) -> Tracked:
    value, low, high = float(pairs.values[0]), float(pairs.low[0]), float(pairs.high[0])
    estimate = Estimate(
        value=value,
        low=min(low, value),
        high=max(high, value),
        level=1 - pairs.failure_probability if pairs.converged else None,
        unit=unit,
        method=f"Lanczos, {pairs.method}",
        covers="numerical",
        status=Status.OK if pairs.converged else Status.NOT_CONVERGED,
        reason="" if pairs.converged else "the budget of products ran out",
        num_products=pairs.num_products,
    )
    residual = float(pairs.residuals[0]) / (abs(value) or 1.0)
    return Tracked(
        estimate=estimate, vector=vector, residual=residual, proven=pairs.converged, num_products=pairs.num_products
    )
