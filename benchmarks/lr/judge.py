"""Real training at a learning rate: what every figure of this benchmark comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.lr.metrics import MIDPOINT, NON_FINITE, OK, PEAK, PEAK_FACTOR
from benchmarks.lr.scenario import Batch, Scenario

VERSION = 1  # of the training and its evaluation: a change makes recorded runs stale
EVALUATED = 512  # rows of the fixed subsets; of text, half as many windows of 32 characters
TAIL = 0.05  # the last share of the steps over which the final loss is averaged ...
TAIL_POINTS = 3  # ... at this many points, the last step included: one step's loss at a constant LR is noise
PEAK_ROWS = 256  # rows, at least, of the batches whose mean loss counts as a peak: single small batches are noise

__all__ = ["MIDPOINT", "NON_FINITE", "OK", "PEAK", "Run", "evaluate", "train"]


@dataclass(frozen=True)
class Run:
    """One run; losses in eval mode but for the peak, and on fixed rows.

    Args:
        initial: On the training subset, before the first step.
        train: On the training subset, mean of the last points; infinite for a run that was stopped.
        val: Likewise on the validation rows.
        peak: Largest mean training loss over successive batches of ``PEAK_ROWS`` rows or more.
        failed: ``OK``, ``NON_FINITE`` or ``PEAK``; an end above the midpoint is decided once the best is
            known.
        initial_val: On the validation rows, before the first step.
    """

    initial: float
    train: float
    val: float
    peak: float
    failed: int
    initial_val: float


def evaluate(scenario: Scenario, model: nn.Module) -> tuple[float, float]:
    """Loss on the fixed training subset and on the validation subset, in eval mode."""
    data, mode = scenario.data(), model.training
    rows = EVALUATED // 2 if scenario.loss == "text" else EVALUATED
    model.eval()
    with torch.no_grad():
        train = float(scenario.loss_fn(model, (data.x[:rows], data.y[:rows])))
        val = float(scenario.loss_fn(model, (data.x_val[:rows], data.y_val[:rows])))
    model.train(mode)
    return train, val


def _batches(scenario: Scenario, seed: int) -> Iterator[Batch]:
    loader = scenario.loader(seed)
    while True:
        yield from loader


def train(
    scenario: Scenario,
    lr: float,
    seed: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    model: nn.Module | None = None,
    batches: Iterator[Any] | None = None,
    watch: Callable[[float], None] | None = None,
    evaluating: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Run:
    """Train from `seed` (initial weights, order of the rows, dropout) at a peak LR of the first group.

    Stops where the loss is not finite or peaks above twice the initial loss. The global random state stays.

    Args:
        scenario: What to train.
        lr: Peak learning rate of the first parameter group.
        seed: From 0.
        optimizer: In place of the scenario's: an optimizer that chooses its own LR. Needs `model`, which it holds.
        model: In place of a new one.
        batches: In place of the scenario's.
        watch: Given the loss of every batch.
        evaluating: Entered around the final evaluations: for an optimizer that evaluates elsewhere than it trains.
    """
    model = scenario.new_model(seed) if model is None else model
    optimizer = scenario.new_optimizer(model, lr, fused=True) if optimizer is None else optimizer
    bases = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initial, initial_val = evaluate(scenario, model)
        window = math.ceil(PEAK_ROWS / scenario.batch)
        peak, total, finals = 0.0, 0.0, []
        tail = {round(scenario.steps * (1 - TAIL * i / (TAIL_POINTS - 1))) for i in range(TAIL_POINTS)}
        for step, batch in zip(range(1, scenario.steps + 1), batches or _batches(scenario, seed), strict=False):
            factor = scenario.factor(step - 1)
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
            loss = scenario.loss_fn(model, batch)
            optimizer.zero_grad()
            loss.backward()
            if scenario.clip is not None:
                nn.utils.clip_grad_norm_(parameters, scenario.clip)
            optimizer.step()
            total += (value := loss.item())
            if watch is not None:
                watch(value)
            if not math.isfinite(total):
                return Run(initial, math.inf, math.inf, math.inf, NON_FINITE, initial_val)
            if step % window == 0:
                peak, total = max(peak, total / window), 0.0
                if peak > PEAK_FACTOR * initial:
                    return Run(initial, math.inf, math.inf, peak, PEAK, initial_val)
            if step in tail:
                with evaluating():
                    finals.append(evaluate(scenario, model))
    train_loss, val_loss = (sum(losses) / len(finals) for losses in zip(*finals, strict=True))
    if not math.isfinite(train_loss):
        return Run(initial, math.inf, math.inf, peak, NON_FINITE, initial_val)
    return Run(initial, train_loss, val_loss if math.isfinite(val_loss) else math.inf, peak, OK, initial_val)
