"""Weights of tasks that help the main one and hurt none: :func:`suggest_task_weights`."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.numerics.nonnegative import ConeProjection, cone_projection, triangular_factor
from dyntune.objective.context import differentiable_twice, unwrap
from dyntune.objective.parameters import ParameterSelection, select_parameters
from dyntune.objective.state import preserved_state
from dyntune.records import Status, short_number

__all__ = ["TaskWeights", "shared_names", "suggest_task_weights", "task_weights_rule"]

# A cosine below this counts as opposed: some ten times the rounding of float32 gradients (6e-8).
OPPOSED = -1e-6
QUANTILE = 1.959964  # 95% of the normal distribution
SOURCES = (
    "Moreau (1962) (nearest point of a cone)",
    "Lopez-Paz, Ranzato (2017), arXiv:1706.08840 (projection onto what does not raise other losses)",
)


@dataclass(frozen=True, kw_only=True)
class TaskWeights:
    """Weights of a sum of losses, the main task's being 1.

    Args:
        main: Name of the main task.
        weights: By task; None where nothing lowers the main loss without raising another.
        cosines: Of the weighted gradient with each task's, on the shared parameters, in the metric asked for.
        plain: Of the main task's gradient alone with each task's: negative is a conflict.
        errors: Standard error of each entry of `cosines` over batches; NaN with one batch.
        length: Of the weighted gradient over the main task's.
        shared: Names of the parameters that tasks share.
        status: How far to trust it.
        reason: Why the status is what it is; empty when OK.
        residual: Of the optimality conditions.
        cost: Gradients taken.
    """

    main: str
    weights: dict[str, float] | None
    cosines: dict[str, float]
    plain: dict[str, float]
    errors: dict[str, float]
    length: float
    shared: tuple[str, ...]
    status: Status
    reason: str
    residual: float
    cost: float

    def __str__(self) -> str:
        if self.weights is None:
            return f"task weights: refused. {self.reason}"
        text = ", ".join(f"{name} {short_number(w)}" for name, w in self.weights.items())
        return text if self.status is Status.OK else f"{text} [{self.status.name.lower()}: {self.reason}]"

    def explain(self) -> str:
        """Weights, conflicts and cosines in words."""
        lines = [f"task weights: {self}", f"status: {self.status.name}: {self.reason or self.status.value}"]
        lines.append("rule: the direction nearest to the main task's gradient that raises no other loss to first order")
        for name, cosine in self.cosines.items():
            lines.append(
                f"  {name}: cosine {short_number(cosine)} with the weighted gradient (error "
                f"{short_number(self.errors[name])}), {short_number(self.plain[name])} with the main task's alone"
            )
        lines.append(f"length: {short_number(self.length)} of the main task's gradient")
        lines.append(f"shared parameters: {len(self.shared)} tensors")
        lines += [f"source: {source}" for source in SOURCES]
        return "\n".join(lines)

    def require(self) -> TaskWeights:
        """Return self when the status is OK; raise the matching error otherwise."""
        if self.status is Status.OK:
            return self
        error = RefusedError if self.weights is None else NotConvergedError
        raise error(f"task weights: {self.status.name}: {self.reason}", partial=self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        finite = {k: v if math.isfinite(v) else None for k, v in self.errors.items()}
        return {
            "main": self.main,
            "weights": self.weights,
            "cosines": self.cosines,
            "plain": self.plain,
            "errors": finite,
            "length": self.length,
            "shared": list(self.shared),
            "status": self.status.name,
            "reason": self.reason,
            "residual": self.residual,
            "cost": self.cost,
        }

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


def suggest_task_weights(
    model: nn.Module,
    batches: Sequence[Any],
    losses: Mapping[str, Callable[[nn.Module, Any], torch.Tensor]],
    *,
    main: str,
    params: ParameterSelection = None,
    scale: Sequence[torch.Tensor] | None = None,
    strict: bool = False,
) -> TaskWeights:
    """Weights for a sum of losses whose gradient is nearest to the main task's and opposes no other.

    Args:
        model: What the tasks share.
        batches: A list; gradients are means over it, their errors from its spread.
        losses: Name -> ``(model, batch) -> loss``, a mean over rows; two at least.
        main: The task that matters.
        params: Which parameters, as for :func:`dyntune.hessian`; of these the shared ones are found: those that get a
            gradient from two tasks at least. Heads of single tasks are left out.
        scale: Diagonal of an optimizer's preconditioner in the shapes of the shared parameters (names in ``shared``),
            as of :func:`dyntune.stability.scales.diagonal_scale`: steps are then measured by it.
        strict: Raise when the status is not OK.

    Returns:
        Weights with the main task's at 1: ``sum(w * loss)``. UNCERTAIN: whether a task is opposed is within two
        standard errors, on these batches. REFUSED: no direction lowers the main loss without raising another.

    Raises:
        InvalidArgumentError: One task, an unknown main one, no batches, nothing shared.
        NonFiniteError: A gradient is NaN or infinite.
        RefusedError, NotConvergedError: With ``strict=True``.

    Accuracy:
        Objective as that of SLSQP to 1e-8; cosines at least -1e-6 up to condition 1e12 (``tests/suggest``).
    Cost:
        One gradient for each task and batch.
    Assumes:
        Small steps: nothing is said of curvature. Gradients of later batches like those of these.
    Source:
        Moreau (1962); Lopez-Paz and Ranzato (2017), arXiv:1706.08840, without their margin.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> x = torch.tensor([[1.0, 0.5], [-0.3, 2.0]])
        >>> tasks = {
        ...     "a": lambda m, b: (m(b)[:, 0] - 1).square().mean(),
        ...     "b": lambda m, b: (m(b)[:, 0] + 1).square().mean(),
        ...     "c": lambda m, b: m(b).square().mean(),
        ... }
        >>> found = suggest_task_weights(model, [x], tasks, main="a")
        >>> min(found.cosines.values()) > -1e-6 or found.weights is None
        True
    """
    if len(losses) < 2 or main not in losses:
        raise InvalidArgumentError(
            f"main={main!r} of {sorted(losses)}: two tasks at least are needed, and the main one is one of them."
        )
    batches = list(batches)
    if not batches:
        raise InvalidArgumentError("no batches: gradients are means over one batch at least.")
    model = unwrap(model)
    chosen = select_parameters(model, params)
    names = [main, *(n for n in losses if n != main)]
    device = next(iter(chosen.values())).device
    with preserved_state(model), differentiable_twice(model, device):
        found = [[_gradient(losses[n](model, b), chosen) for b in batches] for n in names]
    shared = shared_names(found)
    if not shared:
        raise InvalidArgumentError(
            "no parameter gets a gradient from two tasks: they share nothing, and every weight trains them alike."
        )
    if scale is not None and len(scale) != len(shared):
        raise InvalidArgumentError(f"scale has {len(scale)} tensors for the {len(shared)} shared ones: {shared}.")
    roots = {n: None if scale is None else scale[i].rsqrt() for i, n in enumerate(shared)}

    def row(grads: Mapping[str, torch.Tensor | None]) -> list[torch.Tensor]:
        made = []
        for n in shared:
            g = grads[n]
            g = torch.zeros_like(chosen[n]) if g is None else g
            root = roots[n]
            made.append(g if root is None else g * root)
        return made

    columns = [row(g) for task in found for g in task]
    result = task_weights_rule(triangular_factor(columns), names=names, num_batches=len(batches), shared=tuple(shared))
    return result.require() if strict else result


def task_weights_rule(
    factor: np.ndarray, *, names: Sequence[str], num_batches: int, shared: Sequence[str] = ()
) -> TaskWeights:
    """The rule: gradients as columns in, weights out.

    Args:
        factor: Gradients of every task and batch as columns, tasks outermost and the main one first, or a triangular
            factor of these; shape (any, tasks * num_batches).
        names: Of tasks, the main one first.
        num_batches: Columns of each task.
        shared: Names of parameters, for the record.
    """
    each = factor.reshape(len(factor), len(names), num_batches)
    mean = each.mean(-1)
    lengths = np.linalg.norm(mean, axis=0)
    found = cone_projection(mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = np.where(lengths > 0, mean / lengths, 0.0)
    plain = dict(zip(names, (unit.T @ unit[:, 0]).tolist(), strict=True))
    direction = mean @ np.concatenate([[1.0], found.multipliers])
    errors = _errors(each, direction, lengths)
    reason, status = _verdict(found, names, errors, lengths)
    refused = status is Status.REFUSED
    return TaskWeights(
        main=names[0],
        weights=None if refused else dict(zip(names, [1.0, *found.multipliers.tolist()], strict=True)),
        cosines=dict(zip(names, found.cosines.tolist(), strict=True)),
        plain=plain,
        errors=dict(zip(names, errors.tolist(), strict=True)),
        length=found.length / float(lengths[0]) if lengths[0] > 0 else 0.0,
        shared=tuple(shared),
        status=status,
        reason=reason,
        residual=found.residual,
        cost=float(len(names) * num_batches),
    )


def _errors(each: np.ndarray, direction: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Standard error over batches of the cosine of each task's mean gradient with a direction held still."""
    count, norm = each.shape[-1], float(np.linalg.norm(direction))
    if count < 2 or norm == 0:
        return np.full(each.shape[1], math.nan)
    along = np.einsum("ktb,k->tb", each, direction / norm)
    made: np.ndarray = along.std(-1, ddof=1) / math.sqrt(count) / np.where(lengths > 0, lengths, 1.0)
    return made


