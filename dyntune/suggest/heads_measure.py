"""What is measured of one model on the way to a number of heads: before and after a short warm-up, and in training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dyntune.curvature.sharpness import Sharpness, sharpness
from dyntune.dynamics.attention import attention_statistics
from dyntune.dynamics.attention_weights import find_attention, qk_norms
from dyntune.errors import DyntuneError, UnreadableModelError
from dyntune.objective.losses import Criterion, LossFunction, LossRule
from dyntune.pilot.optimizers import OptimizerLike, twin_optimizer
from dyntune.stability.scales import group_ratios

__all__ = ["Learned", "head_dim_of", "looked_at", "seeded", "train"]

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
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stepping = twin_optimizer(optimizer, parameters, parameters)
    ratios = group_ratios(stepping)
    losses: list[float] = []
    seconds: list[float] = []
    with seeded(seed):
        for step in range(steps):
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
    tail = losses[-max(1, round(TAIL * steps)) :]
    return Learned(losses[0], float(np.mean(tail)), float(np.median(seconds)), steps, stepping)


def head_dim_of(model: nn.Module) -> tuple[int | None, set[int]]:
    """Width of the narrowest head, and the numbers of heads of all attention modules; (None, empty) if unreadable."""
    try:
        found = find_attention(model)
    except UnreadableModelError:
        return None, set()
    return min((w.head_dim for w in found.values()), default=None), {w.heads for w in found.values()}


def looked_at(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    optimizer: torch.optim.Optimizer | None,
    *,
    curvature: bool,
    seed: int,
) -> tuple[dict[str, float], list[str], float]:
    """Attention of a model, and its curvature where asked for: numbers, what could not be had, and the cost.

    Args:
        model: As it is.
        batches: The first few are used.
        loss_fn: The loss, for curvature.
        criterion: Likewise.
        optimizer: That has stepped the model; None before training.
        curvature: Whether to measure eigenvalues.
        seed: Of dropout and of starting vectors.
    """
    chosen = list(batches[:LOOKED_AT])
    found: dict[str, float] = {}
    missing: list[str] = []
    try:
        modules = attention_statistics(model, chosen, loss_fn, seed=seed).values()
        found["largest attention logit"] = max(x for m in modules for x in m.max_logit)
        found["attention entropy"] = float(np.mean([x for m in modules for x in m.entropy]))
        found["lowest relative entropy of a head"] = min(x for m in modules for x in m.relative_entropy)
    except DyntuneError as error:
        missing.append(f"attention was not read: {error}")
    try:
        norms = qk_norms(model)
        found["largest norm of queries with keys"] = max(x for module in norms.values() for x in module)
    except DyntuneError as error:
        missing.append(f"norms of queries with keys were not read: {error}")
    cost = 0.0
    if curvature and optimizer is not None:
        seen, cost = _curvature(model, chosen, loss_fn, criterion, optimizer, seed=seed)
        found |= seen
        missing += [f"{name} was not established" for name in ("lambda_max",) if name not in seen]
    return found, missing, cost


def _curvature(
    model: nn.Module,
    batches: list[Any],
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    optimizer: torch.optim.Optimizer,
    *,
    seed: int,
) -> tuple[dict[str, float], float]:
    adaptive = any("exp_avg_sq" in state for state in optimizer.state.values())
    result: Sharpness = sharpness(
        model,
        batches,
        loss_fn,
        criterion=criterion,
        optimizer=optimizer if adaptive else None,
        quantities=("lambda_max", "batch", *(("preconditioned",) if adaptive else ())),
        rtol=RTOL,
        max_products=PRODUCTS,
        seed=seed,
    )
    names = {"lambda_max": "lambda_max", "batch": "batch sharpness", "preconditioned": "preconditioned lambda_max"}
    estimates = result.estimates
    found = {names[name]: float(e) for name, e in estimates.items() if name in names and e.value is not None}
    products = sum(e.num_products for e in estimates.values())
    return found, 2.0 * products * len(batches)  # a product costs about two gradients
