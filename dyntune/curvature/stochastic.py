"""Curvature as training meets it: of batches along their own steps, of the whole along its step, and forward-only.

Every function takes an :class:`Objective` and a diagonal preconditioner P (None for the identity) and returns an
:class:`Estimate` whose interval covers the choice of the batches (``covers="sampling"``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dyntune.errors import NonFiniteError
from dyntune.numerics.bracket import first_rise
from dyntune.numerics.random import stream_seed
from dyntune.numerics.vectors import Vector, dot
from dyntune.objective.batches import num_rows, split_rows
from dyntune.objective.directional import along_gradient
from dyntune.objective.hvp import second_derivative
from dyntune.objective.objective import Objective, differentiate
from dyntune.objective.state import BorrowedBuffers
from dyntune.records import Estimate, Status

__all__ = ["batch_sharpness", "critical_learning_rate", "directional_sharpness"]

LEVEL = 0.95
# Parts that one batch is cut into for a forward-only critical rate: fewer than four say little about their spread.
CHUNKS = 4
# Bisection stops at 1/16, as in arXiv:2601.16979: far below the spread between batches.
CRITICAL_RATIO = 1 + 1 / 16
# The search begins at a step of one percent of the largest weight; the answer does not depend on it.
FIRST_STEP = 0.01


def student_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Mean and two-sided Student t interval; infinite for fewer than two values."""
    from scipy.special import stdtrit

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _check_finite(curved: float, slope: float) -> None:
    if not (math.isfinite(curved) and math.isfinite(slope)):
        raise NonFiniteError(
            f"the curvature along the step is {curved:g} and the slope {slope:g}: the loss or its derivatives overflow "
            "at these parameters. Has the run diverged? Measure an earlier checkpoint."
        )


def _unit(scale: Vector | None) -> str:
    return "loss / parameter^2" if scale is None else "1 / learning rate"


def _status(count: int) -> tuple[Status, str]:
    return (Status.OK, "") if count > 1 else (Status.ONE_BATCH, Status.ONE_BATCH.value)


def batch_sharpness(objective: Objective, scale: Vector | None) -> Estimate:
    """Mean over batches of ``d.H_B d / d.g_B``, ``d = P^-1 g_B``: it belongs to the size of these batches.

    Source: Andreyev and Beneventano (2024), arXiv:2412.20553.
    """
    values = []
    with objective.differentiating() as buffers:
        for index in range(len(objective.batches)):
            curved, slope = along_gradient(objective.batch_loss(index, buffers).value, objective.tensors, scale)
            _check_finite(curved, slope)
            if slope > 0:
                values.append(curved / slope)
    rows = sorted({num_rows(b) for b in objective.batches})
    size = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    if not values:
        return _refused("every batch has a zero gradient: there is no direction to measure along", _unit(scale))
    mean, low, high = student_interval(values)
    status, reason = _status(len(values))
    return Estimate(
        value=mean,
        low=low,
        high=high,
        level=LEVEL,
        unit=_unit(scale),
        method=f"batch sharpness, {len(values)} batches of {size} rows",
        covers="sampling",
        status=status,
        reason=reason,
        num_products=len(objective.batches),
    )


def directional_sharpness(objective: Objective, scale: Vector | None) -> Estimate:
    """``d.Hd / d.g`` along the step of the whole objective, ``d = P^-1 g``; its interval by jackknife over batches."""
    tensors = objective.tensors
    count = len(objective.batches)
    with objective.differentiating() as buffers:
        gradient = objective.accumulate(lambda i: _batch_gradient(objective, i, buffers))
        direction = gradient if scale is None else list(torch._foreach_div(gradient, scale))
        curved, sloped = np.zeros(count), np.zeros(count)
        for index in range(count):
            loss = objective.batch_loss(index, buffers)
            own = differentiate(loss.value, tensors, create_graph=True)
            weight = float(loss.weight) if count > 1 else 1.0
            sloped[index] = weight * dot(direction, [g.detach() for g in own])
            curved[index] = weight * dot(direction, second_derivative(own, tensors, direction, keep=False))
    _check_finite(float(curved.sum()), float(sloped.sum()))
    if sloped.sum() <= 0:
        return _refused("the gradient is zero, or the preconditioned step does not descend", _unit(scale))
    value, low, high = _ratio_by_jackknife(curved, sloped)
    status, reason = _status(count)
    return Estimate(
        value=value,
        low=low,
        high=high,
        level=LEVEL,
        unit=_unit(scale),
        method=f"curvature along the step, {count} batches",
        covers="sampling",
        status=status,
        reason=reason,
        num_products=count,
    )


