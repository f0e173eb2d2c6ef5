"""One training at a learning rate; whether it failed is known once the best rate is (:func:`failed`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.heads.workloads import Cell, loss_fn

VERSION = 1  # of the training and its evaluation: a change makes recorded runs stale
TAIL = 0.1  # the last share of the steps, over which the final loss is averaged
HOPELESS = 10.0  # times the initial loss: stopped
VALIDATED = 512 * 32  # held-out characters, the same for each context


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        initial: Loss of the first batch.
        final: Mean over the last tenth of the steps; infinite for a run that was stopped.
        val: On held-out text, after the last step.
        steps: That were made.
        logit: Largest attention logit after the last step, on a fixed part of the training text.
    """

    initial: float
    final: float
    val: float
    steps: int
    logit: float


def train(cell: Cell, lr: float, seed: int) -> Run:
    """Train from `seed`; the same one gives the same weights and batches at every head count and rate."""
    model = cell.new_model(seed)
    optimizer = cell.new_optimizer(model, lr)
    losses: list[float] = []
    for step, batch in zip(range(cell.steps), cell.batches(seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (cell.warmup + 1))
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not losses[-1] <= HOPELESS * losses[0]:
            return Run(losses[0], math.inf, math.inf, len(losses), math.inf)
    data = cell.data()
    windows = max(1, VALIDATED // cell.group.context)
    with torch.no_grad():
        val = float(loss_fn(model, (data.x_val[:windows], data.y_val[:windows])))
    found = np.array(losses)
    final = float(found[-max(1, round(TAIL * len(found))) :].mean())
    return Run(losses[0], final, val if math.isfinite(val) else math.inf, len(losses), model.largest_logit(data.x[:16]))


def failed(run: Run, best: float) -> bool:
    """Whether a run lost more than half of what the best learning rate of its cell and seed gains.

    The definition of benchmarks/lr. Losing all of it is none: with layer norms a far too high rate of Adam ends at a
    loss between the first and the best, at any rate up to where weights overflow.
    """
    return not run.final < (run.initial + best) / 2
