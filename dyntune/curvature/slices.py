"""The loss along a line through the present parameters: :func:`loss_slice`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dyntune.curvature.eigenvalues import Eigenvalues
from dyntune.curvature.hessian import HessianOperator, Method
from dyntune.errors import InvalidArgumentError
from dyntune.numerics.krylov import FLOOR_EPS
from dyntune.numerics.vectors import Vector, dot, norm
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.objective.parameters import ParameterSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Direction",
    "Expansion",
    "LossSlice",
    "Progress",
    "expansion",
    "leaf",
    "loss_at",
    "loss_slice",
    "rounding_of",
]

Array = NDArray[np.float64]
# A result with vectors, one tensor per parameter, or a flat tensor.
Direction: TypeAlias = "Eigenvalues | Sequence[torch.Tensor] | torch.Tensor"
Progress: TypeAlias = "Callable[[int, float], None] | None"


@dataclass(frozen=True, kw_only=True, eq=False)
class LossSlice:
    """Losses along ``theta + t d``, and what gradient and curvature at t = 0 predict for them.

    Args:
        kind: ``"direction"``: through the present parameters; ``"path"``: from t = 0 at one state to t = 1 at another.
        direction: What d is, in words.
        distances: t, shape (n,), ascending, with t = 0 among them. Unit: see `unit`.
        losses: Loss at each, shape (n,); NaN or infinite where it is.
        loss: Loss at t = 0.
        slope: ``g . d``, the derivative of the loss with respect to t at 0; None where nothing is predicted.
        curvature: ``d . H d``, the second derivative; None where nothing is predicted.
        length: Euclidean length of d: the line moves by ``t length`` in the space of the parameters.
        unit: What t is measured in.
        rounding: Differences between losses below this are rounding.
        num_products: Hessian-vector products spent.
        record: What was assumed: loss, counts, batches, mode, how the product was made, which buffers.
    """

    kind: Literal["direction", "path"]
    direction: str
    distances: Array
    losses: Array
    loss: float
    slope: float | None
    curvature: float | None
    length: float
    unit: str
    rounding: float
    num_products: int
    record: dict[str, Any]

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Where the loss is finite, shape (n,)."""
        return np.isfinite(self.losses)

    @property
    def predicted(self) -> Array | None:
        """The quadratic model ``loss + slope t + curvature t^2 / 2``, shape (n,); None where nothing is predicted."""
        if self.slope is None or self.curvature is None:
            return None
        return self.loss + self.slope * self.distances + 0.5 * self.curvature * self.distances**2

    def reach(self, tolerance: float = 0.1) -> float | None:
        """How far the quadratic model holds: the largest grid point r with every ``|t| <= r`` predicted well.

        A point is predicted well if the loss differs from the prediction by at most `tolerance` times the largest
        change that is predicted within the same ``|t|``, or by rounding.

        Args:
            tolerance: Permitted error relative to the predicted change, > 0.

        Returns:
            r in the unit of the distances; 0 if the nearest points already differ; None where nothing is predicted.
        """
        predicted = self.predicted
        if predicted is None:
            return None
        order = np.argsort(np.abs(self.distances), kind="stable")
        at = np.abs(self.distances[order])
        change = np.maximum.accumulate(np.abs(predicted - self.loss)[order])
        with np.errstate(invalid="ignore"):  # a loss that is not finite is not predicted
            good = np.abs(self.losses - predicted)[order] <= tolerance * change + self.rounding
        bad = at[~good]
        inside = at if bad.size == 0 else at[at < bad[0]]
        return float(inside.max(initial=0.0))

    @property
    def barrier(self) -> float | None:
        """Height of the loss above the straight line between the losses at t = 0 and t = 1, at its highest.

        Zero or less means that the two are linearly connected on these batches (Frankle et al. 2020,
        arXiv:1912.05671, section 2). None for a slice along a direction; infinite where the loss in between is.
        """
        if self.kind == "direction":
            return None
        between = (self.distances >= 0) & (self.distances <= 1)
        t, losses = self.distances[between], self.losses[between]
        excess = losses - ((1 - t) * losses[0] + t * losses[-1])
        return math.inf if not np.isfinite(excess).all() else float(excess.max())

    def __str__(self) -> str:
        spoiled = int((~self.finite).sum())
        lines = [
            f"loss along {self.direction}: {self.losses.size} points, t = {self.distances[0]:.3g} .. "
            f"{self.distances[-1]:.3g} ({self.unit})" + (f", {spoiled} not finite" if spoiled else "")
        ]
        if self.slope is not None and self.curvature is not None:
            lines.append(f"at t = 0: loss {self.loss:.6g}, slope {self.slope:.4g}, curvature {self.curvature:.4g}")
            lines.append(f"quadratic model within 10 % up to |t| = {self.reach():.3g}")
        if self.kind == "path":
            lines.append(f"highest above the straight line between the ends: {self.barrier:.4g}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; losses that are not finite become None."""
        return {
            "kind": self.kind,
            "direction": self.direction,
            "distances": self.distances.tolist(),
            "losses": [x if math.isfinite(x) else None for x in self.losses.tolist()],
            "finite": self.finite.tolist(),
            "predicted": None if self.predicted is None else self.predicted.tolist(),
            "loss": self.loss,
            "slope": self.slope,
            "curvature": self.curvature,
            "length": self.length,
            "unit": self.unit,
            "rounding": self.rounding,
            "num_products": self.num_products,
            "record": self.record,
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the losses with the prediction (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_slice

        return plot_slice(self, ax=ax)


def loss_slice(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    direction: Direction,
    index: int = 0,
    radius: float | None = None,
    num_points: int = 41,
    criterion: Criterion | None = None,
    params: ParameterSelection = None,
    num_batches: int | Literal["all"] = 16,
    method: Method = "auto",
    seed: int = 0,
    progress: Progress = None,
) -> LossSlice:
    """The loss along ``theta + t d`` on a symmetric grid of t, with the quadratic prediction from t = 0.

    Args:
        model: As for :func:`dyntune.hessian`, like the next two, `criterion`, `params`, `num_batches` and `method`.
            Nothing of it changes; dropout's masks are the same at every point.
        batches: See there.
        loss_fn: See there.
        direction: d: what :func:`dyntune.eigenvalues` returned for this model (unit vectors, so that t is a distance),
            one tensor per selected parameter, or a flat tensor. It is not normalised.
        index: Which of the vectors of an :class:`Eigenvalues`.
        radius: The grid reaches from ``-radius`` to ``radius``, > 0. Default: where the quadratic model has changed
            the loss by its own value, ``|slope| r + |curvature| r^2 / 2 = |loss|``.
        num_points: Points of the grid, odd and at least 3.
        criterion: See :func:`dyntune.hessian`.
        params: See there; d has one tensor for each of the selected parameters.
        num_batches: See there.
        method: See there; of the one product.
        seed: Seed of dropout masks and other randomness of the forward pass.
        progress: Called with (points so far, loss).

    Returns:
        The losses and what was predicted. Unit of t: 1 / length of d in parameters.

    Raises:
        InvalidArgumentError: An even or too small grid, a radius or direction that is not finite or zero, an index
            that the result has not, or no radius where the quadratic model is flat.
        ShapeMismatchError: d has other shapes than the selected parameters.
        DyntuneError: As :func:`dyntune.hessian`.

    Accuracy:
        Points are formed in float64 and rounded to the parameters' type. A step ``t d`` below the rounding of the
        parameters moves only some of them; `rounding` bounds what to read into differences between losses.
    Cost:
        One forward pass per point and batch, one gradient, one product.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.eye(2), torch.zeros(2, 1))
        >>> found = loss_slice(model, batch, criterion=torch.nn.MSELoss(), direction=torch.ones(2), radius=1.0)
        >>> found.curvature, found.reach() == 1.0
        (2.0, True)
    """
    if num_points < 3 or num_points % 2 == 0:
        raise InvalidArgumentError(f"num_points={num_points}: give an odd number >= 3, so that t = 0 is among them.")
    if radius is not None and not 0 < radius < math.inf:
        raise InvalidArgumentError(f"radius={radius}: the grid reaches a positive, finite distance to both sides.")
    objective = Objective(
        model, batches, loss_fn, criterion=criterion, params=params, num_batches=num_batches, seed=seed
    )
    vector, name = _vector(objective, direction, index)
    at = expansion(objective, vector, method)
    reach = _natural_radius(at) if radius is None else radius
    half = num_points // 2
    distances = np.arange(-half, half + 1) / half * reach
    losses = np.full(num_points, at.loss)
    for i, t in enumerate(distances.tolist()):
        if i != half:
            losses[i] = loss_at(objective, partial(_moved, vector=vector, t=t))
        if progress is not None:
            progress(i + 1, float(losses[i]))
    return LossSlice(
        kind="direction",
        direction=name,
        distances=distances,
        losses=losses,
        loss=at.loss,
        slope=at.slope,
        curvature=at.curvature,
        length=norm(vector),
        unit="distance in the parameters" if isinstance(direction, Eigenvalues) else "multiples of the direction",
        rounding=rounding_of(objective, at.loss),
        num_products=1,
        record=objective.describe() | {"products": at.method, "buffers": "the model's own", "seed": seed},
    )


def _vector(objective: Objective, direction: Direction, index: int) -> tuple[Vector, str]:
    """The direction in the objective's shapes, finite and not zero, and what to call it."""
    name = "the given direction"
    if isinstance(direction, Eigenvalues):
        count = len(direction.vectors)
        if not 0 <= index < count:
            raise InvalidArgumentError(f"index={index}: the result has {count} eigenvectors, numbered from 0.")
        name = f"the eigenvector of λ = {direction[index]:.4g}"
        direction = direction.vectors[index]
    elif isinstance(direction, Mapping) or not isinstance(direction, (Sequence, torch.Tensor)):
        raise InvalidArgumentError(
            f"direction is a {type(direction).__name__}: give an Eigenvalues, a list of tensors or a flat tensor. For "
            "the line to a state dict or checkpoint there is loss_path(..., end=...)."
        )
    space = objective.space
    vector = space.unflatten(direction) if isinstance(direction, torch.Tensor) else space.check(direction)
    if not all(bool(torch.isfinite(t).all()) for t in vector) or not any(bool(t.any()) for t in vector):
        raise InvalidArgumentError("direction is zero, or holds NaN or infinity: there is no line to follow.")
    return vector, name


@dataclass(frozen=True)
class Expansion:
    """Loss, slope and curvature along a line at t = 0, and how the product was made."""

    loss: float
    slope: float
    curvature: float
    method: str


def expansion(objective: Objective, vector: Vector, method: Method) -> Expansion:
    """Second order expansion of the loss along `vector` at the objective's own parameters."""
    operator = HessianOperator(objective, method=method)
    with operator.session() as product:
        curvature = dot(vector, list(product(vector)))
    return Expansion(objective.loss(), dot(objective.gradient(), vector), curvature, operator.method)


def _natural_radius(at: Expansion) -> float:
    """Positive root r of ``|slope| r + |curvature| r^2 / 2 = |loss|``."""
    slope, curvature, height = abs(at.slope), abs(at.curvature), abs(at.loss)
    if not (height > 0 and slope + curvature > 0 and math.isfinite(slope + curvature)):
        raise InvalidArgumentError(
            f"radius: there is no default where the loss is {at.loss:.3g}, its slope {at.slope:.3g} and its curvature "
            f"{at.curvature:.3g} along the direction. Give a radius."
        )
    return 2 * height / (slope + math.sqrt(slope * slope + 2 * curvature * height))  # the form without cancellation


def _moved(origin: Mapping[str, torch.Tensor], *, vector: Vector, t: float) -> dict[str, torch.Tensor]:
    """``origin + t vector``, each tensor formed in float64."""
    pairs = zip(origin.items(), vector, strict=True)
    return {name: leaf((p.detach().double() + t * v.double()).to(p.dtype)) for (name, p), v in pairs}


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """Requires a gradient as a parameter does: without, ``nn.TransformerEncoderLayer`` rounds by another kernel."""
    return tensor.detach().requires_grad_()


def loss_at(objective: Objective, point: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> float:
    """The objective's value elsewhere; not finite where it is not.

    Args:
        objective: The loss.
        point: From what the model computes with to what stands in its place, both by name.
    """
    with objective.measuring() as buffers:
        parameters = point(objective.present)
        total = weights = 0.0
        many = len(objective.batches) > 1
        for index in range(len(objective.batches)):
            term = objective.batch_loss(index, buffers, parameters)
            weight = float(term.weight) if many else 1.0
            total, weights = total + float(term.value.detach()) * weight, weights + weight
    return objective.layout.whole_loss(total if objective.adds_up else total / weights)


def rounding_of(objective: Objective, loss: float) -> float:
    """Differences between losses below this are rounding."""
    return FLOOR_EPS * float(torch.finfo(objective.space.dtype).eps) * abs(loss)
