"""One pilot: bracket by a ramp, compare learning rates by short runs, go on at the best one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dyntune.errors import InvalidArgumentError
from dyntune.objective.objective import Objective
from dyntune.objective.state import BorrowedBuffers
from dyntune.pilot.runs import InitialLosses, Ramp, ShortRun, critical_lr, ramp, short_run, tail_length
from dyntune.pilot.twin import FORWARD_COST, GRADIENT_COST, CostMeter, Training, Twin
from dyntune.stability.thresholds import Recurrence, batch_threshold, recurrence

__all__ = ["MIN_GRADIENTS", "NOISE", "Pilot", "go_on", "run_pilot"]

# Fewest gradient-equivalents with which every part of the pilot still has two steps.
MIN_GRADIENTS = 60
# Learning rates compared by short runs, and their spacing; the first lies one spacing below the blow-up of the ramp, so
# they reach down to 1/256 of it. The best learning rate lies between 1.6 and 50 times below the onset of instability on
# nine workloads of 250 to 400 steps, and a ramp overshoots the onset because it spends only a step or two at each rate.
# Few long runs beat many short ones: cross-validated regret on the tune half of benchmarks/lr 0.033 with 4 runs of 36
# steps a factor 4 apart, 0.032 with 6 of 24 a factor 3 apart, 0.040 with 8 of 18 a factor 2 apart, 0.043 with 6 of 12
# and curvature for the rest of the budget; 4 are the steadiest from pilot to pilot (decision 0008).
SWEEP_COUNT = 4
SWEEP_FACTOR = 4.0
# Shares of the budget: of the ramp (at 0.10 its steps are too coarse: regret 0.043 instead of 0.033), and of going on
# at the best; the short runs take what lies between. A step costs a gradient, and the first run that comes so far also
# a forward pass: the loss before training, which blow-ups are compared with.
RAMP_SHARE = 0.16
FOLLOW_SHARE = 0.08
# Standard errors within which a change of the loss is noise (95%).
NOISE = 2.0
# The ramp covers this many octaves from far below the one-step critical rate.
RAMP_OCTAVES = 16
RAMP_BELOW_CRITICAL = 2.0**-12


@dataclass
class Pilot:
    """What a pilot found. Learning rates are those of the first parameter group.

    Args:
        recurrence: Momentum and weight decay of the optimizer.
        critical: One-step critical learning rate at the start, along the preconditioned gradient.
        ramp: The range test.
        runs: The short runs, by ascending learning rate.
        losses_before: Losses before training, by step.
        initial: Mean loss before training over the batches that the short runs end on.
        gains: How much the best short run lowered the loss on each of those batches, paired.
        follow: The run that went on from the best short run.
        warmup: Warm-up steps of the short runs.
    """

    recurrence: Recurrence
    critical: float
    ramp: Ramp
    runs: list[ShortRun]
    losses_before: InitialLosses
    initial: float
    gains: tuple[float, ...]
    warmup: int
    follow: ShortRun | None = None

    @property
    def gain_se(self) -> float:
        """Standard error of the mean of `gains`; 0 for fewer than two."""
        count = len(self.gains)
        return float(np.std(self.gains, ddof=1)) / math.sqrt(count) if count > 1 else 0.0


def run_pilot(
    objective: Objective,
    training: Training,
    buffers: BorrowedBuffers,
    meter: CostMeter,
    *,
    seed: int,
    progress: Callable[[str, float, float | None], None] | None = None,
) -> tuple[Pilot, Twin]:
    """The ramp and the short runs, and the twin where the best of them ended.

    Args:
        objective: The user's loss.
        training: How the user trains.
        buffers: Of the enclosing ``objective.measuring()``.
        meter: Budget; FOLLOW_SHARE of it is left for :func:`go_on`.
        seed: Seed of dropout in the pilot's steps.
        progress: Called with (stage, gradient-equivalents spent, best learning rate so far or None).

    Raises:
        InvalidArgumentError: A budget below :data:`MIN_GRADIENTS` per accumulated batch; an optimizer without a
            stability threshold.
    """
    per_step = training.accumulate
    if meter.limit < MIN_GRADIENTS * per_step:
        raise InvalidArgumentError(
            f"max_gradients={meter.limit:g} leaves no room for a pilot (accumulate={per_step}): give at least "
            f"{MIN_GRADIENTS * per_step}."
        )

    def tell(stage: str, guess: float | None = None) -> None:
        if progress is not None:
            progress(stage, meter.spent, guess)

    scout = Twin(objective, training, buffers, meter, seed=seed)
    if (limit := batch_threshold(scout.optimizer)).value is None:
        raise InvalidArgumentError(
            f"{limit.reason}: a learning rate for {type(scout.optimizer).__name__} cannot be checked for stability. "
            "Use a sweep."
        )
    critical = _critical(scout)
    tell("one-step critical learning rate")
    steps = max(8, int(RAMP_SHARE * meter.limit / per_step))
    start = critical * RAMP_BELOW_CRITICAL
    initial = InitialLosses(Twin(objective, training, buffers, meter, seed=seed))
    found = ramp(scout, np.geomspace(start, start * 2.0**RAMP_OCTAVES, steps).tolist(), initial)
    del scout
    tell("range test")
    length = max(3, int((meter.left - FOLLOW_SHARE * meter.limit) / per_step / (SWEEP_COUNT + FORWARD_COST)))
    warmup = length // 4
    before = [initial.of(step) for step in range(length - tail_length(length), length)]
    top = (found.blow_up or found.lrs[-1]) / SWEEP_FACTOR
    runs: list[ShortRun] = []
    best: tuple[ShortRun, Twin] | None = None
    # Runs that blow up early leave their budget: it goes to lower rates, as long as the lowest one is the best.
    while len(runs) < SWEEP_COUNT or (best is not None and (best[0].diverged or best[0] is runs[-1])):
        if len(runs) >= SWEEP_COUNT and meter.left < length * per_step * (GRADIENT_COST + FORWARD_COST):
            break
        twin = Twin(objective, training, buffers, meter, seed=seed)
        run = short_run(twin, top / SWEEP_FACTOR ** len(runs), steps=length, warmup=warmup, initial=initial)
        runs.append(run)
        if best is None or run.score < best[0].score:
            best = (run, twin)
        tell(f"short run at {run.lr:.1e}", None if best[0].diverged else best[0].lr)
    assert best is not None
    runs.reverse()
    gains = () if best[0].diverged else tuple(np.subtract(before, best[0].losses[-len(before) :]).tolist())
    known = recurrence(best[1].optimizer)
    return Pilot(known, critical, found, runs, initial, float(np.mean(before)), gains, warmup), best[1]


def _critical(twin: Twin) -> float:
    """One-step critical learning rate along the direction that the optimizer would take first."""
    _, gradient = twin.gradient(0)
    if recurrence(twin.optimizer).preconditioned and not twin.stepped:
        # At the first step Adam's second moment is g^2, its direction the sign of the gradient.
        direction = [g.sign() for g in gradient]
    else:
        scale = twin.preconditioner()
        direction = gradient if scale is None else [g / s for g, s in zip(gradient, scale, strict=True)]
    size = max(float(d.abs().max()) for d in direction)
    weight = max(float(p.detach().abs().max()) for p in twin.tensors)
    # A step of one percent of the largest weight: only where the doubling begins, the answer does not depend on it.
    guess = 0.01 * (weight or 1.0) / size if size > 0 and math.isfinite(size) else 1.0
    found = critical_lr(twin, 0, direction, guess=guess)
    return found if 0 < found < math.inf else guess


def go_on(pilot: Pilot, twin: Twin) -> None:
    """Train on at the best short run's rate with what is left of the budget: ``pilot.follow``, None if nothing is left.

    A short run cannot see an instability that comes later, when curvature has grown: a rate that fails here is marked
    as diverged in ``pilot.runs``. It fails when it blows up, and when it loses half of what the best short run had
    gained, as a network does whose units die (an end above the midpoint of initial and best loss is a failure in
    benchmarks/lr, too).
    """
    steps = int(twin.meter.left / twin.training.accumulate / (GRADIENT_COST + FORWARD_COST))
    if steps < 1:
        return
    best = min(pilot.runs, key=lambda run: run.score)
    # Half of a gain that is within the noise between batches is nothing that could be lost.
    told = pilot.initial - best.score > NOISE * pilot.gain_se
    midpoint = (pilot.initial + best.score) / 2 if told else math.inf
    run = short_run(twin, best.lr, steps=steps, warmup=0, initial=pilot.losses_before)
    pilot.follow = run if run.score <= midpoint else ShortRun(run.lr, run.losses, diverged=True)
    if pilot.follow.diverged:
        pilot.runs[pilot.runs.index(best)] = ShortRun(best.lr, best.losses + run.losses, diverged=True)
