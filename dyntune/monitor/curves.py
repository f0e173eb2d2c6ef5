"""Curvature on batches that were kept from training: :class:`CurvatureProbe`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dyntune.curvature.eigenvalues import eigenvalues
from dyntune.curvature.hessian import HessianOperator
from dyntune.curvature.preconditioned import PreconditionedOperator
from dyntune.curvature.sharpness import UNIT, eigenvalue_estimate
from dyntune.curvature.stochastic import batch_sharpness
from dyntune.errors import InvalidArgumentError, StaleOperatorError
from dyntune.monitor.tracking import EigenvalueTracker
from dyntune.numerics.vectors import Vector
from dyntune.objective.batches import map_tensors, split_rows, to_device
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.records import Estimate
from dyntune.stability.scales import diagonal_scale
from dyntune.stability.thresholds import Recurrence, batch_threshold, recurrence, threshold

__all__ = ["CurvatureProbe", "halves_of"]

SCALED_UNIT = "1 / learning rate"
# Batches that batch sharpness is averaged over: the fewest with which its interval is shorter than four of its
# deviations (Student's t with three degrees of freedom, 3.18 / sqrt(4)).
MOST_BATCHES = 4


class CurvatureProbe:
    """Measures on early batches of training, kept from then on, so that what changes is the model.

    The largest eigenvalue is that of the first batch alone, which bounds that of all data from above on average; batch
    sharpness is a mean over up to four batches.

    Args:
        model: The model.
        optimizer: What steps it.
        loss_fn: See :func:`dyntune.hessian`.
        criterion: See there.
        batch: The first batch.
        seed: Of dropout and of search directions.

    Raises:
        DyntuneError: As :func:`dyntune.hessian`.

    Cost: one or two forward passes, and the batch is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction | None,
        criterion: Criterion | None,
        batch: Any,
        *,
        seed: int,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._loss: dict[str, Any] = {"loss_fn": loss_fn, "criterion": criterion}
        self._seed = seed
        self._batches = [_copied(batch)]
        self._prepare()
        self.tracker = EigenvalueTracker(unit=UNIT, seed=seed)

    def _prepare(self) -> None:
        whole = Objective(self._model, self._batches[0], **self._loss, process_group=None, seed=self._seed)
        self._names = self._moved_by(whole.parameters)
        if not self._names:
            raise InvalidArgumentError(
                f"the {type(self._optimizer).__name__} has moved none of the model's parameters yet: curvature is "
                "measured along those that it moves. Pass the optimizer that steps this model."
            )
        self.objective = whole if len(self._names) == len(whole.parameters) else whole.restricted(self._names)
        self._whole = whole
        self._operator = HessianOperator(self.objective)

    @property
    def first_batch(self) -> Any:
        """That of the largest eigenvalue."""
        return self._batches[0]

    @property
    def wants_batches(self) -> bool:
        """Whether another batch would be kept."""
        return len(self._batches) < MOST_BATCHES

    def keep(self, batch: Any) -> None:
        """Keep one more batch."""
        self._batches.append(_copied(batch))

    def moved(self, batch: Any) -> Any:
        """A batch on the parameters' device."""
        return to_device(batch, self.objective.space.device)

    def batch_values(self) -> dict[str, float | Estimate | None]:
        """Batch sharpness with its limit and ratio; a product for each batch kept."""
        (scale, known), rule = self.scale(), self._rule()
        if not known:
            return {}
        batches = [self.moved(batch) for batch in self._batches]
        found: dict[str, float | Estimate | None] = {}
        sharpness = batch_sharpness(self.objective.on(batches), scale)
        found["curvature/batch_sharpness"] = sharpness
        plateau = None if rule is None else batch_threshold(rule).value
        if rule is not None and plateau is not None and rule.lr > 0:
            found["curvature/batch_sharpness.limit"] = plateau / rule.lr
            if sharpness.value is not None:
                found["stability/batch_ratio"] = sharpness.value * rule.lr / plateau
        return found

    def largest_values(self, *, prove: bool | None = None) -> dict[str, float | Estimate | None]:
        """The largest eigenvalue with its limit and ratio."""
        (scale, known), rule = self.scale(), self._rule()
        rule = rule if known else None
        name = "curvature/lambda_max" if scale is None else "curvature/lambda_max_preconditioned"
        self.tracker.unit = UNIT if scale is None else SCALED_UNIT
        tracked = self.tracker.measure(PreconditionedOperator(self._operator, scale), prove=prove)
        value = float(tracked.estimate)
        found: dict[str, float | Estimate | None] = {
            name: tracked.estimate,
            "curvature/residual": tracked.residual,
            "curvature/products": tracked.num_products,
        }
        limit = None if rule is None else _limit(rule, identity=scale is None)
        if rule is not None and limit is not None and math.isfinite(limit):
            found[f"{name}.limit"] = limit
            # Coupled decay is part of what the learning rate multiplies, so the ratio is not value over limit.
            edge = float(threshold(rule))
            curved = value + (rule.coupled_decay if scale is None else 0.0)
            found["stability/lr_ratio"] = rule.lr * curved / edge
            if curved > 0:
                found["curvature/lr_crit"] = edge / curved
        return found

    def block_values(self) -> dict[str, float | Estimate | None]:
        """Largest eigenvalue of every tensor's block of the Hessian, on the first batch."""
        found: dict[str, float | Estimate | None] = {}
        for name in self.objective.parameters:
            pairs = eigenvalues(HessianOperator(self.objective.restricted([name])), seed=self._seed)
            found[f"curvature/block/{name}"] = eigenvalue_estimate(pairs, 0, unit=UNIT)
        return found

    def refreshed(self) -> None:
        """Start anew where parameters were replaced, converted or frozen since, or the optimizer moves others."""
        try:
            with self.objective.measuring():
                if self._moved_by(self._whole.parameters) == self._names:
                    return
        except StaleOperatorError:
            pass
        self._prepare()
        self.tracker = EigenvalueTracker(unit=self.tracker.unit, seed=self._seed)

    def _moved_by(self, parameters: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of the parameters that the optimizer moves: in a group with a rate, and stepped before."""
        kept = isinstance(self._optimizer, (torch.optim.SGD, torch.optim.LBFGS))  # nothing of some parameters
        rates = {id(p): float(group["lr"]) for group in self._optimizer.param_groups for p in group["params"]}
        state = self._optimizer.state
        least = 0.0 if any(rates.values()) else -1.0  # a schedule that begins at zero stops all of them alike
        return [name for name, p in parameters.items() if rates.get(id(p), -1.0) > least and (kept or state.get(p))]

    def scale(self) -> tuple[Vector | None, bool]:
        """How the optimizer scales its steps (None: alike everywhere), and whether that is known."""
        try:
            return diagonal_scale(self._optimizer, self.objective.tensors), True
        except (InvalidArgumentError, KeyError, TypeError):  # an optimizer that is none of torch's, or L-BFGS
            return None, False

    def _rule(self) -> Recurrence | None:
        try:
            return recurrence(self._optimizer)
        except InvalidArgumentError:  # no threshold is known; what is measured is recorded without a limit
            return None


def _copied(batch: Any) -> Any:
    """Loaders may use their memory again."""
    return map_tensors(batch, lambda tensor: tensor.detach().clone())


def _limit(rule: Recurrence, *, identity: bool) -> float | None:
    edge = threshold(rule).value
    if edge is None or not rule.lr > 0 or (rule.coupled_decay and not identity):
        return None
    return edge / rule.lr - rule.coupled_decay


def halves_of(batches: Sequence[Any], microbatches: Sequence[Any] | None) -> list[Sequence[Any]] | None:
    """Two parts of what a step was made of, each a list of batches; None where it cannot be cut.

    Args:
        batches: Of the step: one, or several that were accumulated.
        microbatches: Given by the user instead.
    """
    parts = list(microbatches) if microbatches else list(batches)
    if len(parts) >= 2:
        middle = len(parts) // 2
        return [parts[:middle], parts[middle : 2 * middle]]  # equally many each
    if not parts:
        return None
    cut = split_rows(parts[0], 2)
    return [[half] for half in cut] if len(cut) == 2 else None
