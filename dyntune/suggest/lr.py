"""A learning rate from a short pilot: :func:`suggest_lr`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from dyntune.curvature.eigenvalues import eigenvalues
from dyntune.curvature.sharpness import eigenvalue_estimate
from dyntune.errors import InvalidArgumentError
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.pilot.optimizers import OptimizerLike
from dyntune.pilot.probe import (
    MIN_GRADIENTS,
    SWEEP_FACTOR,
    Pilot,
    PilotOperator,
    go_on,
    measure_batches,
    run_pilot,
)
from dyntune.pilot.twin import FORWARD_COST, GRADIENT_COST, PRODUCT_COST, CostMeter, Training, Twin
from dyntune.records import Estimate, Recommendation
from dyntune.suggest.lr_rule import LREvidence, lr_rule

__all__ = ["suggest_lr"]

# Shares of max_gradients: the ramp takes 0.20, the short runs 0.36 (fewer when some blow up), going on 0.12, batch
# curvature 0.15, and lambda_max what is left, 0.1 or more: eight products, which see a lone eigenvalue.
FOLLOW_SHARE = 0.12
BATCH_SHARE = 0.15


def suggest_lr(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    criterion: Criterion | None = None,
    optimizer: OptimizerLike = "adamw",
    num_steps: int | None = None,
    schedule: str | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    max_gradients: int = 200,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
    strict: bool = False,
) -> Recommendation:
    """Suggest a peak learning rate, with a range, the evidence behind it and the largest stable rate.

    A pilot trains *twins* (cloned parameters, an optimizer rebuilt from the user's type, groups and state): a ramp
    that stops at its own blow-up, six short runs below it, and a longer one at the best rate. Where that leads,
    curvature is measured: of fresh batches along their own step (the stochastic threshold) and, as far as the budget
    goes, lambda_max (the deterministic threshold, an upper bound). The value blends short runs, blow-up, stochastic
    threshold and one-step critical rate by weights fitted to brute-force sweeps. The pure rule is
    ``dyntune.suggest.lr_rule.lr_rule``.

    The user's model, optimizer, gradients, buffers and random states are bit-identical afterwards.

    Args:
        model: As for :func:`dyntune.hessian`; measured in its present mode.
        batches: Training batches of the size that will be used: a loader, a list, or one batch (which cannot tell how
            noisy gradients are; the status says so).
        loss_fn: As for :func:`dyntune.hessian`.
        criterion: As for :func:`dyntune.hessian`.
        optimizer: ``"sgd"``, ``"momentum"``, ``"nesterov"``, ``"adam"``, ``"adamw"``, a torch SGD, Adam or AdamW on
            the model's parameters, or a function ``params -> Optimizer``. Ratios between the groups' learning rates
            are kept; the value is that of the first group.
        num_steps: Length of the training to come; sets the warm-up for Adam. The value itself does not depend on it.
        schedule: Recorded; the value is a peak rate for a schedule that decays.
        clip_norm: Gradient norm clipping, as in training.
        accumulate: Batches per optimizer step, as in training.
        autocast: Dtype of mixed precision in training, such as ``torch.bfloat16``; curvature is measured without.
        max_gradients: Budget in gradient-equivalents: one forward and backward pass on a training batch, at least
            60 times `accumulate`.
        seed: Seed of dropout and of the Lanczos start.
        progress: Called with (stage, gradient-equivalents spent).
        strict: Raise when the status is not OK; the error carries the recommendation as ``partial``.

    Returns:
        The recommendation; ``max_stable`` is an :class:`Estimate`, ``warmup_steps`` what the runs used or more. The
        range is for the rate with the lowest training loss, at the level at which it covered that on 70 small workloads
        of families that it was not fitted to; `max_stable` is not calibrated yet.

    Raises:
        InvalidArgumentError: A budget too small, or an optimizer without a stability threshold.
        OptimizerMismatchError: The optimizer holds other parameters than the model.
        DyntuneError: As :func:`dyntune.hessian`.
        RefusedError, NotConvergedError: With ``strict=True``.

    Cost:
        At most `max_gradients`; memory of two twins (parameters and optimizer state) and one batch's graph.
    Assumes:
        The first steps speak for the training to come. Curvature often grows later; the stochastic threshold after
        the pilot sees part of that, the short runs none.
    Source:
        See ``Recommendation.sources``.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> g = torch.Generator().manual_seed(0)
        >>> data = [(torch.randn(16, 4, generator=g), torch.randn(16, 1, generator=g)) for _ in range(8)]
        >>> rec = suggest_lr(model, data, criterion=torch.nn.MSELoss(), optimizer="sgd", max_gradients=100)
        >>> rec.knob, rec.cost <= 100
        ('learning rate', True)
    """
    training = _training(optimizer, clip_norm=clip_norm, accumulate=accumulate, autocast=autocast)
    if num_steps is not None and num_steps < 1:
        raise InvalidArgumentError(f"num_steps={num_steps}: the length of the training is a positive number of steps.")
    if max_gradients < MIN_GRADIENTS * accumulate:
        raise InvalidArgumentError(
            f"max_gradients={max_gradients} leaves no room for a pilot (accumulate={accumulate}): give at least "
            f"{MIN_GRADIENTS * accumulate}."
        )
    # No run of the pilot sees a batch twice as long as the loader has fresh ones. One batch is checked beforehand: the
    # others come up in training, where a loss that is not finite counts as a blow-up.
    objective = Objective(
        model,
        batches,
        loss_fn,
        criterion=criterion,
        num_batches=max(16, max_gradients // 3),
        num_checked=1,
        widen=False,  # a twin that trains in float32 says nothing about steps that are rounded to bfloat16
        seed=seed,
    )
    meter = CostMeter(max_gradients)
    meter.charge(FORWARD_COST)
    with objective.measuring() as buffers:
        pilot, twin = run_pilot(objective, training, buffers, meter, seed=seed, progress=progress)
        evidence = _evidence(pilot, twin, num_steps=num_steps, schedule=schedule, seed=seed, progress=progress)
    result = lr_rule(evidence, optimizer=pilot.recurrence)
    return result.require() if strict else result


def _training(
    optimizer: OptimizerLike, *, clip_norm: float | None, accumulate: int, autocast: torch.dtype | None
) -> Training:
    if accumulate < 1:
        raise InvalidArgumentError(f"accumulate={accumulate}: a step averages at least one batch.")
    if clip_norm is not None and not clip_norm > 0:
        raise InvalidArgumentError(f"clip_norm={clip_norm}: gradients are clipped to a positive norm; None for none.")
    return Training(optimizer, clip_norm=clip_norm, accumulate=accumulate, autocast=autocast)


def _evidence(
    pilot: Pilot,
    twin: Twin,
    *,
    num_steps: int | None,
    schedule: str | None,
    seed: int,
    progress: Callable[[str, float], None] | None,
) -> LREvidence:
    """Go on from the best short run, and measure curvature where that leads, within the budget."""
    meter, per_step = twin.meter, twin.training.accumulate
    gain, gain_se = _gain(pilot)
    improved = gain > 0
    verified = False
    curvatures: list[float] = []
    lambda_max: Estimate | None = None
    if improved:
        steps = max(2, int(FOLLOW_SHARE * meter.limit / per_step))
        twin = go_on(pilot, twin, steps=min(steps, int(meter.left / per_step)))
        if progress is not None:
            progress("going on at the best rate", meter.spent)
        verified = pilot.follow is not None and not pilot.follow.diverged
        if verified:
            curvatures = measure_batches(twin, count=_batch_count(twin))
            lambda_max = _lambda_max(twin, seed=seed)
        if progress is not None:
            progress("curvature", meter.spent)
    best = min(pilot.runs, key=lambda run: run.score)
    failed = [run.lr for run in pilot.runs if run.diverged]
    if pilot.ramp.blow_up is not None:
        failed.append(pilot.ramp.blow_up)
    finite = [c for c in curvatures if math.isfinite(c)]
    spread = float(np.std(finite, ddof=1) / math.sqrt(len(finite))) if len(finite) > 1 else None
    betas = twin.optimizer.param_groups[0].get("betas")
    return LREvidence(
        pick=best.lr if improved and not best.diverged else None,
        verified=verified,
        spacing=SWEEP_FACTOR,
        blow_up=min(failed, default=None),
        batch_curvature=float(np.mean(finite)) if finite else None,
        batch_curvature_se=spread,
        lambda_max=lambda_max,
        critical=pilot.critical,
        initial=pilot.initial,
        reached=best.score,
        gain_se=gain_se,
        num_batches=len(twin.objective.batches),
        warmup=pilot.warmup,
        cost=meter.spent,
        num_steps=num_steps,
        beta2=None if betas is None else float(betas[1]),
        checks=_checks(pilot, twin, num_steps, schedule),
        series=_series(pilot),
    )


def _gain(pilot: Pilot) -> tuple[float, float]:
    """How much the best short run lowered the loss, batch by batch: mean and standard error (-inf if all diverged)."""
    if not pilot.gains:
        return -math.inf, 0.0
    error = float(np.std(pilot.gains, ddof=1)) / math.sqrt(len(pilot.gains)) if len(pilot.gains) > 1 else 0.0
    return float(np.mean(pilot.gains)), error


def _batch_count(twin: Twin) -> int:
    """How many batches the curvature is averaged over: 0.15 of the budget, each batch once."""
    meter = twin.meter
    affordable = min(BATCH_SHARE * meter.limit, meter.left) / (GRADIENT_COST + PRODUCT_COST)
    return min(int(affordable), len(twin.objective.batches))


def _lambda_max(twin: Twin, *, seed: int) -> Estimate | None:
    """lambda_max of one batch with what is left of the budget; None where that is fewer than four products."""
    products = int((twin.meter.left - GRADIENT_COST) / PRODUCT_COST)
    if products < 4:
        return None
    operator = PilotOperator(twin, twin.steps % len(twin.objective.batches))
    found = eigenvalues(operator, max_products=products, seed=seed)
    unit = "1 / learning rate" if operator.scaled else "loss / parameter^2"
    return eigenvalue_estimate(found, 0, unit=unit)


def _checks(pilot: Pilot, twin: Twin, num_steps: int | None, schedule: str | None) -> tuple[str, ...]:
    follow = pilot.follow
    checks = [f"model measured in {twin.objective.mode} mode; loss: {twin.objective.rule.assumed}"]
    if follow is not None:
        verdict = "blew up" if follow.diverged else "did not blow up"
        checks.append(f"trained {twin.steps} steps at {follow.lr:.2e} after {pilot.warmup} of warm-up: {verdict}")
    if num_steps is not None and num_steps < twin.steps:
        checks.append(f"num_steps={num_steps} is shorter than the pilot: a higher rate may do better in so few steps")
    checks.append(f"value is a peak rate for schedule: {schedule or 'unknown'}")
    return tuple(checks)


def _series(pilot: Pilot) -> dict[str, tuple[float, ...]]:
    done = [run for run in pilot.runs if not run.diverged]
    return {
        "ramp_lr": pilot.ramp.lrs,
        "ramp_loss": pilot.ramp.losses,
        "run_lr": tuple(run.lr for run in done),
        "run_loss": tuple(run.score for run in done),
        "failed_lr": tuple(run.lr for run in pilot.runs if run.diverged),
    }