def _batch_gradient(objective: Objective, index: int, buffers: BorrowedBuffers) -> tuple[Vector, float | torch.Tensor]:
    loss = objective.batch_loss(index, buffers)
    return differentiate(loss.value, objective.tensors), loss.weight


def _ratio_by_jackknife(top: Any, bottom: Any) -> tuple[float, float, float]:
    """Ratio of two sums with its delete-one jackknife interval (the direction is held fixed)."""
    from scipy.special import stdtrit

    value, count = float(top.sum() / bottom.sum()), len(top)
    if count < 2:
        return value, -math.inf, math.inf
    without = (top.sum() - top) / (bottom.sum() - bottom)
    error = math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum()))
    half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * error
    return value, value - half, value + half


def critical_learning_rate(objective: Objective, scale: Vector | None) -> Estimate:
    """Smallest rate at which one step along each part's own ``P^-1 g`` raises that part's loss: forward passes only.

    The parts are the batches, or four cuts of a single one. Averaged as critical sharpness 2 / rate, so the value is
    their harmonic mean. No double backward, so it works where nothing else does; it is an optimistic bound on
    2 / lambda_max, and with BatchNorm it was measured two to six times too high.

    Source: Kalra and Barkeshli (2023); arXiv:2601.16979.
    """
    if len(objective.batches) == 1:
        objective = objective.on(split_rows(objective.batches[0], CHUNKS))
    inverse = []
    with objective.measuring() as buffers:
        for index in range(len(objective.batches)):
            found = _critical_of(objective, index, scale, buffers)
            if found is not None:
                inverse.append(1 / found)
    if not inverse:
        return _refused("no part of the data has a finite critical rate along its step", "learning rate")
    mean, low, high = student_interval(inverse)
    status, reason = _status(len(inverse))
    return Estimate(
        value=1 / mean,
        low=1 / high,
        high=1 / low if low > 0 else math.inf,
        level=LEVEL,
        unit="learning rate",
        method=f"forward-only line search, {len(inverse)} parts of the data, +6%",
        covers="sampling",
        status=status,
        reason=reason,
    )


def _critical_of(objective: Objective, index: int, scale: Vector | None, buffers: BorrowedBuffers) -> float | None:
    """Critical rate of one batch along its own step; None where there is none."""
    own = objective.parameters
    # One stream for all evaluations of a batch: with dropout, other masks would drown the rise.
    seed = stream_seed(objective.seed, index)

    def loss_at(rate: float) -> float:
        buffers.renew()
        steps = zip(own.items(), direction, strict=True)
        moved = {name: torch.sub(p.detach(), d, alpha=rate) for (name, p), d in steps}
        with objective.training_pass(index, moved, autocast=None, seed=seed) as loss:
            return float(loss.value)

    buffers.renew()
    with objective.training_pass(index, own, autocast=None, seed=seed) as loss:
        gradient = differentiate(loss.value, objective.tensors)
    direction = gradient if scale is None else list(torch._foreach_div(gradient, scale))
    if not dot(direction, gradient) > 0:
        return None
    size = max(float(d.abs().max()) for d in direction)
    weight = max(float(p.detach().abs().max()) for p in objective.tensors) or 1.0
    low, high = first_rise(loss_at, guess=FIRST_STEP * weight / size, ratio=CRITICAL_RATIO)
    return None if low == 0.0 or math.isinf(high) else math.sqrt(low * high)


def _refused(reason: str, unit: str) -> Estimate:
    return Estimate(
        value=None,
        low=-math.inf,
        high=math.inf,
        level=None,
        unit=unit,
        method="refused",
        covers="sampling",
        status=Status.REFUSED,
        reason=reason,
    )
