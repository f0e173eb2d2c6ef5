"""The trainings of a paired probe, and what a recommendation becomes by it: :func:`probe_beta2`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.pilot.optimizers import OptimizerLike, twin_optimizer
from dyntune.pilot.twin import CostMeter, Training
from dyntune.records import Estimate, Recommendation, Status
from dyntune.suggest.beta2_probe import CLOSE, SEEDS, Plan, Verdict, candidates, judge_probe, named, plan_probe
from dyntune.suggest.sweep_training import PairedTraining

__all__ = ["PROBE_NAME", "Altered", "probe_beta2", "train_probe"]

PROBE_NAME = "paired probe"


def probe_beta2(
    found: Recommendation,
    objective: Objective,
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    training: Training,
    *,
    probe: int,
    rate: float,
    group: Mapping[str, Any],
    fresh: bool,
    seed: int,
    meter: CostMeter,
    tell: Callable[[float], None] | None = None,
) -> Recommendation:
    """What a recommendation becomes when its value is trained with beside others.

    Args:
        found: For the first parameter group; its value is what the others are compared with.
        objective: The user's loss; nothing may be measured with it meanwhile.
        loss_fn: What it was made with.
        criterion: Likewise.
        training: How steps are made.
        probe: Budget in gradient-equivalents.
        rate: Learning rate of the first group.
        group: Settings of the first group. Groups with the same factor share what is tried, others keep theirs.
        fresh: Whether the optimizer has no state yet.
        seed: Of orders and dropout.
        meter: Where costs go.
        tell: Called with what was spent, after every training.

    Returns:
        The recommendation with the differences in its evidence. Its value is another one where the probe's interval
        says so; the range is then half to twice its memory, within the bounds, and the status UNCERTAIN: a probe of
        part of a training has not been judged against whole ones.
    """
    if found.value is None:
        return found
    betas = group.get("betas")
    tied = betas is not None and betas[0] == betas[1]
    present = float(group["alpha"] if betas is None else betas[1])
    low = 0.0 if tied else _number(found.evidence.get("lowest for beta1"), 0.0)
    high = _number(found.evidence.get("highest for the length of training"), 1.0)
    factors = candidates(float(found.value), present=present, low=low, high=high)
    plan = plan_probe(factors, probe=probe, accumulate=training.accumulate)
    if len(plan.arms) < 2:
        said = plan.merged or f"{named(factors[0])} is the only candidate within the bounds"
        wanted = "" if plan.needed is None else f"; a probe of {plan.needed} would tell two of them apart"
        return replace(found, checks=(*found.checks, f"no probe was trained: {said}{wanted}"))
    losses, initial = train_probe(
        objective,
        loss_fn,
        criterion,
        training,
        plan,
        change=lambda optimizer, factor: _change(optimizer, present, factor, tied=tied),
        lr=rate,
        fresh=fresh,
        seed=seed,
        meter=meter,
        tell=tell,
    )
    proposed = next(arm.factor for arm in plan.arms if factors[0] in arm.stands_for)
    verdict = judge_probe(losses, proposed=proposed, initial=initial)
    return _decided(found, plan, verdict, proposed, (low, high), rate, cost=meter.spent)


def _decided(
    found: Recommendation,
    plan: Plan,
    verdict: Verdict,
    proposed: float,
    bounds: tuple[float, float],
    rate: float,
    *,
    cost: float,
) -> Recommendation:
    """The recommendation with what the probe found."""
    tried: dict[str, Estimate | float | str | None] = {
        f"probe: loss at {named(factor)} less that at {named(proposed)}": difference
        for factor, difference in verdict.differences.items()
    }
    how = f"{SEEDS} orders of the batches, {plan.steps} steps each at {rate:.2e}"
    checks = [f"{verdict.said} ({how})", *([plan.merged] if plan.merged else [])]
    if verdict.value is None:
        return replace(
            found, evidence={**found.evidence, **tried}, checks=(*found.checks, *checks), cost=found.cost + cost
        )
    value = verdict.value
    return replace(
        found,
        value=value,
        low=max(bounds[0], 1 - CLOSE * (1 - value)),
        high=min(bounds[1], 1 - (1 - value) / CLOSE),
        status=Status.UNCERTAIN,
        reason=f"{verdict.said}, in {how}; a whole training may end otherwise",
        evidence={**found.evidence, **tried, "active bound": PROBE_NAME, "without the probe": found.value},
        checks=(*found.checks, *checks),
        cost=found.cost + cost,
    )


def _number(value: object, default: float) -> float:
    return value if isinstance(value, float) else default


def _change(optimizer: torch.optim.Optimizer, present: float, factor: float, *, tied: bool) -> None:
    """Give the groups that have the present factor another one."""
    for group in optimizer.param_groups:
        if "betas" in group and group["betas"][1] == present:
            group["betas"] = (factor if tied else group["betas"][0], factor)
        elif group.get("alpha") == present:
            group["alpha"] = factor


class Altered:
    """The user's optimizer on other tensors, with settings of its groups changed.

    A function ``params -> Optimizer``, as :func:`dyntune.suggest_lr` takes them.

    Args:
        optimizer: A name, an Optimizer on the originals, or a factory.
        originals: The model's trainable parameters by name.
        change: Changes the groups of an optimizer, in place.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
        originals: Mapping[str, nn.Parameter],
        change: Callable[[torch.optim.Optimizer], None],
    ) -> None:
        self.optimizer, self.originals, self.change = optimizer, originals, change

    def __call__(self, params: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """An optimizer of `params`, which stand for the originals in their order."""
        made = twin_optimizer(self.optimizer, self.originals, dict(zip(self.originals, params, strict=True)))
        self.change(made)
        return made


def train_probe(
    objective: Objective,
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    training: Training,
    plan: Plan,
    *,
    change: Callable[[torch.optim.Optimizer, float], None],
    lr: float,
    fresh: bool,
    seed: int,
    meter: CostMeter,
    tell: Callable[[float], None] | None = None,
) -> tuple[dict[float, list[float]], float]:
    """Train each arm with each seed; the last losses by factor, and the loss before training.

    Every arm begins at the model's present parameters and its optimizer's present state, and sees the same batches in
    the same order with the same dropout; seeds differ in both. At a constant rate; an optimizer without a state warms
    up as the usual one with the longest memory would (Ma and Yarats 2019, arXiv:1910.04209: ``2 / (1 - beta2)`` steps),
    for at most a tenth of the steps, and for as long in every arm.

    Args:
        objective: The user's loss; nothing may be measured with it meanwhile.
        loss_fn: What it was made with.
        criterion: Likewise.
        training: How steps are made.
        plan: Of two arms or more.
        change: Gives an optimizer a factor, in place.
        lr: Of the first group.
        fresh: Whether the optimizer has no state yet.
        seed: Of orders and dropout.
        meter: Where costs go.
        tell: Called with what was spent, after every training.

    Raises:
        NonFiniteError: A batch whose loss is not finite before training.
    """
    longest = max(arm.factor for arm in plan.arms)
    warmup = min(round(2 / (1 - longest)), plan.steps // 10) if fresh else 0
    batches = objective.batches[: plan.steps * training.accumulate]  # no training sees more
    paired = PairedTraining(
        objective.on(batches),
        loss_fn,
        criterion,
        training,
        num_steps=plan.steps,
        warmup_steps=warmup,
        schedule="constant",
        seed=seed,
    )
    meter.charge(paired.cost)
    losses: dict[float, list[float]] = {arm.factor: [] for arm in plan.arms}
    for index in range(SEEDS):
        for factor, found in losses.items():
            paired.training = _with(training, objective.parameters, change, factor)
            result = paired(lr, index)
            found.append(float(result["loss"]))
            meter.charge(float(result["cost"]))
            if tell is not None:
                tell(meter.spent)
    return losses, paired.initial


def _with(
    training: Training,
    originals: Mapping[str, nn.Parameter],
    change: Callable[[torch.optim.Optimizer, float], None],
    factor: float,
) -> Training:
    return replace(
        training, optimizer=Altered(training.optimizer, originals, lambda optimizer: change(optimizer, factor))
    )
