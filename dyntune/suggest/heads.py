"""A number of attention heads, with the learning rate that goes with it: :func:`suggest_heads`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.random import stream_seed
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.pilot.optimizers import OptimizerLike
from dyntune.records import Recommendation
from dyntune.suggest.heads_measure import head_dim_of, looked_at, seeded, train
from dyntune.suggest.heads_rule import MARGIN, HeadEvidence, Heads, heads_rule
from dyntune.suggest.lr import num_drawn, suggest_lr

__all__ = ["suggest_heads"]

# The common warm-up: this many steps at this share of the lowest suggested rate. After training has reached the edge of
# stability the eigenvalue echoes the learning rate and says nothing of the architecture (Cohen et al. 2021), so that it
# is looked at before; at 20 steps of a low rate no head count was there (reference measurements of two small GPTs).
WARMUP_STEPS, COMMON_SHARE = 20, 0.25
LEAST_PROBE = 20  # steps, of which a tenth is two
GROWING = ("largest attention logit", "largest norm of queries with keys", "attention entropy")


@dataclass
class _Seen:
    """What was found of one head count so far, seed by seed."""

    head_dim: int | None
    parameters: int
    lr: list[float] = field(default_factory=list)
    max_stable: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    measured: dict[str, list[float]] = field(default_factory=dict)

    def evidence(self, heads: int) -> HeadEvidence:
        seeds = len(self.lr)
        return HeadEvidence(
            heads=heads,
            head_dim=self.head_dim,
            parameters=self.parameters,
            lr=tuple(self.lr),
            max_stable=tuple(self.max_stable),
            start=tuple(self.start),
            loss=tuple(self.loss),
            step_seconds=tuple(self.step_seconds),
            measured={name: tuple(v) for name, v in self.measured.items() if len(v) == seeds},
        )


def suggest_heads(
    model_factory: Callable[[int], nn.Module],
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    head_counts: Sequence[int],
    optimizer: OptimizerLike = "adamw",
    criterion: Criterion | None = None,
    min_head_dim: int | None = None,
    margin: float = MARGIN,
    seeds: int = 3,
    probe_steps: int = 100,
    curvature: bool = True,
    max_gradients: int = 200,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    strict: bool = False,
) -> Heads:
    """Suggest a number of attention heads with a learning rate, and say whether the number matters for stability.

    For every head count and seed: a learning rate and the rate at which training is expected to fail, by the pilot of
    :func:`dyntune.suggest_lr`; then, after 20 steps at a common low rate, attention and curvature with their growth,
    before the edge of stability, where the eigenvalue would only echo the learning rate; then a short training at the
    suggested rate. All on the same batches in the same order. The pure rule is
    ``dyntune.suggest.heads_rule.heads_rule``: it never ranks by stability alone.

    Expect "equivalent" or "undecided": on small GPTs the failing rate hardly moved with the number of heads.

    Args:
        model_factory: Called with a number of heads, makes a new model; its random numbers come from a fixed seed of
            torch's, so that head counts share what does not depend on them.
        batches: As for :func:`dyntune.suggest_lr`.
        loss_fn: As for :func:`dyntune.suggest_lr`.
        head_counts: Numbers of heads, one or more.
        optimizer: A name as for :func:`dyntune.suggest_lr`, or a function ``params -> Optimizer``.
        criterion: As for :func:`dyntune.suggest_lr`.
        min_head_dim: Narrowest head that may be chosen; None: 4, with a warning below 32.
        margin: Factor within which critical rates count as equal.
        seeds: Models of each head count, 1 or more; intervals take two, and a verdict hardly comes with fewer than
            three.
        probe_steps: Steps of the short training, at least 20.
        curvature: Whether to measure eigenvalues; some 60 products on four batches.
        max_gradients: Budget of each pilot.
        seed: Of everything.
        progress: Called with a line about each thing that was done.
        strict: Raise when the status is not OK.

    Returns:
        ``value``, ``lr``, the ``table`` and the ``verdict``: "different", "equivalent" or "undecided". The status is
        never better than UNCERTAIN: the choice has not been judged against brute force.

    Raises:
        InvalidArgumentError: A head count that the factory cannot build, with those that it can; an Optimizer, whose
            parameters would be those of one model; a number outside its range.
        DyntuneError: As :func:`dyntune.suggest_lr`.
        RefusedError, NotConvergedError: With ``strict=True``.

    Cost:
        For each head count and seed: `max_gradients`, 20 and `probe_steps` gradients and, with `curvature`, some 500
        more.
    Assumes:
        The first steps speak for the training to come; the models of the factory are nobody else's.
    Source:
        See ``dyntune.suggest.heads_rule``; Cohen et al. (2021), arXiv:2103.00065 (the edge of stability); Zhai et al.
        (2023), arXiv:2303.06296, and Wortsman et al. (2023), arXiv:2309.14322 (entropy and logits before divergence).

    Example:
        >>> def make(heads):
        ...     layer = nn.TransformerEncoderLayer(8, heads, 16, batch_first=True)
        ...     return nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3))
        >>> g = torch.Generator().manual_seed(0)
        >>> data = [(torch.randn(8, 4, 8, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(20)]
        >>> found = suggest_heads(
        ...     make,
        ...     data,
        ...     criterion=nn.CrossEntropyLoss(),
        ...     head_counts=[1, 2],
        ...     seeds=2,
        ...     probe_steps=20,
        ...     max_gradients=60,
        ...     curvature=False,
        ... )
        >>> found.value in (1, 2), len(found.table)
        (True, 2)
    """
    counts = _checked(head_counts, optimizer, seeds=seeds, probe_steps=probe_steps)
    models = _built(model_factory, counts, stream_seed(seed, 0))
    first = Objective(
        next(iter(models.values())),
        batches,
        loss_fn,
        criterion=criterion,
        num_batches=max(num_drawn(max_gradients), probe_steps),
        num_checked=1,
        widen=False,
        seed=seed,
    )
    drawn, rule = list(first.batches), first.rule
    seen, checks = {}, [f"models measured in {first.mode} mode; loss: {rule.assumed}"]
    for heads, model in models.items():
        head_dim, found = head_dim_of(model)
        if found and found != {heads}:
            checks.append(f"the model for {heads} heads has attention modules with {sorted(found)}")
        seen[heads] = _Seen(head_dim, sum(p.numel() for p in model.parameters()))
    cost = 0.0
    for index in range(seeds):
        models = models if index == 0 else _built(model_factory, counts, stream_seed(seed, index))
        spent, said = _one_seed(
            models,
            drawn,
            loss_fn,
            criterion,
            rule,
            seen,
            optimizer=optimizer,
            probe_steps=probe_steps,
            curvature=curvature,
            max_gradients=max_gradients,
            seed=stream_seed(seed, index),
            tell=None if progress is None else _telling(progress, index, seeds),
        )
        cost += spent
        checks += [line for line in said if line not in checks]
    result = heads_rule(
        [each.evidence(heads) for heads, each in seen.items()],
        margin=margin,
        min_head_dim=min_head_dim,
        checks=tuple(checks),
        cost=cost,
    )
    return result.require() if strict else result


def _checked(head_counts: Sequence[int], optimizer: OptimizerLike, *, seeds: int, probe_steps: int) -> list[int]:
    counts = list(dict.fromkeys(head_counts))
    if not counts or any(not isinstance(h, int) or h < 1 for h in counts):
        raise InvalidArgumentError(f"head_counts={head_counts!r}: numbers of heads, 1 or more each.")
    if isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(
            f"optimizer is a {type(optimizer).__name__} on one model's parameters, and every head count has its own "
            "model: give a function, optimizer=lambda params: torch.optim.AdamW(params, ...), or a name."
        )
    if seeds < 1:
        raise InvalidArgumentError(f"seeds={seeds}: at least one model of each head count is measured.")
    if probe_steps < LEAST_PROBE:
        raise InvalidArgumentError(f"probe_steps={probe_steps}: a short training has at least {LEAST_PROBE}.")
    return counts


def _built(factory: Callable[[int], nn.Module], counts: Sequence[int], seed: int) -> dict[int, nn.Module]:
    """A model for every count, from the same random numbers."""
    models: dict[int, nn.Module] = {}
    failed: dict[int, Exception] = {}
    for heads in counts:
        try:
            with seeded(seed):
                model = factory(heads)
        except Exception as raised:  # whatever the user's factory raises is told with what it can build
            failed[heads] = raised
            continue
        if not isinstance(model, nn.Module):
            raise InvalidArgumentError(f"model_factory({heads}) returned a {type(model).__name__}, not a torch module.")
        models[heads] = model
    if failed:
        heads, error = next(iter(failed.items()))
        can = ", ".join(map(str, models)) or "none of them"
        raise InvalidArgumentError(
            f"model_factory({heads}) raised {type(error).__name__}: {error}. Of head_counts={list(counts)} it builds: "
            f"{can}. Most libraries ask that the number of heads divides the width of the model."
        ) from error
    return models


def _telling(progress: Callable[[str], None], index: int, seeds: int) -> Callable[[int, str], None]:
    return lambda heads, done: progress(f"seed {index + 1} of {seeds}, {heads} heads: {done}")


def _one_seed(
    models: dict[int, nn.Module],
    batches: list[Any],
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    rule: Any,
    seen: dict[int, _Seen],
    *,
    optimizer: OptimizerLike,
    probe_steps: int,
    curvature: bool,
    max_gradients: int,
    seed: int,
    tell: Callable[[int, str], None] | None,
) -> tuple[float, list[str]]:
    """Measure every head count once; the cost, and what could not be had."""
    cost = 0.0
    said: list[str] = []
    found: dict[int, Recommendation] = {}
    for heads, model in models.items():
        rec = suggest_lr(
            model, batches, loss_fn, criterion=criterion, optimizer=optimizer, max_gradients=max_gradients, seed=seed
        )
        cost += rec.cost
        found[heads] = rec
        seen[heads].lr.append(math.nan if rec.value is None else rec.value)
        stable = None if rec.max_stable is None else rec.max_stable.value
        seen[heads].max_stable.append(math.nan if stable is None else stable)
        if tell is not None:
            tell(heads, f"learning rate {rec}")
    rates = [rec.value for rec in found.values() if rec.value is not None]
    for heads, model in models.items():
        if rates:
            low = COMMON_SHARE * min(rates)
            values, missing, spent = _before_the_edge(
                copy.deepcopy(model),
                batches,
                loss_fn,
                criterion,
                rule,
                optimizer,
                lr=low,
                curvature=curvature,
                seed=seed,
            )
            cost, said = cost + spent, said + missing
            for name, number in values.items():
                seen[heads].measured.setdefault(name, []).append(number)
        value = found[heads].value
        if value is None:
            said.append(f"{heads} heads: no learning rate was established: {found[heads].reason}")
            seen[heads].start.append(math.nan)
            seen[heads].loss.append(math.inf)
            seen[heads].step_seconds.append(math.nan)
            continue
        warmup = min(found[heads].warmup_steps or 0, probe_steps // 10)
        learned = train(
            model, rule, batches, optimizer=optimizer, lr=value, steps=probe_steps, warmup=warmup, seed=seed
        )
        cost += learned.steps
        seen[heads].start.append(learned.start)
        seen[heads].loss.append(learned.loss)
        seen[heads].step_seconds.append(learned.step_seconds)
        if tell is not None:
            tell(heads, f"loss {learned.loss:.4g} after {learned.steps} steps")
    return cost, said


def _before_the_edge(
    model: nn.Module,
    batches: list[Any],
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    rule: Any,
    optimizer: OptimizerLike,
    *,
    lr: float,
    curvature: bool,
    seed: int,
) -> tuple[dict[str, float], list[str], float]:
    """Attention before and after the common warm-up, its growth, and curvature after it."""
    before, missing, _ = looked_at(model, batches, loss_fn, criterion, None, curvature=False, seed=seed)
    learned = train(model, rule, batches, optimizer=optimizer, lr=lr, steps=WARMUP_STEPS, warmup=0, seed=seed)
    after, also, spent = looked_at(
        model, batches, loss_fn, criterion, learned.optimizer, curvature=curvature, seed=seed
    )
    for name in GROWING:
        if before.get(name, 0.0) > 0 and after.get(name, 0.0) > 0:
            after[f"{name}, growth per step"] = math.log(after[name] / before[name]) / WARMUP_STEPS
    return after, [*missing, *(line for line in also if line not in missing)], spent + learned.steps
