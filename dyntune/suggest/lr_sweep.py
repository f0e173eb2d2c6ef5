"""A learning rate from real trainings: :func:`sweep_lr`, the thorough method of :func:`dyntune.suggest_lr`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.pilot.optimizers import OptimizerLike
from dyntune.pilot.twin import FORWARD_COST, Training
from dyntune.records import Estimate, Recommendation, Status
from dyntune.suggest.lr import suggest_lr
from dyntune.suggest.progress import Reporter
from dyntune.suggest.sweep_search import LEVEL, SweepFound, SweepSearch
from dyntune.suggest.sweep_training import Decay, PairedTraining
from dyntune.trials.outcome import Outcome
from dyntune.trials.trials import Trials

__all__ = ["sweep_lr", "usual_cost"]

# Gradient-equivalents of the suggestion that the search begins at; off by octaves, it costs two trainings more.
START_BUDGET = 100
DEFAULT_START = 1e-3  # where there is no suggestion: what torch.optim's SGD and Adam default to
FEWEST_STEPS = 10  # fewer, and a tail of a twentieth, a warm-up of a tenth and a blow-up are all the same step
UNIT = "learning rate"
SEEDS = 3

RULE = (
    "minimum of a cubic in log2 of the rate through the final losses of paired trainings that did not fail, 1.5 "
    "octaves either side of the grid's best; where there is none, the grid's best"
)
SOURCES = (
    "log-bisection by paired short runs; interval: profile likelihood of the minimum (Fieller 1954, J. R. Stat. Soc. B "
    "16(2), with a cubic term)",
    "failure: blow-up, or an end above the midpoint of initial and best loss (benchmarks/lr/metrics.py)",
)


def sweep_lr(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    criterion: Criterion | None = None,
    optimizer: OptimizerLike = "adamw",
    num_steps: int,
    schedule: Decay | None = None,
    warmup_steps: int | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    start: float | None = None,
    seeds: int = SEEDS,
    onset_factor: float = math.sqrt(2),
    workers: int = 0,
    storage: Any = None,
    seed: int = 0,
    progress: Reporter | None = None,
    strict: bool = False,
) -> Recommendation:
    """Suggest a peak learning rate by training at many: best rate and onset of failure, each to a factor sqrt(2).

    Every rate trains twins of the model for `num_steps` steps, as the user trains, on the same batches in the same
    order with the same dropout, `seeds` times; so differences between rates are known far better than the losses
    themselves. A search by factors of 4, 2 and sqrt(2) finds the best, a curve through the survivors around it the
    optimum with its interval, a bisection the onset of failure. Nothing of the user's moves, as in ``suggest_lr``.

    Args:
        model: As for :func:`dyntune.suggest_lr`.
        batches: Batches of the size that will be used; of a loader, as many as the steps take.
        loss_fn: As for :func:`dyntune.hessian`.
        criterion: As for :func:`dyntune.hessian`.
        optimizer: As for :func:`dyntune.suggest_lr`; any other torch optimizer by instance or factory, too.
        num_steps: Length of the training, at least 10: the whole of it, or a shorter one, whose best rate is often
            higher.
        schedule: ``"constant"`` (what None means), ``"linear"`` or ``"cosine"``: the decay to zero after the warm-up.
        warmup_steps: Linear warm-up; None: none for SGD, for optimizers with betas ``2 / (1 - beta2)`` steps (Ma and
            Yarats, arXiv:1910.04209), at most a tenth of `num_steps`.
        clip_norm: Gradient norm clipping, as in training.
        accumulate: Batches per optimizer step, as in training.
        autocast: Dtype of mixed precision in training.
        start: Where to begin; None asks ``suggest_lr``, at a cost of up to 100 per accumulated batch.
        seeds: Trainings per rate near the best. They differ in the order of batches and in dropout, not in the initial
            weights, which are the model's.
        onset_factor: How closely the onset of failure is bracketed, > 1.
        workers: Processes on this machine; 0 trains in this one. Model, batches, loss and optimizer have to be
            picklable. The result is the same bits where this process computes with one thread.
        storage: Path of an Optuna journal file, or an Optuna storage: a killed sweep goes on where it stopped, and
            machines share one. Trainings of other parameters, batches or settings in it do not count; a change of the
            model's code under the same parameters is not seen.
        seed: Seed of all orders and masks.
        progress: Called with (stage, gradient-equivalents spent, best rate so far or None).
        strict: Raise when the status is not OK; the error carries the recommendation as ``partial``.

    Returns:
        The recommendation. The range is for the minimum of the mean final training loss over orders and dropout, at
        95%: in simulations of the whole search on asymmetric curves it covered 283 to 300 of 300
        (``tests/suggest/test_sweep_search.py``). ``max_stable`` lies between the highest rate seen to survive and the
        lowest at which at least half of the seeds failed. Statuses other than OK: UNCERTAIN where the best is at an
        end, the curve has no minimum or the interval no end, or trainings raised or were lost; ONE_BATCH; REFUSED
        where no rate lowered the loss.

    Raises:
        InvalidArgumentError: An argument out of range, or something that cannot be sent to another process.
        MissingDependencyError: `storage` without Optuna.
        NonFiniteError: A batch whose loss is not finite before training.
        RefusedError, NotConvergedError: With ``strict=True``.
        DyntuneError: As :func:`dyntune.suggest_lr`.

    Cost:
        About ``7 seeds + 6`` trainings of ``accumulate * num_steps`` gradient-equivalents, those that blow up less, and
        up to 8 more for the end of each. Memory of one twin per process.
    Assumes:
        Failure is monotone in the rate. Near its minimum the mean loss is a cubic in log2 of the rate, up to an error
        that the fit sees; seeds are independent.
    Source:
        See ``Recommendation.sources``.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> g = torch.Generator().manual_seed(0)
        >>> data = [(torch.randn(16, 4, generator=g), torch.randn(16, 1, generator=g)) for _ in range(8)]
        >>> rec = sweep_lr(model, data, criterion=torch.nn.MSELoss(), optimizer="sgd", num_steps=20, start=0.1, seeds=2)
        >>> rec.knob, rec.low < rec.value < rec.high < rec.max_stable.high
        ('learning rate', True)
    """
    _check(num_steps=num_steps, schedule=schedule, warmup_steps=warmup_steps, start=start, seeds=seeds)
    if not onset_factor > 1:
        raise InvalidArgumentError(f"onset_factor={onset_factor}: the bracket's ends differ by a factor above 1.")
    if accumulate < 1:
        raise InvalidArgumentError(f"accumulate={accumulate}: a step averages at least one batch.")
    if clip_norm is not None and not clip_norm > 0:
        raise InvalidArgumentError(f"clip_norm={clip_norm}: gradients are clipped to a positive norm; None for none.")
    objective = Objective(
        model,
        batches,
        loss_fn,
        criterion=criterion,
        num_batches=num_steps * accumulate,
        num_checked=1,
        widen=False,
        seed=seed,
    )
    training = PairedTraining(
        objective,
        loss_fn,
        criterion,
        Training(optimizer, clip_norm=clip_norm, accumulate=accumulate, autocast=autocast),
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        schedule=schedule or "constant",
        seed=seed,
    )
    spent = FORWARD_COST + training.cost
    checks = [f"model trained in {objective.mode} mode; loss: {objective.rule.assumed}"]
    name = f"dyntune learning rate {training.digest}"
    # Before the start is looked for: what cannot be sent or stored is heard of at once.
    with Trials(training, workers=workers, storage=storage, name=name) as trials:
        if start is None:
            start, cost, how = _start(
                model,
                list(objective.batches),
                loss_fn,
                criterion=criterion,
                optimizer=optimizer,
                clip_norm=clip_norm,
                accumulate=accumulate,
                autocast=autocast,
                seed=seed,
            )
            spent += cost
            checks.append(how)
        ask = _Asking(trials, spent=spent, progress=progress)
        found = SweepSearch(ask, initial=training.initial, seeds=seeds, onset_factor=onset_factor).run(start)
    checks.append(
        f"{len(ask.outcomes)} trainings of {num_steps} steps on {len(objective.batches)} batches, "
        f"{training.warmup_steps} of warm-up, schedule {training.schedule}, {seeds} orders of the batches"
    )
    result = _recommendation(found, training, ask, checks=checks, seeds=seeds)
    return result.require() if strict else result


def usual_cost(gradients: int) -> float:
    """About how many gradient-equivalents a sweep takes whose trainings take so many each: 7 seeds + 6 trainings."""
    return float((7 * SEEDS + 6) * gradients + START_BUDGET)


def _start(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFunction | None,
    *,
    criterion: Criterion | None,
    optimizer: OptimizerLike,
    clip_norm: float | None,
    accumulate: int,
    autocast: torch.dtype | None,
    seed: int,
) -> tuple[float, float, str]:
    """Where to begin, what that cost, and how it was found."""
    try:
        cheap = suggest_lr(
            model,
            batches,
            loss_fn,
            criterion=criterion,
            optimizer=optimizer,
            clip_norm=clip_norm,
            accumulate=accumulate,
            autocast=autocast,
            max_gradients=START_BUDGET * accumulate,
            seed=seed,
            progress=False,
        )
    except InvalidArgumentError as error:  # the other arguments were checked: this optimizer has no short way
        return DEFAULT_START, 0.0, f"began at {DEFAULT_START:.0e}, without a pilot: {error}"
    if cheap.value is None:
        return DEFAULT_START, cheap.cost, f"began at {DEFAULT_START:.0e}; a pilot was refused: {cheap.reason}"
    return cheap.value, cheap.cost, f"began at {cheap.value:.2e}, where a pilot led"


def _check(*, num_steps: int, schedule: str | None, warmup_steps: int | None, start: float | None, seeds: int) -> None:
    if num_steps < FEWEST_STEPS:
        raise InvalidArgumentError(
            f"num_steps={num_steps}: a sweep compares the ends of trainings, which take at least {FEWEST_STEPS} steps."
        )
    if schedule is not None and schedule not in get_args(Decay):
        raise InvalidArgumentError(f"schedule={schedule!r}: a sweep trains with one of {', '.join(get_args(Decay))}.")
    if warmup_steps is not None and not 0 <= warmup_steps < num_steps:
        raise InvalidArgumentError(f"warmup_steps={warmup_steps} of num_steps={num_steps}: it ends before they do.")
    if start is not None and not 0 < start < math.inf:
        raise InvalidArgumentError(f"start={start}: a rate to begin at is positive; None for a pilot's suggestion.")
    if seeds < 1:
        raise InvalidArgumentError(f"seeds={seeds}: every rate is trained at least once.")


class _Asking:
    """Runs trainings for the search, and adds up what they cost."""

    def __init__(self, trials: Trials, *, spent: float, progress: Reporter | None) -> None:
        self._trials = trials
        self._progress = progress
        self.spent = spent
        self.outcomes: dict[tuple[float, int], Outcome] = {}

    def __call__(self, asked: Sequence[tuple[float, int]]) -> Mapping[tuple[float, int], float]:
        found = self._trials.run(asked)
        self.outcomes |= found
        self.spent += sum(float(o.result["cost"]) for o in found.values() if o.result is not None)
        if self._progress is not None:
            rates = sorted({rate for rate, _ in asked})
            self._progress(f"trained at {rates[0]:.1e} .. {rates[-1]:.1e}", self.spent, self._best())
        return {key: _loss(outcome) for key, outcome in found.items()}

    def _best(self) -> float | None:
        """The rate of the lowest loss so far, of the seed that every rate was trained with."""
        ends = {rate: _loss(outcome) for (rate, seed), outcome in self.outcomes.items() if seed == 0}
        best = min(ends, key=ends.__getitem__)
        return best if math.isfinite(ends[best]) else None

    def trouble(self) -> str:
        """Trainings that raised or were lost, which count as failures of their rate; empty if there were none."""
        bad = {key: o for key, o in self.outcomes.items() if o.result is None}
        if not bad:
            return ""
        (rate, _), first = min(bad.items())
        return f"{len(bad)} training(s) gave no loss and count as failures, the first at {rate:.2e}: {first.reason}"


def _loss(outcome: Outcome) -> float:
    return math.inf if outcome.result is None else float(outcome.result["loss"])


def _recommendation(
    found: SweepFound, training: PairedTraining, ask: _Asking, *, checks: list[str], seeds: int
) -> Recommendation:
    value, low, high, level = _value(found)
    status, reason = _judge(found, training, ask, seeds=seeds)
    if trouble := ask.trouble():
        checks.append(trouble)
    done = {rate: loss for rate, loss in found.curve.items() if rate not in found.failed}
    return Recommendation(
        knob=UNIT,
        value=value,
        low=low,
        high=high,
        level=level,
        status=status,
        reason=reason,
        rule=RULE,
        sources=SOURCES,
        evidence={
            "best rate trained": found.best,
            "highest rate that survived": found.survives,
            "lowest rate that failed": found.fails,
            "loss before": training.initial,
            "loss at the optimum, fitted": None if found.optimum is None else found.optimum.height,
            "rates in the fit": str(found.fitted),
            "batches": str(len(training.batches)),
        },
        checks=tuple(checks),
        cost=ask.spent,
        max_stable=_max_stable(found),
        warmup_steps=None if value is None else training.warmup_steps,
        series={
            "sweep_lr": tuple(found.curve),
            "sweep_loss": tuple(done.get(rate, math.inf) for rate in found.curve),
        },
    )


def _value(found: SweepFound) -> tuple[float | None, float, float, float | None]:
    """Value, range and level."""
    if found.best is None:
        return None, 0.0, math.inf, None
    if found.optimum is None:
        return found.best, 0.0, found.fails or math.inf, None
    low, high = (2.0**x for x in (found.optimum.low, found.optimum.high))
    if found.capped and not found.optimum.bounded_above:
        high = found.fails or math.inf  # beyond the survivors it is failure that bounds it
    return 2.0**found.optimum.value, low, high, LEVEL if _bounded(found) else None


def _bounded(found: SweepFound) -> bool:
    """Whether both ends of the interval come from something."""
    optimum = found.optimum
    return optimum is not None and optimum.bounded_below and (optimum.bounded_above or found.capped)


def _judge(found: SweepFound, training: PairedTraining, ask: _Asking, *, seeds: int) -> tuple[Status, str]:
    trouble = ask.trouble()
    if found.best is None:
        raised = f" {trouble}." if trouble else ""
        return Status.REFUSED, (
            f"no rate lowered the loss from {training.initial:.4g} in {training.num_steps} steps.{raised} Is the model "
            "already trained? Check the loss and the data, or raise num_steps."
        )
    if trouble:
        return Status.UNCERTAIN, trouble
    if not found.inside:
        return Status.UNCERTAIN, "the best rate lies at the end of those trained: the search was led on for too long"
    if found.optimum is None:
        return Status.UNCERTAIN, (
            f"the curve through {found.fitted} rates that survived has no minimum between them: the value is the best "
            "one trained. Give more seeds or a larger num_steps"
        )
    if not _bounded(found):
        return Status.UNCERTAIN, (
            "the noise between orders of the batches hides where the loss is lowest within the rates compared: give "
            "more seeds"
        )
    if len(training.batches) == 1:
        return Status.ONE_BATCH, Status.ONE_BATCH.value
    if seeds == 1:
        return Status.UNCERTAIN, "one order of the batches: the noise between orders is unknown. Give seeds=2 or more"
    return Status.OK, ""


def _max_stable(found: SweepFound) -> Estimate | None:
    """The bracket of the onset of failure; the rate that survived where nothing failed."""
    if found.survives is None:
        return None
    method = "bisection by trainings: the highest that survived, the lowest at which half of the seeds failed"
    if found.fails is None:
        return Estimate(
            value=found.survives,
            low=found.survives,
            high=math.inf,
            level=None,
            unit=UNIT,
            method=method,
            covers="numerical",
            status=Status.UNCERTAIN,
            reason="no rate failed, 14 octaves above the best",
        )
    return Estimate(
        value=math.sqrt(found.survives * found.fails),
        low=found.survives,
        high=found.fails,
        level=None,
        unit=UNIT,
        method=method,
        covers="numerical",
    )
