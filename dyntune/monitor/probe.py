"""A fixed set of quantities measured at one set of weights after the other: :class:`Probe`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn

from dyntune.curvature.eigenvalues import Eigenvalues
from dyntune.curvature.hessian import HessianOperator, Method
from dyntune.curvature.preconditioned import PreconditionedOperator
from dyntune.curvature.sharpness import UNIT, Quantity, eigenvalue_estimate
from dyntune.curvature.stochastic import batch_sharpness, critical_learning_rate, directional_sharpness
from dyntune.errors import CheckpointError, InvalidArgumentError, NonFiniteError
from dyntune.numerics.target import Which
from dyntune.objective.objective import Objective
from dyntune.objective.parameters import named_parameters
from dyntune.objective.stored import StoredState, lent
from dyntune.pilot.optimizers import OptimizerLike, twin_optimizer
from dyntune.records import Estimate, Status
from dyntune.stability.scales import diagonal_scale
from dyntune.stability.thresholds import batch_threshold, recurrence, threshold

__all__ = ["Probe", "Reading", "check_quantities"]

# Where training scripts put the optimizer's state in a checkpoint; Lightning keeps a list of them.
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim")
# Those that depend on the optimizer's state wherever it has one.
SCALED = {"preconditioned", "batch", "directional", "critical_lr"}


def check_quantities(quantities: Sequence[Quantity], *, with_optimizer: bool) -> tuple[Quantity, ...]:
    """The quantities, each once.

    Raises:
        InvalidArgumentError: An unknown one, or one that needs an optimizer without one.
    """
    given: Sequence[Quantity] = (quantities,) if isinstance(quantities, str) else quantities  # type: ignore[assignment]
    wanted = tuple(dict.fromkeys(given))
    if not wanted or not set(wanted) <= set(get_args(Quantity)):
        raise InvalidArgumentError(f"quantities={quantities!r}: choose from {', '.join(get_args(Quantity))}.")
    lacking = sorted({"preconditioned", "critical_lr"}.intersection(wanted))
    if lacking and not with_optimizer:
        raise InvalidArgumentError(
            f"{' and '.join(lacking)} depend on how the optimizer scales its steps: pass optimizer=..."
        )
    return wanted


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was measured at one set of weights.

    Args:
        values: By column.
        status: Where something was refused: why.
        assumed: Loss, counts, batches and mode; empty where not even the loss could be computed.
    """

    values: dict[str, float | Estimate | None]
    status: dict[str, tuple[str, str]] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)