def _verdict(
    found: ConeProjection, names: Sequence[str], errors: np.ndarray, lengths: np.ndarray
) -> tuple[str, Status]:
    if lengths[0] == 0:
        return f"the gradient of the main task, {names[0]!r}, is zero: there is nothing to follow", Status.REFUSED
    if found.length == 0:
        return "every direction that lowers the main loss raises another: a Pareto-stationary point", Status.REFUSED
    if found.cosines.min() < OPPOSED:
        return f"the solution still opposes a task, by a cosine of {found.cosines.min():.2g}", Status.UNCERTAIN
    still = [n for n, g in zip(names, lengths, strict=True) if g == 0]
    doubts = [f"{', '.join(still)}: no gradient"] if still else []
    close = [n for n, c, e in zip(names, found.cosines, errors, strict=True) if e == e and c < QUANTILE * e]
    if close:
        doubts.append(f"{', '.join(close)}: opposed or not lies within the error over batches")
    if np.isnan(errors).all():
        doubts.append("one batch: whether tasks are opposed on others is not known")
    return "; ".join(doubts), Status.UNCERTAIN if doubts else Status.OK


def shared_names(found: Sequence[Sequence[Mapping[str, torch.Tensor | None]]]) -> list[str]:
    """Parameters that get a gradient from two tasks at least."""
    return [n for n in found[0][0] if sum(any(g[n] is not None for g in task) for task in found) > 1]


def _gradient(loss: torch.Tensor, chosen: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    if loss.numel() != 1 or not loss.requires_grad:
        raise InvalidArgumentError(
            f"a loss of shape {tuple(loss.shape)} that {'has' if loss.requires_grad else 'has no'} gradient: return "
            "one number that depends on the parameters."
        )
    grads = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
    return dict(zip(chosen, grads, strict=True))
