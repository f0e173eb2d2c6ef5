"""The largest Hessian eigenvalue, as each library computes it, behind one interface.

A `Solver` gets a fresh model and a seed; it answers with a value and the number of products it took. `tune`
is what only someone who knows the answer could do: it runs outside the clock, and `solve` gets its settings.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from peer_suite.plain import Reference, steps_to_tolerance
from peer_suite.problems import Problem

RTOL = 1e-2
"""What "within 1 %" means throughout."""

TUNING_RTOL = 0.999 * RTOL
"""A hair inside `RTOL`, so that rounding cannot turn hindsight into a miss."""

MAX_POWER_ITERATIONS = 200
"""Twice PyHessian's own limit; hindsight gives up there."""

Settings = dict[str, int | float | str]


@dataclass(frozen=True)
class Trial:
    """One run of one solver: its own copy of the model, and the seed of its start vector."""

    problem: Problem
    model: nn.Module
    seed: int
    settings: Settings = field(default_factory=dict)

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.problem.inputs, self.problem.targets

    def start_vector(self) -> Tensor:
        """The normal start vector that hessian-eigenthings draws from the seed; eigsh gets the same one."""
        return torch.randn(self.problem.num_parameters, generator=torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True)
class Answer:
    """`claimed` is what the library says about convergence, None where it says nothing."""

    value: float
    num_products: int
    claimed: bool | None
    setup_products: int = 0


@dataclass(frozen=True)
class Solver:
    """`library` is the import name; `tuned` marks the solvers that were given the answer's hindsight."""

    name: str
    library: str
    solve: Callable[[Trial], Answer]
    tune: Callable[[Trial, Reference], Settings] | None = None

    @property
    def tuned(self) -> bool:
        return self.tune is not None


# ------------------------------------------------------------------------------------------------ PyHessian


class _CloseEnoughError(Exception):
    """Ends a power iteration while hindsight is being gathered."""


@contextmanager
def _observed_pyhessian(observe: Callable[[Any, Any], None]) -> Iterator[None]:
    """Calls `observe(v, Hv)` after every product of PyHessian.

    The package replaces its submodule `hessian` by the class of that name, hence `sys.modules`.
    """
    import pyhessian

    module = sys.modules[pyhessian.hessian.__module__]
    product = module.hessian_vector_product

    def wrapped(grads: Any, params: Any, v: Any) -> Any:
        result = product(grads, params, v)
        observe(v, result)
        return result

    module.hessian_vector_product = wrapped  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.hessian_vector_product = product  # type: ignore[attr-defined]


def build_pyhessian(trial: Trial) -> Any:
    from pyhessian import hessian

    torch.manual_seed(trial.seed)  # it draws from the global generator
    with warnings.catch_warnings():  # create_graph=True makes reference cycles: the model is thrown away
        warnings.simplefilter("ignore", UserWarning)
        return hessian(trial.model, trial.problem.criterion, data=trial.batch, cuda=False)


def solve_pyhessian(trial: Trial) -> Answer:
    count = 0

    def observe(_v: Any, _hv: Any) -> None:
        nonlocal count
        count += 1

    with _observed_pyhessian(observe):
        values, _ = build_pyhessian(trial).eigenvalues(**trial.settings)
    return Answer(float(values[0]), count, claimed=None)


def tune_pyhessian(trial: Trial, truth: Reference) -> Settings:
    """The first iteration whose Rayleigh quotient is within 1 %, and no stop of its own before that."""
    count = 0

    def observe(v: list[Tensor], hv: tuple[Tensor, ...]) -> None:
        nonlocal count
        count += 1
        quotient = sum(float((a * b).sum()) for a, b in zip(v, hv, strict=True))
        if abs(truth.relative_error(quotient)) <= TUNING_RTOL:
            raise _CloseEnoughError

    with _observed_pyhessian(observe), suppress(_CloseEnoughError):
        build_pyhessian(trial).eigenvalues(maxIter=MAX_POWER_ITERATIONS, tol=0.0)
    return {"maxIter": count, "tol": 0.0}


# -------------------------------------------------------------------------------------- hessian-eigenthings


