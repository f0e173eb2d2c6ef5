"""Plain torch and SciPy: the physical limit of a product, the float64 truth, the hindsight for tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from peer_suite.problems import Problem

REFERENCE_TOL = 1e-9
"""ARPACK tolerance of the truth: seven digits below the 1 % that is judged."""

MAX_HINDSIGHT_STEPS = 60
"""Far above the 6 to 20 steps that the problems need; reaching it is an error in the set-up."""


@dataclass(frozen=True)
class Reference:
    """Extreme eigenvalues in float64. `residual` is |Hv - lambda v| of the largest, |v| = 1."""

    lambda_max: float
    lambda_2: float
    lambda_min: float
    residual: float
    num_products: int
    dtype: str = "float64"

    def relative_error(self, value: float) -> float:
        return (value - self.lambda_max) / abs(self.lambda_max)

    def to_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def split_like(flat: Tensor, shapes: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [t.numel() for t in shapes])
    return [part.view_as(t) for part, t in zip(parts, shapes, strict=True)]


def gradient(problem: Problem, model: nn.Module, *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Forward and backward pass: the unit in which products are priced."""
    loss = problem.criterion(model(problem.inputs), problem.targets)
    return torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)


def retained_product(problem: Problem, model: nn.Module) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
    """Double backward over a graph built once: nothing exact is cheaper for one batch in eager mode."""
    params = list(model.parameters())
    grads = gradient(problem, model, create_graph=True)
    return lambda v: torch.autograd.grad(grads, params, v, retain_graph=True)


def rebuilt_product(problem: Problem, model: nn.Module) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
    """Double backward with a new forward pass for every product."""
    params = list(model.parameters())
    return lambda v: torch.autograd.grad(gradient(problem, model, create_graph=True), params, v)


def _float64_operator(problem: Problem) -> LinearOperator:
    model = problem.fresh_model().double()
    inputs = problem.inputs.double() if problem.inputs.is_floating_point() else problem.inputs
    double = Problem(problem.name, problem.description, model, inputs, problem.targets, problem.criterion)
    params, product = list(model.parameters()), retained_product(double, model)

    def matvec(x: np.ndarray) -> np.ndarray:
        flat = torch.from_numpy(np.ascontiguousarray(x).reshape(-1).copy())
        return flatten(product(split_like(flat, params))).numpy()

    return LinearOperator((problem.num_parameters,) * 2, matvec=matvec, dtype=np.float64)


def reference(problem: Problem) -> Reference:
    """The truth: ARPACK in float64 to `REFERENCE_TOL`, its residual measured with a product of its own."""
    operator = _float64_operator(problem)
    count = 0

    def counted(x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return operator.matvec(x)

    counting = LinearOperator(operator.shape, matvec=counted, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(problem.num_parameters)
    top, vectors = eigsh(counting, k=2, which="LA", tol=REFERENCE_TOL, v0=start)
    bottom = eigsh(counting, k=1, which="SA", tol=1e-3, v0=start, return_eigenvectors=False)
    best = int(np.argmax(top))
    vector = vectors[:, best]
    residual = float(np.linalg.norm(operator.matvec(vector) - top[best] * vector))
    return Reference(float(top[best]), float(top[1 - best]), float(bottom[0]), residual, count)


def steps_to_tolerance(problem: Problem, start: Tensor, truth: Reference, rtol: float) -> int:
    """Hindsight: the number of Lanczos steps from `start` after which the top Ritz value is within `rtol`.

    Only someone who knows the answer can choose it. Full reorthogonalisation in float64, so that no peer is
    tuned on a worse basis than it builds itself.
    """
    model = problem.fresh_model()
    params, product = list(model.parameters()), retained_product(problem, model)
    basis = [start.double() / start.double().norm()]
    alphas: list[float] = []
    betas: list[float] = []
    for step in range(1, MAX_HINDSIGHT_STEPS + 1):
        w = flatten(product(split_like(basis[-1].float(), params))).double()
        alphas.append(float(basis[-1] @ w))
        ritz = eigh_tridiagonal(np.array(alphas), np.array(betas), eigvals_only=True)
        if abs(truth.relative_error(float(ritz[-1]))) <= rtol:
            return step
        stacked = torch.stack(basis)
        for _ in range(2):  # twice is enough: Giraud, Langou, Rozloznik (2005)
            w = w - stacked.T @ (stacked @ w)
        betas.append(float(w.norm()))
        basis.append(w / betas[-1])
    raise RuntimeError(f"{problem.name}: not within {rtol:g} after {MAX_HINDSIGHT_STEPS} Lanczos steps")
