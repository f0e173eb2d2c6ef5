"""Sharpness of a loss at the present parameters: :func:`sharpness`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from dyntune.curvature.eigenvalues import Eigenvalues, eigenvalues
from dyntune.curvature.hessian import HessianOperator, Method, hessian
from dyntune.curvature.preconditioned import PreconditionedOperator
from dyntune.curvature.sampling import End, population_estimates
from dyntune.curvature.stochastic import batch_sharpness, critical_learning_rate, directional_sharpness
from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.numerics.target import Which
from dyntune.numerics.vectors import Vector
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.parameters import ParameterSelection, named_parameters
from dyntune.objective.shards import ProcessGroupLike
from dyntune.records import Estimate, Status
from dyntune.stability.scales import check_optimizer, diagonal_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Quantity", "Sharpness", "eigenvalue_estimate", "sharpness"]

Quantity: TypeAlias = Literal["lambda_max", "lambda_min", "preconditioned", "batch", "directional", "critical_lr"]
UNIT = "loss / parameter^2"
ENDS: dict[str, End] = {"lambda_max": "largest", "lambda_min": "smallest"}


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """Curvature numbers at one point; those that were not asked for are None.

    Args:
        lambda_max: Largest eigenvalue of the Hessian; its interval reaches up to what the solver could not exclude.
        lambda_min: Smallest eigenvalue of the Hessian.
        preconditioned: Largest eigenvalue of ``P^-1/2 H P^-1/2`` with the optimizer's P; times the learning rate it is
            what ``dyntune.stability.threshold`` bounds.
        batch: Batch sharpness, mean of ``d.H_B d / d.g_B`` along each batch's own step; belongs to these batches' size.
        directional: Curvature ``d.Hd / d.g`` of the whole loss along its own step.
        critical_lr: Rate at which one step starts to raise the loss, by forward passes only; an optimistic bound.
        record: What was assumed: loss, counts, batches, mode, how products were made.
        num_products: Hessian-vector products spent.
    """

    lambda_max: Estimate | None = None
    lambda_min: Estimate | None = None
    preconditioned: Estimate | None = None
    batch: Estimate | None = None
    directional: Estimate | None = None
    critical_lr: Estimate | None = None
    record: dict[str, Any]
    num_products: int

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Those that were asked for, by name."""
        found = {name: getattr(self, name) for name in get_args(Quantity)}
        return {name: item for name, item in found.items() if item is not None}

    def __str__(self) -> str:
        lines = [f"{name} = {item}" for name, item in self.estimates.items()]
        r = self.record
        return "\n".join([*lines, f"on {r['num_rows']} rows, {r['loss']}, {r['mode']} mode"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **{name: None if (e := getattr(self, name)) is None else e.to_dict() for name in get_args(Quantity)},
            "record": self.record,
            "num_products": self.num_products,
        }

    def plot(self, ax: Axes | None = None, *, optimizer: torch.optim.Optimizer | None = None) -> Axes:
        """Draw them, beside the limits of `optimizer` where given (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_sharpness

        return plot_sharpness(self, optimizer=optimizer, ax=ax)


def sharpness(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    criterion: Criterion | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    quantities: Sequence[Quantity] = ("lambda_max",),
    params: ParameterSelection = None,
    num_batches: int | Literal["all"] = 16,
    method: Method = "auto",
    process_group: ProcessGroupLike = "auto",
    rtol: float = 1e-2,
    max_products: int | None = None,
    covers: Literal["numerical", "both"] = "numerical",
    seed: int = 0,
    strict: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> Sharpness:
    """Curvature numbers at the present parameters, each as an :class:`Estimate` that says what its interval covers.

    Eigenvalues are those of the given batches, with the solver's error (``covers="numerical"``). As an estimate of the
    population that the batches were drawn from, the largest is biased upward and the smallest downward; ask for
    ``covers="both"`` where that matters. The others carry the choice of the batches (``covers="sampling"``) and need
    several to have an interval.

    Args:
        model: As for :func:`dyntune.hessian`, like the next three and `params`, `num_batches` and `method`.
        batches: See there. For ``"batch"`` they must have the size that training uses.
        loss_fn: See there.
        criterion: See there.
        optimizer: The model's optimizer; ``"preconditioned"`` and ``"critical_lr"`` need it, ``"batch"`` and
            ``"directional"`` measure along its (momentum-free) step instead of the gradient when it is given. For these
            four an adaptive one must have stepped.
        quantities: Any of ``"lambda_max"``, ``"lambda_min"`` (together from one Krylov space), ``"preconditioned"``,
            ``"batch"``, ``"directional"``, ``"critical_lr"``; see :class:`Sharpness`.
        params: See :func:`dyntune.hessian`.
        num_batches: See there.
        method: See there.
        process_group: See there. ``"directional"`` and ``covers="both"`` are for one process.
        rtol: Accuracy of the eigenvalues relative to each.
        max_products: Budget of products per solve; see :func:`dyntune.eigenvalues`.
        covers: What the eigenvalues' intervals are for. ``"numerical"``: the given batches. ``"both"``: the population
            they were drawn from independently, at level 0.95, solver's error included; the value is corrected for the
            bias, and the status says where the correction cannot be relied on. It takes at least two batches; the
            preconditioner is held fixed. Conservative: covered 96 to 100% of the time in benchmarks/sampling.py. See
            ``dyntune.curvature.sampling``.
        seed: Seed.
        strict: Raise when an estimate is not established.
        progress: Called with (products so far, leading value).

    Returns:
        The estimates asked for. Unit: loss / parameter^2; with a preconditioner 1 / learning rate.

    Raises:
        InvalidArgumentError: An unknown quantity or `covers`, or one that needs an optimizer without one.
        OptimizerMismatchError: The optimizer holds other parameters than the model.
        NotConvergedError, RefusedError: ``strict=True``; the error carries the result as ``partial``.
        DyntuneError: As :func:`dyntune.hessian`.

    Cost:
        Eigenvalues: see :func:`dyntune.eigenvalues`; about twice as much with ``covers="both"``. ``"batch"``: a
        gradient and a product per batch. ``"directional"``: three gradients and two products per batch; fewer than four
        batches give no interval. ``"critical_lr"``: one gradient and about ten forward passes per batch.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> s = sharpness(model, batch, criterion=torch.nn.MSELoss())
        >>> 4.0 in s.lambda_max
        True
    """
    wanted = _wanted(quantities, optimizer)
    if covers not in ("numerical", "both"):
        raise InvalidArgumentError(
            f'covers={covers!r}: choose "numerical" for the eigenvalues of the given batches, or "both" for those of '
            "the population they were drawn from."
        )
    operator = hessian(
        model,
        batches,
        loss_fn,
        criterion=criterion,
        params=params,
        num_batches=num_batches,
        method=method,
        process_group=process_group,
        seed=seed,
    )
    objective = operator.objective
    if covers == "both":
        objective.on(objective.batches)  # refuses over several processes, before anything is spent
    scale: Vector | None = None
    if optimizer is not None:
        check_optimizer(optimizer, named_parameters(objective.model))
        if wanted - ENDS.keys():  # the plain eigenvalues need no state, and an optimizer that has not stepped has none
            scale = diagonal_scale(optimizer, list(objective.parameters.values()))
            scale = None if scale is None else objective.space.check(scale, name="scale")
    solve = partial(eigenvalues, rtol=rtol, max_products=max_products, seed=seed, progress=progress)
    found: dict[str, Estimate] = {}
    spent = 0
    ends = [name for name in ENDS if name in wanted]
    if ends:
        which: Which = "both" if len(ends) == 2 else ENDS[ends[0]]
        pairs = solve(operator, which=which)
        if covers == "both":
            population = population_estimates(operator, pairs, [ENDS[e] for e in ends], solve, rtol=rtol, unit=UNIT)
            found |= {name: population[ENDS[name]] for name in ends}
        else:
            found |= {name: eigenvalue_estimate(pairs, 0 if name == "lambda_max" else -1, unit=UNIT) for name in ends}
        spent = found[ends[0]].num_products
    if "preconditioned" in wanted:
        unit = UNIT if scale is None else "1 / learning rate"
        pairs = solve(PreconditionedOperator(operator, scale), which="largest")
        if covers == "both":
            population = population_estimates(operator, pairs, ["largest"], solve, scale=scale, rtol=rtol, unit=unit)
            found["preconditioned"] = population["largest"]
        else:
            found["preconditioned"] = eigenvalue_estimate(pairs, 0, unit=unit)
    if "batch" in wanted:
        found["batch"] = batch_sharpness(objective, scale)
    if "directional" in wanted:
        found["directional"] = directional_sharpness(objective, scale)
    if "critical_lr" in wanted:
        found["critical_lr"] = critical_learning_rate(objective, scale)
    spent += sum(estimate.num_products for name, estimate in found.items() if name not in ends)
    result = Sharpness(**found, record=_record(operator), num_products=spent)
    return _required(result) if strict else result


def _wanted(quantities: Sequence[Quantity], optimizer: torch.optim.Optimizer | None) -> set[str]:
    wanted: set[str] = {quantities} if isinstance(quantities, str) else set(quantities)
    if not wanted or not wanted <= set(get_args(Quantity)):
        raise InvalidArgumentError(f"quantities={quantities!r}: choose from {', '.join(get_args(Quantity))}.")
    lacking = sorted(wanted & {"preconditioned", "critical_lr"})
    if lacking and optimizer is None:
        raise InvalidArgumentError(
            f"{' and '.join(lacking)} depend on how the optimizer scales its steps: pass optimizer=..., one that has "
            "stepped."
        )
    return wanted


def _required(result: Sharpness) -> Sharpness:
    for name, item in result.estimates.items():
        if item.status is not Status.OK:
            error = RefusedError if item.value is None else NotConvergedError
            raise error(f"{name}: {item.status.name}: {item.reason or item.status.value}", partial=result)
    return result


def _record(operator: HessianOperator) -> dict[str, Any]:
    return operator.objective.describe() | {"products": operator.method, "reason": operator.reason}


def eigenvalue_estimate(found: Eigenvalues, index: int, *, unit: str = UNIT) -> Estimate:
    """One of the eigenvalues as an :class:`Estimate`."""
    converged = bool(found.converged_each[index])
    return Estimate(
        value=float(found.values[index]),
        low=float(found.low[index]),
        high=float(found.high[index]),
        level=1 - found.failure_probability,
        unit=unit,
        method=f"Lanczos, {found.method}",
        covers="numerical",
        status=Status.OK if converged else Status.NOT_CONVERGED,
        reason="" if converged else f"{found.num_products} products did not settle it to {found.rtol:.0%}",
        num_products=found.num_products,
    )
