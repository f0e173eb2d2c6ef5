"""Extreme eigenvalues with brackets: :func:`eigenvalues`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dyntune.errors import InvalidArgumentError, NonFiniteError
from dyntune.numerics.krylov import FLOOR_EPS, NON_FINITE_PRODUCT
from dyntune.numerics.lanczos import LanczosResult, lanczos
from dyntune.numerics.operator import LinearOperator, OperatorLike, as_operator
from dyntune.numerics.target import Target, Which
from dyntune.numerics.vectors import Vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FAILURE_PROBABILITY", "Eigenvalues", "eigenvalues"]

# Probability, over the random start, that a value reported as converged is off by more than its tolerance. One in
# ten thousand costs about four products more than one in a hundred on a network of 1e5 parameters.
FAILURE_PROBABILITY = 1e-4
# The basis may take this much memory unless the caller says otherwise, but never fewer vectors than a restart needs.
BASIS_BYTES = 1 << 30
# Networks need 8 to 30 products. A larger buffer is fresh memory from the system at every call, whose page faults were
# measured at 15% of the time of a solve on an MLP of 85,000 parameters (160 rows against 80 or fewer).
BASIS_MOST = 80


@dataclass(frozen=True, kw_only=True, eq=False)
class Eigenvalues:
    """Extreme eigenvalues of an operator.

    Iterating, indexing and ``float()`` work on the values: ``float(hessian_eigenvalues(model, batch))`` is lambda_max.

    Args:
        values: Shape (k,), float64 on the CPU; order as documented in :func:`eigenvalues`; fewer than k if the budget
            was too small to see k. Values at the upper end are lower bounds, values at the lower end upper bounds
            (Rayleigh-Ritz; exactly for k = 1, for more up to the residuals, which the brackets allow for).
        low: Shape (k,): lower ends of the brackets.
        high: Shape (k,): upper ends of the brackets; a bracket covers with probability ``1 - failure_probability``.
            With ``which="magnitude"`` it brackets the magnitude, with the sign of the value.
        residuals: Shape (k,): ``||A v - value v||``.
        vectors: k unit vectors: lists of tensors shaped like the parameters, or flat tensors for a flat operator.
        converged: Whether k values were found and every one is certified to within the tolerance. An operator that is
            not symmetric to within it certifies nothing.
        converged_each: Shape (k,): which ones are.
        num_products: Operator products spent.
        failure_probability: Bound on the probability that a converged value is off by more than the tolerance.
        which: What was asked for.
        rtol: The tolerance relative to each value.
        asymmetry: Largest relative violation of symmetry met (rounding level for a true Hessian).
        method: How the products were made.
    """

    values: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    residuals: torch.Tensor
    vectors: tuple[Vector | torch.Tensor, ...]
    converged: bool
    converged_each: torch.Tensor
    num_products: int
    failure_probability: float
    which: Which
    rtol: float
    asymmetry: float
    method: str

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> float:
        return float(self.values[index])

    def __float__(self) -> float:
        return float(self.values[0])

    def __str__(self) -> str:
        rows = [
            f"{v:.6g} ({lo:.6g} .. {hi:.6g}), residual {r:.1e}{'' if ok else ', NOT converged'}"
            for v, lo, hi, r, ok in zip(
                self.values.tolist(),
                self.low.tolist(),
                self.high.tolist(),
                self.residuals.tolist(),
                self.converged_each.tolist(),
                strict=True,
            )
        ]
        return "\n".join([f"{self.which}, {self.num_products} products ({self.method})", *rows])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the vectors."""
        return {
            "values": self.values.tolist(),
            "low": [x if np.isfinite(x) else None for x in self.low.tolist()],
            "high": [x if np.isfinite(x) else None for x in self.high.tolist()],
            "residuals": self.residuals.tolist(),
            "converged": self.converged,
            "converged_each": self.converged_each.tolist(),
            "num_products": self.num_products,
            "failure_probability": self.failure_probability,
            "which": self.which,
            "rtol": self.rtol,
            "asymmetry": self.asymmetry,
            "method": self.method,
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the values with their brackets (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_eigenvalues

        return plot_eigenvalues(self, ax=ax)


def eigenvalues(
    operator: OperatorLike,
    k: int = 1,
    *,
    which: Which = "largest",
    rtol: float = 1e-2,
    max_products: int | None = None,
    start: torch.Tensor | Sequence[torch.Tensor] | Eigenvalues | None = None,
    basis: int | None = None,
    failure_probability: float = FAILURE_PROBABILITY,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Eigenvalues:
    r"""Extreme eigenvalues of a symmetric operator, with brackets and a documented failure probability.

    Lanczos with full reorthogonalisation and thick restart. It stops when an eigenvalue beyond the tolerance is ruled
    out: if one existed, the random start vector would have had to be nearly orthogonal to its eigenvector, which has
    probability at most `failure_probability`. A small residual alone never counts as proof.

    Args:
        operator: An operator such as ``dyntune.hessian(model, batch)``, a dense symmetric tensor (n, n), or
            ``(matvec, n)``: a callable on flat tensors with its dimension (float32 on the CPU unless `start` says
            otherwise).
        k: How many eigenvalues, 1 <= k <= n; with ``which="both"`` k at each end. Multiple eigenvalues count as often
            as they occur.
        which: ``"largest"`` (algebraically; descending), ``"smallest"`` (ascending), ``"magnitude"`` (descending
            magnitude), ``"both"`` (k largest descending, then k smallest ascending).
        rtol: Accuracy of each value relative to itself, > 0; never finer than 8 eps ||A||.
        max_products: Budget of products; default ``250 + 50 k``. When it runs out, the values are still bounds from
            one side, the brackets say how far they may be off, and ``converged`` is False.
        start: A direction (or an earlier result) to begin with, for instance the eigenvector of a few training steps
            ago. An equal share of a random direction is mixed in, so that a wrong start cannot hide an eigenvalue.
        basis: Most Lanczos vectors held at once; default as many as fit 1 GiB, between ``2 k + 10`` and 80.
            Memory: at most ``basis + 3`` vectors and those returned.
        failure_probability: In (0, 1): bound on the probability that ``converged`` is wrong.
        seed: Seed of the random directions; the global generators are not touched.
        progress: Called with (products so far, leading value): after each product, later on after every few.

    Returns:
        Values, brackets, residuals, vectors, and what is certified.

    Raises:
        InvalidArgumentError: k, rtol, basis or failure_probability out of range; an asymmetric matrix.
        NonFiniteError: A product is NaN or infinite.
        ShapeMismatchError: `start` has other shapes than the operator's vectors.

    Accuracy:
        Converged values are within `rtol` of the truth with probability ``1 - failure_probability`` in exact
        arithmetic; measured in float32 on 1,000 hard random spectra: see the results page.
    Cost:
        Typically 8 to 25 products for k = 1 at the default tolerance on neural networks; one device synchronisation
        and four passes over the basis per product.
    Assumes:
        A symmetric operator. The result's ``asymmetry`` shows the largest violation met.
    Source:
        van Dorsselaer, Hochstenbach and van der Vorst (2000) for the certificate, Wu and Simon (2000) for the
        restart; see ``dyntune.numerics.certificate``.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([3.0, 1.0, 0.5, -7.0]))
        >>> result = eigenvalues(A, which="both")
        >>> [round(v, 4) for v in result.values.tolist()], result.converged
        ([3.0, -7.0], True)
    """
    vectors = _start_vectors(start)
    op = as_operator(operator, start=vectors if isinstance(vectors, torch.Tensor) else None)
    target = Target(which, k)
    _validate(op, k, rtol=rtol, failure_probability=failure_probability, max_products=max_products, basis=basis)
    budget = 250 + 50 * k if max_products is None else max_products
    if target.count >= op.numel and budget >= op.numel and not op.space.cut:
        result = _materialised(op, target, rtol)
    else:
        result = lanczos(
            op,
            target=target,
            rtol=rtol,
            failure_probability=failure_probability,
            max_products=budget,
            basis_size=basis or default_basis(op, target.count),
            start=_as_vector(op, vectors),
            seed=seed,
            progress=progress,
        )
    return _record(op, result, target, rtol=rtol, failure_probability=failure_probability)


def default_basis(operator: LinearOperator, count: int) -> int:
    """Rows of the basis that fit `BASIS_BYTES`, within the bounds that restarts and small problems set."""
    least = 2 * count + 10
    return max(least, min(BASIS_MOST, BASIS_BYTES // operator.space.nbytes))


def _validate(
    op: LinearOperator,
    k: int,
    *,
    rtol: float,
    failure_probability: float,
    max_products: int | None,
    basis: int | None,
) -> None:
    if k > op.numel:
        raise InvalidArgumentError(
            f"k={k} eigenvalues were asked of an operator of dimension {op.numel}; choose k <= {op.numel}."
        )
    if not 0 < rtol < 1:
        raise InvalidArgumentError(f"rtol={rtol}: choose 0 < rtol < 1, for instance 1e-2 for one percent.")
    if not 0 < failure_probability < 1:
        raise InvalidArgumentError(f"failure_probability={failure_probability}: choose a probability in (0, 1).")
    if max_products is not None and max_products < 1:
        raise InvalidArgumentError(f"max_products={max_products}: at least one product is needed to see anything.")
    if basis is not None and basis < 2 * k + 4:
        raise InvalidArgumentError(
            f"basis={basis} vectors cannot hold k={k} pairs and a search space; give at least 2 k + 4 = {2 * k + 4}."
        )


def _start_vectors(
    start: torch.Tensor | Sequence[torch.Tensor] | Eigenvalues | None,
) -> torch.Tensor | Sequence[torch.Tensor] | None:
    """An earlier result stands for the sum of its vectors: one direction that has a part in each."""
    if not isinstance(start, Eigenvalues):
        return start
    if isinstance(start.vectors[0], torch.Tensor):
        return torch.stack([v for v in start.vectors if isinstance(v, torch.Tensor)]).sum(0)
    return [torch.stack(parts).sum(0) for parts in zip(*start.vectors, strict=True)]


def _as_vector(op: LinearOperator, start: torch.Tensor | Sequence[torch.Tensor] | None) -> Vector | None:
    if start is None:
        return None
    vector = op.space.unflatten(start) if isinstance(start, torch.Tensor) else op.space.check(start, name="start")
    if not all(bool(torch.isfinite(t).all()) for t in vector):
        raise InvalidArgumentError("start holds NaN or infinity; pass a finite direction or leave it out.")
    return vector


def _materialised(op: LinearOperator, target: Target, rtol: float) -> LanczosResult:
    """All eigenpairs are wanted: n products give the matrix, and a dense solver the rest."""
    matrix = op.to_dense().to(device="cpu", dtype=torch.float64)
    scale = float(matrix.abs().max())
    if not np.isfinite(scale):
        raise NonFiniteError(NON_FINITE_PRODUCT)
    asymmetry = float((matrix - matrix.T).abs().max()) / scale if scale else 0.0
    values, vectors = np.linalg.eigh(((matrix + matrix.T) / 2).numpy())
    chosen = target.choose(values) if target.count <= op.numel else np.arange(op.numel)[::-1]
    if target.which == "both":
        ascending = np.arange(op.numel)
        chosen = np.concatenate([ascending[::-1][: target.k], ascending[: target.k]])
    noise = FLOOR_EPS * torch.finfo(op.dtype).eps * float(np.abs(values).max())
    residual = np.linalg.norm(matrix.numpy() @ vectors - vectors * values, axis=0)
    picked = [torch.from_numpy(vectors[:, i].copy()) for i in chosen]
    return LanczosResult(
        values=values[chosen],
        low=values[chosen] - noise,
        high=values[chosen] + noise,
        residuals=residual[chosen],
        converged_each=asymmetry * scale <= np.maximum(rtol * np.abs(values[chosen]), noise),
        vectors=[op.space.unflatten(v.to(op.dtype)) for v in picked],
        num_products=op.numel,
        asymmetry=asymmetry,
    )


def _record(
    op: LinearOperator, result: LanczosResult, target: Target, *, rtol: float, failure_probability: float
) -> Eigenvalues:
    vectors = tuple(op.flatten(v) if op.flat else op.space.present(v) for v in result.vectors)
    return Eigenvalues(
        values=torch.from_numpy(np.ascontiguousarray(result.values)),
        low=torch.from_numpy(np.ascontiguousarray(result.low)),
        high=torch.from_numpy(np.ascontiguousarray(result.high)),
        residuals=torch.from_numpy(np.ascontiguousarray(result.residuals)),
        vectors=vectors,
        converged=len(result.values) == target.count and bool(result.converged_each.all()),
        converged_each=torch.from_numpy(np.ascontiguousarray(result.converged_each)),
        num_products=result.num_products,
        failure_probability=failure_probability,
        which=target.which,
        rtol=rtol,
        asymmetry=result.asymmetry,
        method=getattr(op, "method", "exact products"),
    )