def solve_eigenthings(trial: Trial, **arguments: Any) -> Answer:
    """One eigenvalue asked for unless `arguments` say otherwise; its operator takes a list of batches."""
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    operator = HessianOperator(trial.model, [trial.batch], supervised_loss(trial.problem.criterion))
    result = lanczos(operator, seed=trial.seed, **arguments, **trial.settings)
    best = int(result.eigenvalues.argmax())
    return Answer(float(result.eigenvalues[best]), result.iterations, bool(result.converged[best]))


def tune_eigenthings(trial: Trial, truth: Reference) -> Settings:
    steps = steps_to_tolerance(trial.problem, trial.start_vector(), truth, TUNING_RTOL)
    return {"max_iter": steps, "which": "LA"}


# ------------------------------------------------------------------------------- curvlinops and SciPy's eigsh


def solve_eigsh(trial: Trial, **arguments: Any) -> Answer:
    """ARPACK through curvlinops, eigenvector included as with every other solver.

    Products of the constructor, which checks for determinism, are counted apart from those of ARPACK.
    """
    from curvlinops import HessianLinearOperator

    class CountingHessian(HessianLinearOperator):  # type: ignore[misc]
        count = 0

        def _matmat(self, M: list[Tensor]) -> list[Tensor]:
            self.count += M[0].shape[-1]
            return super()._matmat(M)  # type: ignore[no-any-return]

    params = list(trial.model.parameters())
    operator = CountingHessian(trial.model, trial.problem.criterion, params, [trial.batch])
    in_setup = operator.count
    values, _ = eigsh(
        operator.to_scipy(),
        k=1,
        which="LA",
        v0=trial.start_vector().numpy().astype(np.float64),
        **arguments,
        **trial.settings,
    )
    claimed = None if trial.settings else True  # ARPACK raises unless converged; tol=1 claims nothing
    return Answer(float(values[0]), operator.count - in_setup, claimed, setup_products=in_setup)


def tune_eigsh(trial: Trial, truth: Reference) -> Settings:
    """The smallest `ncv` within 1 %; with tol=1, ARPACK takes what its first sweep of `ncv` steps gives."""
    steps = steps_to_tolerance(trial.problem, trial.start_vector(), truth, TUNING_RTOL)
    for ncv in range(max(2, steps - 1), steps + 5):  # ARPACK needs ncv > k
        settings: Settings = {"ncv": ncv, "tol": 1.0}
        answer = solve_eigsh(Trial(trial.problem, trial.problem.fresh_model(), trial.seed, settings))
        if abs(truth.relative_error(answer.value)) <= TUNING_RTOL:
            return settings
    raise RuntimeError(f"{trial.problem.name}: no adequate ncv up to {steps + 4}")


# -------------------------------------------------------------------------------------------------- dyntune


def solve_dyntune(trial: Trial) -> Answer:
    """Default arguments, the seed apart."""
    import dyntune

    found = dyntune.hessian_eigenvalues(
        trial.model, trial.batch, criterion=trial.problem.criterion, k=1, seed=trial.seed
    )
    return Answer(float(found.values[0]), int(found.num_products), bool(found.converged))


DYNTUNE = "dyntune, defaults"
PYHESSIAN_OWN_STOP = "PyHessian, defaults"
EIGSH_DEFAULT = "curvlinops + eigsh(tol=1e-2)"

SOLVERS = (
    Solver(DYNTUNE, "dyntune", solve_dyntune),
    Solver(PYHESSIAN_OWN_STOP, "pyhessian", solve_pyhessian),
    Solver("PyHessian, tuned maxIter", "pyhessian", solve_pyhessian, tune_pyhessian),
    Solver("eigenthings lanczos(k=1)", "hessian_eigenthings", lambda trial: solve_eigenthings(trial, k=1)),
    Solver("eigenthings lanczos(), k=10", "hessian_eigenthings", solve_eigenthings),
    Solver(
        "eigenthings, tuned max_iter",
        "hessian_eigenthings",
        lambda trial: solve_eigenthings(trial, k=1),
        tune_eigenthings,
    ),
    Solver(EIGSH_DEFAULT, "curvlinops", lambda trial: solve_eigsh(trial, tol=RTOL)),
    Solver("curvlinops + eigsh, tuned ncv", "curvlinops", solve_eigsh, tune_eigsh),
)
