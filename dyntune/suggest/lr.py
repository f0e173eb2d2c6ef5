"""A learning rate from a short pilot: :func:`suggest_lr`."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.pilot.optimizers import OptimizerLike
from dyntune.pilot.probe import MIN_GRADIENTS, Pilot, go_on, run_pilot
from dyntune.pilot.twin import FORWARD_COST, CostMeter, Training, Twin
from dyntune.records import Recommendation
from dyntune.suggest.lr_rule import LREvidence, lr_rule
from dyntune.suggest.progress import ProgressLike, Reporter, reporting

__all__ = ["num_drawn", "suggest_lr"]


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
    method: Literal["auto", "forward", "sweep"] = "auto",
    max_gradients: int = 200,
    workers: int = 0,
    storage: Any = None,
    seed: int = 0,
    progress: ProgressLike = None,
    strict: bool = False,
) -> Recommendation:
    """Suggest a peak learning rate, with a range, the evidence behind it and the largest stable rate.

    A pilot trains *twins* (cloned parameters, an optimizer rebuilt from the user's type, groups and state): a ramp
    that stops at its own blow-up, four short runs below it, a factor four apart, and the best of them for longer. The
    value blends where the short runs' loss is lowest with the one-step critical rate, by weights fitted to brute-force
    sweeps; at most half of what blew up. First gradients only: no product with a Hessian, so that fused attention and
    any other kernel will do. The pure rule is ``dyntune.suggest.lr_rule.lr_rule``.

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
        autocast: Dtype of mixed precision in training, such as ``torch.bfloat16``.
        method: ``"auto"``: the pilot. ``"forward"``: the same, since the pilot needs no double backward; kept as a
            promise that it stays so. ``"sweep"``: real trainings of `num_steps` steps, see
            :func:`dyntune.suggest.lr_sweep.sweep_lr`; orders of magnitude dearer, and the only one that sees what
            happens late in training.
        max_gradients: Budget of the pilot in gradient-equivalents: one forward and backward pass on a training batch,
            at least 60 times `accumulate`.
        workers: Processes of a sweep; 0 for this one.
        storage: Where a sweep keeps its trainings, so that a killed one goes on; see ``sweep_lr``.
        seed: Seed of dropout.
        progress: None: a bar with the best guess so far, on a terminal or in a notebook, once a second is over. False:
            never; True: always. A function: called with (stage, gradient-equivalents spent, best guess or None).
        strict: Raise when the status is not OK; the error carries the recommendation as ``partial``.

    Returns:
        The recommendation; ``max_stable`` is an :class:`Estimate`, ``warmup_steps`` what the runs used or more. The
        range is for the rate with the lowest training loss, that of ``max_stable`` for the rate at which training
        begins to fail, both at the level at which they covered it on 70 small workloads of families that they were not
        fitted to (docs: results, learning rates).

    Raises:
        InvalidArgumentError: A budget too small, or an optimizer without a stability threshold.
        OptimizerMismatchError: The optimizer holds other parameters than the model.
        DyntuneError: As :func:`dyntune.hessian`.
        RefusedError, NotConvergedError: With ``strict=True``.

    Cost:
        At most `max_gradients`; memory of two twins (parameters and optimizer state) and one batch's graph.
    Assumes:
        The first steps speak for the training to come: an instability that comes after hundreds of steps is not seen.
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
    if method == "sweep":
        if num_steps is None:
            raise InvalidArgumentError(
                'method="sweep" trains for real, and num_steps says how long: give the length of the training to come.'
            )
        from dyntune.suggest.lr_sweep import sweep_lr, usual_cost  # it begins with a pilot of its own

        with reporting(progress, limit=usual_cost(num_steps * accumulate)) as (meter, tell):
            return sweep_lr(
                model,
                batches,
                loss_fn,
                criterion=criterion,
                optimizer=optimizer,
                num_steps=num_steps,
                schedule=cast("Any", schedule),  # checked there
                clip_norm=clip_norm,
                accumulate=accumulate,
                autocast=autocast,
                workers=workers,
                storage=storage,
                seed=seed,
                progress=None if tell is None else _moving(meter, tell),
                strict=strict,
            )
    if method not in ("auto", "forward"):
        raise InvalidArgumentError(f"method={method!r}: 'auto', 'forward' or 'sweep'.")
    training = _training(optimizer, clip_norm=clip_norm, accumulate=accumulate, autocast=autocast)
    if num_steps is not None and num_steps < 1:
        raise InvalidArgumentError(f"num_steps={num_steps}: the length of the training is a positive number of steps.")
    if max_gradients < MIN_GRADIENTS * accumulate:
        raise InvalidArgumentError(
            f"max_gradients={max_gradients} leaves no room for a pilot (accumulate={accumulate}): give at least "
            f"{MIN_GRADIENTS * accumulate}."
        )
    # One batch is checked beforehand: the others come up in training, where a loss that is not finite counts as a
    # blow-up.
    objective = Objective(
        model,
        batches,
        loss_fn,
        criterion=criterion,
        num_batches=num_drawn(max_gradients),
        num_checked=1,
        widen=False,  # a twin that trains in float32 says nothing about steps that are rounded to bfloat16
        seed=seed,
    )
    with reporting(progress, limit=max_gradients) as (meter, tell), objective.measuring() as buffers:
        meter.charge(FORWARD_COST)
        pilot, twin = run_pilot(objective, training, buffers, meter, seed=seed, progress=tell)
        if sum(pilot.gains) > 0:
            go_on(pilot, twin)
            if tell is not None:
                best = min(pilot.runs, key=lambda run: run.score)
                tell("going on at the best rate", meter.spent, None if best.diverged else best.lr)
        evidence = _evidence(pilot, twin, num_steps=num_steps, schedule=schedule)
    result = lr_rule(evidence, optimizer=pilot.recurrence)
    return result.require() if strict else result


def num_drawn(max_gradients: int) -> int:
    """Batches drawn from a loader: no run of the pilot sees one twice as long as the loader has fresh ones."""
    return max(16, max_gradients // 3)


def _moving(meter: CostMeter, tell: Reporter) -> Reporter:
    """Tells of a sweep's stages, and moves the bar along with them."""

    def told(stage: str, spent: float, best: float | None) -> None:
        meter.charge(spent - meter.spent)
        tell(stage, spent, best)

    return told


def _training(
    optimizer: OptimizerLike, *, clip_norm: float | None, accumulate: int, autocast: torch.dtype | None
) -> Training:
    if accumulate < 1:
        raise InvalidArgumentError(f"accumulate={accumulate}: a step averages at least one batch.")
    if clip_norm is not None and not clip_norm > 0:
        raise InvalidArgumentError(f"clip_norm={clip_norm}: gradients are clipped to a positive norm; None for none.")
    return Training(optimizer, clip_norm=clip_norm, accumulate=accumulate, autocast=autocast)


def _evidence(pilot: Pilot, twin: Twin, *, num_steps: int | None, schedule: str | None) -> LREvidence:
    """What the pilot found, in the rule's terms."""
    failed = [run.lr for run in pilot.runs if run.diverged]
    if pilot.ramp.blow_up is not None:
        failed.append(pilot.ramp.blow_up)
    betas = twin.optimizer.param_groups[0].get("betas")
    return LREvidence(
        rates=tuple(run.lr for run in pilot.runs),
        losses=tuple(run.score for run in pilot.runs),
        blow_up=min(failed, default=None),
        tried=max(pilot.ramp.lrs),
        critical=pilot.critical,
        initial=pilot.initial,
        gain_se=pilot.gain_se,
        typical_ratio=twin.typical_ratio,
        num_batches=len(twin.objective.batches),
        warmup=pilot.warmup,
        cost=twin.meter.spent,
        num_steps=num_steps,
        beta2=None if betas is None else float(betas[1]),
        verified=pilot.follow is None or not pilot.follow.diverged,
        checks=_checks(pilot, twin, num_steps, schedule),
        series=_series(pilot),
    )


def _checks(pilot: Pilot, twin: Twin, num_steps: int | None, schedule: str | None) -> tuple[str, ...]:
    follow = pilot.follow
    checks = [f"model measured in {twin.objective.mode} mode; loss: {twin.objective.rule.assumed}"]
    if follow is not None:
        verdict = "blew up" if follow.diverged else "did not blow up"
        checks.append(f"trained {twin.steps} steps at {follow.lr:.2e} after {pilot.warmup} of warm-up: {verdict}")
    if num_steps is not None and num_steps < twin.steps:
        checks.append(f"num_steps={num_steps} is shorter than the pilot: a higher rate may do better in so few steps")
    checks.append(f"value is a peak rate for schedule: {schedule or 'unknown'}")
    # benchmarks/lr/results/sweeps.json: best_val against best; 11 of these 15 lie lower.
    checks.append("value is for the training loss: on 15 of 120 workloads validation was best over an octave away")
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
