"""What is measured of one model on the way to a number of heads: before and after a short warm-up, and in training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dyntune.curvature.sharpness import Sharpness, sharpness
from dyntune.dynamics.attention import attention_statistics
from dyntune.dynamics.attention_weights import find_attention, qk_norms
from dyntune.errors import DyntuneError, UnreadableModelError
from dyntune.objective.context import differentiable_twice
from dyntune.objective.losses import Criterion, LossFunction, LossRule
from dyntune.objective.saved import SavedBytes
from dyntune.pilot.optimizers import OptimizerLike, twin_optimizer
from dyntune.stability.scales import group_ratios
from dyntune.suggest.heads_parts import head_spectra, part_spectra

__all__ = ["Learned", "Seen", "head_dim_of", "looked_at", "seeded", "step_costs", "train"]

# The last share of the steps of a short training, over which its loss is averaged.
TAIL = 0.1
# Batches that attention and curvature are measured on: the eigenvalue needs a loss, not the whole data.
LOOKED_AT = 4
# Products for each eigenvalue: far from the edge a relative accuracy of some percent takes a dozen or two.
PRODUCTS, RTOL = 30, 0.05


@dataclass(frozen=True)
class Learned:
    """What a short training left.

    Args:
        start: Loss of the first batch, before training.
        loss: Mean of the last tenth of the steps; infinite where a loss was not finite.
        step_seconds: Median time of a step.
        steps: That were made.
        optimizer: With its state.
    """

    start: float
    loss: float
    step_seconds: float
    steps: int
    optimizer: torch.optim.Optimizer


@dataclass
class Seen:
    """What was seen of a model.

    Args:
        numbers: By name.
        by_head: By name and attention module, one number for each head.
        missing: What could not be had, in words.
        cost: Gradient-equivalents.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    by_head: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    cost: float = 0.0


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from a seed, on every device; as they were afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def train(
    model: nn.Module,
    rule: LossRule,
    batches: Sequence[Any],
    *,
    optimizer: OptimizerLike,
    lr: float,
    steps: int,
    warmup: int,
    seed: int,
    look: Callable[[int, nn.Module], None] | None = None,
    looks: int = 1,
) -> Learned:
    """Train a model of our own in place, at a constant rate after a linear warm-up.

    Args:
        model: Moved; a fresh one that no user holds.
        rule: The loss.
        batches: Seen in this order, again from the start where there are fewer than steps.
        optimizer: A name or a function ``params -> Optimizer``.
        lr: Of the first group; ratios between groups are kept.
        steps: How many.
        warmup: Of them, below the full rate.
        seed: Of dropout.
        look: Called with how many steps were made and the model: before the first, and `looks` times until the last.
        looks: See there.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stepping = twin_optimizer(optimizer, parameters, parameters)
    ratios = group_ratios(stepping)
    losses: list[float] = []
    seconds: list[float] = []
    at = {round(i * steps / looks) for i in range(looks + 1)}
    with seeded(seed):
        for step in range(steps):
            if look is not None and step in at:
                look(step, model)
            began = time.perf_counter()
            for group, ratio in zip(stepping.param_groups, ratios, strict=True):
                group["lr"] = lr * ratio * min(1.0, (step + 1) / (warmup + 1))
            loss = rule.evaluate(model, batches[step % len(batches)]).value
            stepping.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            stepping.step()
            losses.append(float(loss.detach()))  # waits for the device: the time is the step's
            seconds.append(time.perf_counter() - began)
            if not math.isfinite(losses[-1]):
                return Learned(losses[0], math.inf, float(np.median(seconds)), step + 1, stepping)
    if look is not None:
        look(steps, model)
    tail = losses[-max(1, round(TAIL * steps)) :]
    return Learned(losses[0], float(np.mean(tail)), float(np.median(seconds)), steps, stepping)


def head_dim_of(model: nn.Module) -> tuple[int | None, set[int]]:
    """Width of the narrowest head, and the numbers of heads of all attention modules; (None, empty) if unreadable."""
    try:
        found = find_attention(model)
    except UnreadableModelError:
        return None, set()
    return min((w.head_dim for w in found.values()), default=None), {w.heads for w in found.values()}


def step_costs(model: nn.Module, rule: LossRule, batch: Any, *, seed: int) -> tuple[int, int]:
    """Floating-point operations of one forward and backward pass, and the bytes saved between the two.

    Operations are those of matrix products, convolutions and attention, a multiplication and an addition each;
    attention counts as the math kernel makes it. Parameters are not among the bytes; what a checkpoint computes again
    is not seen.

    Args:
        model: Its gradients are left behind.
        rule: The loss.
        batch: One.
        seed: Of dropout.
    """
    device = next(model.parameters()).device
    saved = SavedBytes(model.parameters())
    counter = FlopCounterMode(display=False)
    with seeded(seed), differentiable_twice(model, device), counter:
        with saved.counting():
            loss = rule.evaluate(model, batch).value
        loss.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops()), saved.total


def looked_at(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    optimizer: torch.optim.Optimizer | None,
    *,
    curvature: bool,
    per_head: bool = False,
    seed: int,
) -> Seen:
    """Attention of a model, and its curvature where asked for.

    Args:
        model: As it is.
        batches: The first few are used.
        loss_fn: The loss, for curvature.
        criterion: Likewise.
        optimizer: That has stepped the model; None before training.
        curvature: Whether to measure eigenvalues.
        per_head: Whether to measure those of every head's queries and keys.
        seed: Of dropout and of starting vectors.
    """
    chosen = list(batches[:LOOKED_AT])
    seen = Seen()
    _attention(seen, model, chosen, loss_fn, seed=seed)
    if optimizer is None:
        return seen
    if curvature:
        _curvature(seen, model, chosen, loss_fn, criterion, optimizer, seed=seed)
        try:
            parts, cost = part_spectra(model, chosen[:1], loss_fn, criterion, seed=seed)
            seen.numbers |= parts
            seen.cost += cost
        except UnreadableModelError as error:
            seen.missing.append(f"no spectra of parts: {error}")
    if per_head:
        values, cost = head_spectra(model, chosen[:1], loss_fn, criterion, seed=seed)
        seen.by_head["lambda_max of queries and keys"] = {name: list(found) for name, found in values.items()}
        seen.cost += cost
    return seen


def _attention(seen: Seen, model: nn.Module, batches: list[Any], loss_fn: LossFunction | None, *, seed: int) -> None:
    try:
        found = attention_statistics(model, batches, loss_fn, seed=seed)
    except DyntuneError as error:
        seen.missing.append(f"attention was not read: {error}")
    else:
        modules = found.values()
        seen.numbers["largest attention logit"] = max(x for m in modules for x in m.max_logit)
        seen.numbers["attention entropy"] = float(np.mean([x for m in modules for x in m.entropy]))
        seen.numbers["lowest relative entropy of a head"] = min(x for m in modules for x in m.relative_entropy)
        seen.by_head["largest attention logit"] = {name: list(m.max_logit) for name, m in found.items()}
        seen.by_head["relative attention entropy"] = {name: list(m.relative_entropy) for name, m in found.items()}
    try:
        norms = qk_norms(model)
    except DyntuneError as error:
        seen.missing.append(f"norms of queries with keys were not read: {error}")
    else:
        seen.numbers["largest norm of queries with keys"] = max(x for module in norms.values() for x in module)
        seen.by_head["norm of queries with keys"] = {name: list(values) for name, values in norms.items()}


NAMES = {
    "lambda_max": "lambda_max",
    "batch": "batch sharpness",
    "preconditioned": "preconditioned lambda_max",
    "critical_lr": "rate at which one step raises the loss",
}


def _curvature(
    seen: Seen,
    model: nn.Module,
    batches: list[Any],
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    optimizer: torch.optim.Optimizer,
    *,
    seed: int,
) -> None:
    adaptive = any("exp_avg_sq" in state for state in optimizer.state.values())
    result: Sharpness = sharpness(
        model,
        batches,
        loss_fn,
        criterion=criterion,
        optimizer=optimizer,
        quantities=("lambda_max", "batch", "critical_lr", *(("preconditioned",) if adaptive else ())),
        rtol=RTOL,
        max_products=PRODUCTS,
        seed=seed,
    )
    for name, estimate in result.estimates.items():
        if estimate.value is None:
            seen.missing.append(f"{NAMES[name]} was not established: {estimate.reason}")
        else:
            seen.numbers[NAMES[name]] = float(estimate.value)
    seen.cost += 2.0 * result.num_products * len(batches)  # a product costs about two gradients