class Probe:
    """Measures quantities at borrowed weights, each time as if it were the only one.

    Searches do not begin at the last eigenvector: what takes products is the proof that there is no larger eigenvalue.
    On a 40-60-3 tanh network (3 seeds, 3 checkpoints each, every one 10 steps after another) lambda_max to one percent
    took 183 products from the last checkpoint's eigenvector and 175 from a random start. So no row depends on others.

    Args:
        model: The (unwrapped) model.
        objective: Makes the objective at the weights that the model holds at that moment.
        wanted: What to measure besides the loss.
        optimizer: As for :func:`dyntune.suggest_lr`.
        method: How products are made; see :func:`dyntune.hessian`.
        solve: :func:`dyntune.eigenvalues` with its options.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[[], Objective],
        *,
        wanted: Sequence[Quantity],
        optimizer: OptimizerLike | None,
        method: Method,
        solve: Callable[..., Eigenvalues],
    ) -> None:
        self.model = model
        self._objective = objective
        self._wanted = wanted
        self._optimizer = optimizer
        self._method: Method = method
        self._solve = solve
        self._originals = named_parameters(model)

    def measure(self, state: StoredState, checkpoint: Mapping[str, Any]) -> Reading:
        """Measure at `state`; what is not finite there is NaN or refused, with the reason.

        Args:
            state: The weights.
            checkpoint: Where the optimizer's state may be.

        Raises:
            CheckpointError: The optimizer's state in it does not fit the optimizer.
            DyntuneError: As :func:`dyntune.sharpness`.
        """
        reading = Reading(values={"loss": math.nan} | dict.fromkeys(self._wanted))
        with lent(self.model, state):
            try:
                self._fill(reading, checkpoint)
            except NonFiniteError as error:
                missing = [name for name, value in reading.values.items() if value is None or value is math.nan]
                reading.status.update({name: (Status.REFUSED.name, str(error)) for name in missing})
        return reading

    def _fill(self, reading: Reading, checkpoint: Mapping[str, Any]) -> None:
        objective = self._objective()
        reading.assumed.update(objective.describe())
        reading.values["loss"] = objective.loss()
        operator = HessianOperator(objective, method=self._method)
        self._ends(reading, operator)
        if not SCALED.intersection(self._wanted) and self._optimizer is None:
            return
        optimizer, complete = self._twin(checkpoint)
        if optimizer is not None and complete:
            reading.values.update(_limits(optimizer, self._wanted))
        if not SCALED.intersection(self._wanted):
            return
        try:
            scale = None if optimizer is None else diagonal_scale(optimizer, objective.tensors)
        except InvalidArgumentError as error:  # no state: what it would scale is refused, the rest is not
            refused = (Status.REFUSED.name, str(error))
            reading.status.update({name: refused for name in self._wanted if name in SCALED})
            return
        except (KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"the optimizer's state in the checkpoint cannot be used: {error!r}.") from error
        self._scaled(reading, operator, scale)

    def _scaled(self, reading: Reading, operator: HessianOperator, scale: list[torch.Tensor] | None) -> None:
        if "preconditioned" in self._wanted:
            pairs = self._solve(PreconditionedOperator(operator, scale), which="largest")
            unit = UNIT if scale is None else "1 / learning rate"
            reading.values["preconditioned"] = eigenvalue_estimate(pairs, 0, unit=unit)
        if "batch" in self._wanted:
            reading.values["batch"] = batch_sharpness(operator.objective, scale)
        if "directional" in self._wanted:
            reading.values["directional"] = directional_sharpness(operator.objective, scale)
        if "critical_lr" in self._wanted:
            reading.values["critical_lr"] = critical_learning_rate(operator.objective, scale)

    def _ends(self, reading: Reading, operator: HessianOperator) -> None:
        ends = [name for name in ("lambda_max", "lambda_min") if name in self._wanted]
        if not ends:
            return
        which: Which = "both" if len(ends) == 2 else ("largest" if ends[0] == "lambda_max" else "smallest")
        pairs = self._solve(operator, which=which)
        for name in ends:
            reading.values[name] = eigenvalue_estimate(pairs, 0 if name == "lambda_max" else -1, unit=UNIT)

    def _twin(self, checkpoint: Mapping[str, Any]) -> tuple[torch.optim.Optimizer | None, bool]:
        """The optimizer on the borrowed parameters, and whether its learning rate means something."""
        if self._optimizer is None:
            return None, False
        saved = _optimizer_state(checkpoint)
        names = self._held(saved)
        borrowed = named_parameters(self.model)
        twin = twin_optimizer(
            self._optimizer,
            {name: self._originals[name] for name in names},
            {name: borrowed[name] for name in names},
        )
        twin.state.clear()  # what the user's has there belongs to other weights
        if saved is None:
            return twin, not isinstance(self._optimizer, str)
        try:
            twin.load_state_dict(saved)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the optimizer's state in the checkpoint does not fit the {type(twin).__name__}: {error}. Pass an "
                "optimizer with the groups that it was saved with."
            ) from error
        return twin, True

    def _held(self, saved: Mapping[str, Any] | None) -> list[str]:
        """Names of the parameters that the optimizer was given: trainable ones, or all if the state is of so many."""
        if isinstance(self._optimizer, torch.optim.Optimizer):
            own = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        else:
            own = {id(p) for p in self._originals.values()} if _num_held(saved) == len(self._originals) else set()
        return [name for name, p in self._originals.items() if p.requires_grad or id(p) in own]


def _num_held(saved: Mapping[str, Any] | None) -> int | None:
    try:
        return None if saved is None else sum(len(group["params"]) for group in saved["param_groups"])
    except (KeyError, TypeError):
        return None  # loading it will say what is wrong


def _optimizer_state(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    for key in OPTIMIZER_KEYS:
        found = checkpoint.get(key)
        if isinstance(found, (list, tuple)) and found:
            found = found[0]
        if isinstance(found, dict) and "param_groups" in found:
            return found
    return None


def _limits(optimizer: torch.optim.Optimizer, wanted: Sequence[Quantity]) -> dict[str, float]:
    """Where the quantities reach the edge of stability at the optimizer's learning rate, as far as that is known."""
    try:
        rule = recurrence(optimizer)
    except InvalidArgumentError:  # an optimizer without a threshold; the quantities themselves do not need one
        return {}
    if not rule.lr > 0:
        return {}
    limits: dict[str, float] = {}
    edge, plateau = threshold(rule).value, batch_threshold(rule).value
    if edge is not None:
        if not rule.preconditioned:
            # Coupled weight decay adds to every eigenvalue of the Hessian.
            limits["lambda_max.limit"] = edge / rule.lr - rule.coupled_decay
        if not (rule.preconditioned and rule.coupled_decay):  # there it adds the decay over P, unknown here
            limits["preconditioned.limit"] = edge / rule.lr - rule.coupled_decay
    if plateau is not None:
        limits["batch.limit"] = plateau / rule.lr
    return {name: limit for name, limit in limits.items() if name.removesuffix(".limit") in wanted}
