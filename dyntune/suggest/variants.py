"""Models that differ in one thing, each measured in the same way: the ground of heads and of other architecture knobs.

Two passes over (variant, seed), each of which may go over processes: a pilot finds learning rates; then, at a common
low rate that follows from all pilots of a seed, what can be seen before the edge, and a short training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dyntune.errors import DyntuneError, InvalidArgumentError
from dyntune.numerics.random import stream_seed
from dyntune.objective.losses import Criterion, LossFunction, LossRule
from dyntune.objective.objective import Objective
from dyntune.pilot.optimizers import OptimizerLike
from dyntune.suggest.heads_measure import looked_at, seeded, step_costs, train
from dyntune.suggest.lr import suggest_lr
from dyntune.suggest.progress import ProgressLike, reporting
from dyntune.trials.trials import Trials

__all__ = ["Found", "Variants", "check_request", "measure"]

# The common warm-up: this many steps at this share of the lowest suggested rate. After training has reached the edge of
# stability the eigenvalue echoes the learning rate and says nothing of the architecture (Cohen et al. 2021), so that it
# is looked at before; at 20 steps of a low rate no head count was there (reference measurements of two small GPTs).
WARMUP_STEPS, COMMON_SHARE = 20, 0.25
GROWING = ("largest attention logit", "largest norm of queries with keys", "attention entropy")
LOOKS = 6  # at attention along the short training, besides the one before it
LEAST_PROBE = 20  # steps of a short training, of which a tenth is two
USUAL_CURVATURE = 700  # gradients, on small GPTs; it moves a bar and nothing else
Key = tuple[int, int]  # variant, seed
Told = dict[str, Any]  # JSON types


@dataclass(frozen=True, kw_only=True)
class Variants:
    """What is measured, and how; picklable where the factory and the loss are.

    Args:
        factory: Called with one of `variants`.
        variants: What the factory is told, each.
        names: Of the variants, for messages.
        batches: Frozen, the same for all.
        loss_fn: The loss.
        criterion: Likewise.
        optimizer: A name or ``params -> Optimizer``.
        probe_steps: Of the short training.
        curvature: Whether to measure eigenvalues.
        per_head: Whether to measure those of every head.
        max_gradients: Of each pilot.
        seed: Of everything.
    """

    factory: Callable[[Any], nn.Module]
    variants: tuple[Any, ...]
    names: tuple[str, ...]
    batches: tuple[Any, ...]
    loss_fn: LossFunction | None
    criterion: Criterion | None
    optimizer: OptimizerLike
    probe_steps: int
    curvature: bool
    per_head: bool
    max_gradients: int
    seed: int

    def model(self, key: Key) -> nn.Module:
        """A new model, from the random numbers that all variants of that seed get."""
        variant, index = key
        with seeded(self.stream(index)):
            return self.factory(self.variants[variant])

    @property
    def usual_cost(self) -> float:
        """Gradient-equivalents for one variant and seed, for a bar."""
        curvature = USUAL_CURVATURE if self.curvature else 0
        return 1.0 + self.max_gradients + WARMUP_STEPS + self.probe_steps + curvature

    def stream(self, index: int) -> int:
        """The seed of seed `index`."""
        return stream_seed(self.seed, index)

    def rule(self, model: nn.Module) -> LossRule:
        """How a batch becomes a loss, as for this model."""
        return Objective(
            model,
            list(self.batches[:1]),
            self.loss_fn,
            criterion=self.criterion,
            num_checked=1,
            widen=False,
            seed=self.seed,
        ).rule


@dataclass
class Found:
    """What was found of one variant, seed by seed."""

    lr: list[float] = field(default_factory=list)
    max_stable: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    measured: dict[str, list[float]] = field(default_factory=dict)
    by_head: dict[str, list[dict[str, list[float]]]] = field(default_factory=dict)  # name -> seed -> module -> heads
    course: Mapping[str, Any] | None = None  # of the first seed
    flops: int | None = None
    saved_bytes: int | None = None


def check_request(optimizer: OptimizerLike, *, seeds: int, probe_steps: int, each: str) -> None:
    """Raise InvalidArgumentError for what no variants can be measured with; `each` names them."""
    if isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(
            f"optimizer is a {type(optimizer).__name__} on one model's parameters, and every {each} has its own model: "
            "give a function, optimizer=lambda params: torch.optim.AdamW(params, ...), or a name."
        )
    if seeds < 1:
        raise InvalidArgumentError(f"seeds={seeds}: at least one model of each {each} is measured.")
    if probe_steps < LEAST_PROBE:
        raise InvalidArgumentError(f"probe_steps={probe_steps}: a short training has at least {LEAST_PROBE}.")


def measure(
    variants: Variants, *, seeds: int, workers: int, progress: ProgressLike
) -> tuple[list[Found], list[str], float]:
    """Measure every variant with every seed: what was found of each, what could not be had, and the cost."""
    keys = [(i, s) for s in range(seeds) for i in range(len(variants.variants))]
    with reporting(progress, limit=len(keys) * variants.usual_cost) as (meter, tell):

        def done(key: Key, told: Told) -> None:
            meter.charge(told["cost"])
            if tell is not None:
                where = f"seed {key[1] + 1} of {seeds}, {variants.names[key[0]]}"
                tell(f"{where}: {told['line']}", meter.spent, told["lr"])

        return (*_measured(variants, keys, workers, done), meter.spent)


def _measured(
    variants: Variants, keys: Sequence[Key], workers: int, done: Callable[[Key, Told], None]
) -> tuple[list[Found], list[str]]:
    seeds = 1 + max(s for _, s in keys)
    pilots = _each(_Pilot(variants), keys, variants, workers, done)
    rates = {
        s: [told["lr"] for (_, t), told in pilots.items() if t == s and told["lr"] is not None] for s in range(seeds)
    }
    probe = _Probe(
        variants,
        lows=tuple(COMMON_SHARE * min(rates[s]) if rates[s] else None for s in range(seeds)),
        pilots={f"{i}/{s}": pilots[i, s] for i, s in keys},
    )
    probed = _each(probe, keys, variants, workers, done)
    found = [Found() for _ in variants.variants]
    said: list[str] = []
    for (i, s), told in probed.items():
        pilot, each = pilots[i, s], found[i]
        each.lr.append(_number(pilot["lr"]))
        each.max_stable.append(_number(pilot["max_stable"]))
        each.start.append(_number(told["start"]))
        each.loss.append(_number(told["loss"], math.inf))
        each.step_seconds.append(_number(told["step_seconds"]))
        for name, value in told["measured"].items():
            each.measured.setdefault(name, []).append(value)
        for name, modules in told["by_head"].items():
            each.by_head.setdefault(name, []).append(modules)
        if s == 0:
            each.course, each.flops, each.saved_bytes = told["course"], told["flops"], told["saved_bytes"]
        said += [line for line in told["said"] if line not in said]
    return found, said


def _each(
    function: Callable[[float, int], Told],
    keys: Sequence[Key],
    variants: Variants,
    workers: int,
    done: Callable[[Key, Told], None],
) -> dict[Key, Told]:
    if workers < 0:
        raise InvalidArgumentError(f"workers={workers}: give a number of processes, or 0 for none but this one.")
    found: dict[Key, Told] = {}
    if workers == 0:
        for key in keys:
            found[key] = function(*key)
            done(key, found[key])
        return found
    with Trials(function, workers=workers) as trials:
        outcomes = trials.run([(float(i), s) for i, s in keys])
    for i, s in keys:
        outcome = outcomes[float(i), s]
        if outcome.result is None:
            raise DyntuneError(
                f"{variants.names[i]}, seed {s}: the process that measured it reports {outcome.reason}. With workers=0 "
                "the same is done in this process, with the whole traceback."
            )
        found[i, s] = dict(outcome.result)
        done((i, s), found[i, s])
    return found


@dataclass(frozen=True)
class _Pilot:
    """A learning rate for one variant and seed."""

    variants: Variants

    def __call__(self, variant: float, index: int) -> Told:
        v = self.variants
        rec = suggest_lr(
            v.model((int(variant), index)),
            list(v.batches),
            v.loss_fn,
            criterion=v.criterion,
            optimizer=v.optimizer,
            max_gradients=v.max_gradients,
            seed=v.stream(index),
            progress=False,  # one bar shows all pilots
        )
        return {
            "lr": rec.value,
            "max_stable": None if rec.max_stable is None else rec.max_stable.value,
            "warmup": rec.warmup_steps or 0,
            "reason": rec.reason,
            "cost": rec.cost,
            "line": f"learning rate {rec}",
        }


@dataclass(frozen=True)
class _Probe:
    """What is seen before the edge, and a short training, of one variant and seed.

    Args:
        variants: What is measured.
        lows: By seed, the common low rate; None where no pilot found a rate.
        pilots: By ``"variant/seed"``, what :class:`_Pilot` told.
    """

    variants: Variants
    lows: tuple[float | None, ...]
    pilots: Mapping[str, Told]

    def __call__(self, variant: float, index: int) -> Told:
        v, key = self.variants, (int(variant), index)
        model, batches, seed, low = v.model(key), list(v.batches), v.stream(index), self.lows[index]
        rule = v.rule(model)
        flops, saved = step_costs(copy.deepcopy(model), rule, batches[0], seed=seed)
        told: Told = {"measured": {}, "by_head": {}, "course": None, "said": [], "cost": 1.0, "line": "", "lr": None}
        told |= {"flops": flops, "saved_bytes": saved}
        told |= {"start": None, "loss": None, "step_seconds": None}
        if low is not None:
            _before_the_edge(v, copy.deepcopy(model), rule, told, lr=low, seed=seed)
        pilot = self.pilots[f"{int(variant)}/{index}"]
        if pilot["lr"] is None:
            told["line"] = f"no learning rate was established: {pilot['reason']}"
            told["said"].append(f"{v.names[key[0]]}: {told['line']}")
            return told
        learned = train(
            model,
            rule,
            batches,
            optimizer=v.optimizer,
            lr=pilot["lr"],
            steps=v.probe_steps,
            warmup=min(pilot["warmup"], v.probe_steps // 10),
            seed=seed,
            look=None if index else lambda step, moving: _look(v, moving, told, step),
            looks=LOOKS,
        )
        told["cost"] += learned.steps
        told |= {"lr": pilot["lr"], "start": learned.start, "step_seconds": learned.step_seconds}
        told["loss"] = learned.loss if math.isfinite(learned.loss) else None
        told["line"] = f"loss {learned.loss:.4g} after {learned.steps} steps"
        return told


def _look(v: Variants, model: nn.Module, told: Told, step: int) -> None:
    """Attention at one step of the short training, on the first batch."""
    seen = looked_at(model, v.batches[:1], v.loss_fn, v.criterion, None, curvature=False, seed=v.seed)
    logits, entropy = seen.by_head.get("largest attention logit"), seen.by_head.get("relative attention entropy")
    if logits is None or entropy is None:
        return
    course = told["course"] or {"steps": [], "logits": [], "entropy": []}
    course["steps"].append(step)
    for name, modules in (("logits", logits), ("entropy", entropy)):
        course[name].append([x for values in modules.values() for x in values])
    told["course"] = course


def _before_the_edge(v: Variants, model: nn.Module, rule: LossRule, told: Told, *, lr: float, seed: int) -> None:
    """Attention before and after the common warm-up, its growth, and curvature after it."""
    before = looked_at(model, v.batches, v.loss_fn, v.criterion, None, curvature=False, seed=seed)
    learned = train(model, rule, v.batches, optimizer=v.optimizer, lr=lr, steps=WARMUP_STEPS, warmup=0, seed=seed)
    after = looked_at(
        model,
        v.batches,
        v.loss_fn,
        v.criterion,
        learned.optimizer,
        curvature=v.curvature,
        per_head=v.per_head,
        seed=seed,
    )
    told["measured"] |= after.numbers
    told["by_head"] |= after.by_head
    told["said"] += list(dict.fromkeys((*before.missing, *after.missing)))
    told["cost"] += after.cost + learned.steps
    for name in ("largest attention logit", "lowest relative entropy of a head"):
        if name in before.numbers:
            told["measured"][f"{name}, untrained"] = before.numbers[name]
    for name in GROWING:
        was, is_ = before.numbers.get(name, 0.0), after.numbers.get(name, 0.0)
        if was > 0 and is_ > 0:
            told["measured"][f"{name}, growth per step"] = math.log(is_ / was) / WARMUP_STEPS
    for name, modules in before.by_head.items():
        told["by_head"][f"{name}, growth per step"] = {
            module: [_growth(a, b) for a, b in zip(values, after.by_head[name][module], strict=True)]
            for module, values in modules.items()
            if len(after.by_head.get(name, {}).get(module, ())) == len(values)
        }


def _growth(was: float, is_: float) -> float:
    return math.log(is_ / was) / WARMUP_STEPS if was > 0 and is_ > 0 else math.nan


def _number(value: float | None, missing: float = math.nan) -> float:
    return missing if value is None else float(value)
