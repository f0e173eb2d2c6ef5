"""Sharpness of a loss at the present parameters: :func:`sharpness`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from dyntune.curvature.eigenvalues import Eigenvalues, eigenvalues
from dyntune.curvature.hessian import HessianOperator, Method, hessian
from dyntune.errors import InvalidArgumentError, NotConvergedError
from dyntune.numerics.target import Which
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.parameters import ParameterSelection
from dyntune.records import Estimate, Status

__all__ = ["Quantity", "Sharpness", "eigenvalue_estimate", "sharpness"]

Quantity: TypeAlias = Literal["lambda_max", "lambda_min"]
UNIT = "loss / parameter^2"


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """Curvature numbers at one point; those that were not asked for are None.

    Args:
        lambda_max: Largest eigenvalue of the Hessian; its interval reaches up to what the solver could not exclude.
        lambda_min: Smallest eigenvalue of the Hessian.
        record: What was assumed: loss, counts, batches, mode, how products were made.
        num_products: Hessian-vector products spent.
    """

    lambda_max: Estimate | None
    lambda_min: Estimate | None
    record: dict[str, Any]
    num_products: int

    def __str__(self) -> str:
        shown = [f"{n} = {e}" for n, e in (("lambda_max", self.lambda_max), ("lambda_min", self.lambda_min)) if e]
        return "\n".join(
            [*shown, f"on {self.record['num_rows']} rows, {self.record['loss']}, {self.record['mode']} mode"]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "lambda_max": self.lambda_max.to_dict() if self.lambda_max else None,
            "lambda_min": self.lambda_min.to_dict() if self.lambda_min else None,
            "record": self.record,
            "num_products": self.num_products,
        }


def sharpness(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    criterion: Criterion | None = None,
    quantities: Sequence[Quantity] = ("lambda_max",),
    params: ParameterSelection = None,
    num_batches: int | Literal["all"] = 16,
    method: Method = "auto",
    rtol: float = 1e-2,
    max_products: int | None = None,
    seed: int = 0,
    strict: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> Sharpness:
    """Largest and smallest Hessian eigenvalue, each as an :class:`Estimate`.

    The intervals cover the solver's error on the given batches, not the choice of the batches.

    Args:
        model: As for :func:`dyntune.hessian`, like `batches`, `loss_fn`, `criterion`, `params`, `num_batches`, `method`.
        batches: See there.
        loss_fn: See there.
        criterion: See there.
        quantities: Any of ``"lambda_max"``, ``"lambda_min"``; both come from one Krylov space.
        params: See there.
        num_batches: See there.
        method: See there.
        rtol: Accuracy relative to each value.
        max_products: Budget of products; see :func:`dyntune.eigenvalues`.
        seed: Seed.
        strict: Raise when an estimate is not established.
        progress: Called with (products so far, leading value).

    Returns:
        The estimates asked for, unit loss / parameter^2.

    Raises:
        InvalidArgumentError: An unknown quantity.
        NotConvergedError: ``strict=True`` and the budget ran out; the error carries the result as ``partial``.
        DyntuneError: As :func:`dyntune.hessian`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> s = sharpness(model, batch, criterion=torch.nn.MSELoss())
        >>> 4.0 in s.lambda_max
        True
    """
    wanted = tuple(quantities)
    unknown = [q for q in wanted if q not in get_args(Quantity)]
    if unknown or not wanted:
        raise InvalidArgumentError(f"quantities={wanted!r}: choose from {', '.join(get_args(Quantity))}.")
    operator = hessian(
        model, batches, loss_fn, criterion=criterion, params=params, num_batches=num_batches, method=method, seed=seed
    )
    which: Which = "both" if len(set(wanted)) == 2 else ("largest" if wanted[0] == "lambda_max" else "smallest")
    found = eigenvalues(operator, which=which, rtol=rtol, max_products=max_products, seed=seed, progress=progress)
    result = Sharpness(
        lambda_max=eigenvalue_estimate(found, 0) if "lambda_max" in wanted else None,
        lambda_min=eigenvalue_estimate(found, -1) if "lambda_min" in wanted else None,
        record=_record(operator),
        num_products=found.num_products,
    )
    if strict and not found.converged:
        raise NotConvergedError(f"sharpness: {Status.NOT_CONVERGED.value}", partial=result)
    return result


def _record(operator: HessianOperator) -> dict[str, Any]:
    return operator.objective.describe() | {"products": operator.method, "reason": operator.reason}


def eigenvalue_estimate(found: Eigenvalues, index: int) -> Estimate:
    """One of the eigenvalues as an :class:`Estimate`."""
    converged = bool(found.converged_each[index])
    return Estimate(
        value=float(found.values[index]),
        low=float(found.low[index]),
        high=float(found.high[index]),
        level=1 - found.failure_probability,
        unit=UNIT,
        method=f"Lanczos, {found.method}",
        covers="numerical",
        status=Status.OK if converged else Status.NOT_CONVERGED,
        reason="" if converged else f"{found.num_products} products did not settle it to {found.rtol:.0%}",
        num_products=found.num_products,
    )
