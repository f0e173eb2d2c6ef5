"""Curvature as training meets it: of batches along their own steps, of the whole along its step, and forward-only.

Every function takes an :class:`Objective` and a diagonal preconditioner P (None for the identity; held fixed) and
returns an :class:`Estimate` whose interval covers the choice of the batches (``covers="sampling"``), as if they had
been drawn independently from a population.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from dyntune.curvature.hessian import HessianOperator
from dyntune.errors import DyntuneError, HVPUnsupportedError, NonFiniteError
from dyntune.numerics.bracket import first_rise
from dyntune.numerics.random import stream_seed
from dyntune.numerics.student import student_interval
from dyntune.numerics.vectors import Vector, dot
from dyntune.objective.batches import num_rows, split_rows
from dyntune.objective.directional import along_gradient
from dyntune.objective.hvp import first_line, is_unsupported, second_derivative, twice_differentiable
from dyntune.objective.objective import Objective, differentiate
from dyntune.objective.state import BorrowedBuffers
from dyntune.records import Estimate, Status

__all__ = ["batch_sharpness", "critical_learning_rate", "directional_sharpness"]

Floats: TypeAlias = npt.NDArray[np.float64]

LEVEL = 0.95
# Parts that one batch is cut into for a forward-only critical rate: fewer than four say little about their spread.
CHUNKS = 4
# Directional sharpness needs two halves of the batches, and two in each when one is left out.
HALVED = 4
# The gradient's squared length, unbiased, has to exceed its standard error this many times before a ratio over it is
# trusted. In 64 simulated linear regressions (600 draws each of 4 to 32 batches; squared signal 0.03 to 77 times its
# noise, in directions of low and of high curvature) the interval covered at worst 88% without this demand, 92% at 1,
# and at nominal 95% from 1.5 on; 2 keeps a margin where the noise is the larger (98% at worst there, 95% at 1.5), and
# from a signal of 8 on costs no width.
RESOLVED = 2.0
# Bisection stops at 1/16, as in arXiv:2601.16979: far below the spread between batches.
CRITICAL_RATIO = 1 + 1 / 16
# The search begins at a step of one percent of the largest weight; the answer depends on it only where the loss crosses
# its start more than once.
FIRST_STEP = 0.01


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


@contextmanager
def _second_derivatives(objective: Objective) -> Iterator[None]:
    """Where the model holds operations whose second derivative may lack terms, verify a product once; type errors.

    Raises:
        HVPUnsupportedError: There is no second derivative, or it is wrong.
    """
    try:
        # A marked backward would be found in every graph; one that detaches only shows beside finite differences.
        if objective.layout.worst([float(bool(objective.suspects))])[0]:
            with HessianOperator(objective, method="exact").session():
                pass
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not is_unsupported(error) or (isinstance(error, DyntuneError) and error.__cause__ is None):
            raise
        raise HVPUnsupportedError(
            f"curvature along the step takes second derivatives, and the model has none: "
            f"{first_line(error.__cause__ or error)} Write that operation with torch functions that autograd follows "
            "twice, or ask for quantities=('lambda_max',), which falls back to finite differences, or 'critical_lr', "
            "which takes forward passes only."
        ) from error


def batch_sharpness(objective: Objective, scale: Vector | None) -> Estimate:
    """Mean over batches of ``d.H_B d / d.g_B``, ``d = P^-1 g_B``: it belongs to the size of these batches.

    Raises:
        HVPUnsupportedError: The model cannot be differentiated twice, or its second derivative is wrong.

    Source: Andreyev and Beneventano (2024), arXiv:2412.20553.
    """
    layout = objective.layout
    layout.refuse_native("batch sharpness")
    values = []
    with _second_derivatives(objective), objective.differentiating() as buffers:
        whole = None if scale is None else layout.spread_out(scale)
        with layout.together("measuring batch sharpness"):
            for index in range(len(objective.batches)):
                curved, slope = along_gradient(objective, objective.batch_loss(index, buffers).value, whole)
                _check_finite(curved, slope)
                if slope > 0:
                    values.append(curved / slope)
    values = layout.everybody(values)
    rows = sorted({int(n) for n in layout.everybody([num_rows(b) for b in objective.batches])})
    size = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    if not values:
        return _refused("every batch has a zero gradient: there is no direction to measure along", _unit(scale))
    left_out = objective.num_batches - len(values)
    mean, low, high = student_interval(values)
    status, reason = _status(len(values))
    return Estimate(
        value=mean,
        low=low,
        high=high,
        level=LEVEL,
        unit=_unit(scale),
        method=f"batch sharpness, {len(values)} batches of {size} rows"
        + (f"; {left_out} without a gradient left out" if left_out else ""),
        covers="sampling",
        status=status,
        reason=reason,
        num_products=objective.num_batches,
    )


def directional_sharpness(objective: Objective, scale: Vector | None) -> Estimate:
    """``d.Hd / d.g`` along the step of the whole objective, ``d = P^-1 g``.

    The value is that of the given batches together. The interval is for the population that they were drawn from, whose
    step is another: the noise of n batches adds ``tr(P^-1 S) / n`` to ``d.g`` and ``tr(P^-1 H P^-1 S) / n`` to ``d.Hd``
    (S: covariance of their gradients), which can be most of both. So it is laid around an estimate without that bias:
    ``d.Hd`` from a left and a right direction of different batches, neither of them the batch whose H stands between,
    and ``d.g`` from products of different batches. Its width is an infinitesimal jackknife through direction and
    curvature with Student's t. Where the gradient is not told from its noise, the interval is infinite and the
    status UNCERTAIN; so it is below four batches. The value is always inside, which makes the interval a little longer.

    Raises:
        HVPUnsupportedError: The model cannot be differentiated twice, or its second derivative is wrong.

    Cost: per batch three gradients (one with its graph) and two products.
    Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter 21 (infinitesimal jackknife);
    Hoeffding (1948), Ann. Math. Statist. 19(3) (means over different draws are unbiased).
    """
    count = len(objective.batches)
    if objective.layout.team is not None:
        raise HVPUnsupportedError(
            "directional sharpness over several processes is not supported yet: its interval needs the gradients of "
            "all batches side by side. Measure it on one process (process_group=None, an unsharded model)."
        )
    with _second_derivatives(objective), objective.differentiating() as buffers:
        found = _along_step(objective, scale, buffers)
    _check_finite(float(found.curved.sum()), float(found.sloped.sum()))
    slope = float(found.weights @ found.sloped)
    if slope <= 0:
        return _refused("the gradient is zero, or the preconditioned step does not descend", _unit(scale))
    value = float(found.weights @ found.curved) / slope
    low, high, reason = found.interval(value)
    status = Status.OK if not reason else (Status.ONE_BATCH if count == 1 else Status.UNCERTAIN)
    size = count if objective.adds_up else 1  # of a sum of losses over their mean
    return Estimate(
        value=size * value,
        low=size * low,
        high=size * high,
        level=LEVEL,
        unit=_unit(scale),
        method=f"curvature along the step, {count} batches",
        covers="sampling",
        status=status,
        reason=reason,
        num_products=2 * count if count >= HALVED else count,
    )


@dataclass(frozen=True)
class _AlongStep:
    """What each batch b says about the curvature along the step d of all; H, g and their means are weighted.

    Args:
        weights: Share of each batch in the loss; they add up to one.
        lengths: ``P^-1 g_b . g_b``.
        curved: ``d.H_b d``.
        sloped: ``d.g_b``.
        crossed: ``v.H_b u``, u and v the steps of the two halves of the other batches; empty below four batches.
        turned: ``P^-1 H d . g_b``: what another direction would change; empty below four batches.
    """

    weights: Floats
    lengths: Floats
    curved: Floats
    sloped: Floats
    crossed: Floats
    turned: Floats

    def interval(self, value: float) -> tuple[float, float, str]:
        """Interval for the population's ratio that holds `value`, too, and why there is none."""
        from scipy.special import stdtrit

        count, w = len(self.weights), self.weights
        if count == 1:
            return -math.inf, math.inf, Status.ONE_BATCH.value
        if count < HALVED:
            return -math.inf, math.inf, f"{count} batches; {HALVED} are needed to tell the step from its noise"
        same = float(w @ w)
        slope = (float(w @ self.sloped) - float(w**2 @ self.lengths)) / (1 - same)
        # Derivatives of d.Hd and d.g by the share of each batch.
        top = 2 * self.turned + self.curved - 3 * float(w @ self.curved)
        bottom = 2 * self.sloped - 2 * float(w @ self.sloped)
        if slope <= RESOLVED * _error(w * bottom):
            return -math.inf, math.inf, "the gradient is not told from its noise between batches; measure more of them"
        centre = float(w @ self.crossed) / slope
        half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * _error(w * (top - centre * bottom) / slope)
        return min(value, centre - half), max(value, centre + half), ""


def _error(parts: Floats) -> float:
    """Standard error of a sum of independent parts around zero."""
    return math.sqrt(len(parts) / (len(parts) - 1) * float(parts @ parts))


def _along_step(objective: Objective, scale: Vector | None, buffers: BorrowedBuffers) -> _AlongStep:
    tensors, count = objective.tensors, len(objective.batches)

    def step(gradient: Vector, total: float) -> Vector:
        mean = torch._foreach_div(gradient, total)
        return list(mean if scale is None else torch._foreach_div(mean, scale))

    weights, lengths, curved, sloped, crossed, turned = np.zeros((6, count))
    sums = [objective.space.zeros(), objective.space.zeros()]  # gradients of even and of odd batches
    for index in range(count):
        gradient, weight = _batch_gradient(objective, index, buffers)
        weights[index] = float(weight)
        lengths[index] = dot(step(gradient, 1.0), gradient)
        torch._foreach_add_(sums[index % 2], gradient, alpha=weights[index])
    totals = [float(weights[0::2].sum()), float(weights[1::2].sum())]
    direction = step(list(torch._foreach_add(sums[0], sums[1])), sum(totals))
    pushed = objective.space.zeros()  # H d
    halved = count >= HALVED
    for index in range(count):
        own = twice_differentiable(objective, objective.batch_loss(index, buffers).value)
        flat = [g.detach() for g in own]
        product = second_derivative(own, tensors, direction, keep=halved)
        curved[index], sloped[index] = dot(direction, product), dot(direction, flat)
        if halved:
            torch._foreach_add_(pushed, product, alpha=weights[index] / sum(totals))
            mine, half = index % 2, totals[index % 2] - weights[index]
            left = step(list(torch._foreach_sub(sums[mine], flat, alpha=weights[index])), half)
            right = step(sums[1 - mine], totals[1 - mine])
            crossed[index] = dot(right, second_derivative(own, tensors, left, keep=False))
    if halved:
        turn = step(pushed, 1.0)
        for index in range(count):
            turned[index] = dot(turn, _batch_gradient(objective, index, buffers)[0])
    return _AlongStep(weights / sum(totals), lengths, curved, sloped, crossed, turned)


def _batch_gradient(objective: Objective, index: int, buffers: BorrowedBuffers) -> tuple[Vector, float | torch.Tensor]:
    loss = objective.batch_loss(index, buffers)
    return differentiate(loss.value, objective.tensors), loss.weight


def critical_learning_rate(objective: Objective, scale: Vector | None) -> Estimate:
    """Smallest rate at which one step along each part's own ``P^-1 g`` raises that part's loss: forward passes only.

    The parts are the batches, or four cuts of a single one. Averaged as critical sharpness 2 / rate, so the value is
    the harmonic mean of the parts' rates and belongs to their size; a part whose loss never rises counts as an infinite
    rate, and one that does not descend at all is left out (status UNCERTAIN). The interval is Student's t on 1 / rate.
    No double backward, so it works where nothing else does; it is an optimistic bound on 2 / lambda_max, and with
    BatchNorm it was measured two to six times too high. Of several crossings the search finds one that doubling steps
    meet, from a hundredth of the largest weight.

    Accuracy: each part's rate to 3.1%, the middle of a bracket of ratio 1 + 1/16.
    Source: Kalra and Barkeshli (2023); arXiv:2601.16979.
    """
    layout = objective.layout
    layout.refuse_native("the critical learning rate")
    if objective.num_batches == 1:
        objective = objective.on(split_rows(objective.batches[0], CHUNKS))
    count = objective.num_batches
    with objective.measuring() as buffers:
        whole = None if scale is None else list(layout.spread_out(scale))
        with layout.together("measuring the critical learning rate"):
            rates = [_critical_of(objective, index, whole, buffers) for index in range(len(objective.batches))]
    inverse = layout.everybody([1 / rate for rate in rates if rate is not None])  # 1 / inf is 0
    if not any(inverse):
        return _refused("no part of the data has a finite critical rate along its step", "learning rate")
    mean, low, high = student_interval(inverse)
    status, reason = _status(len(inverse))
    if len(inverse) < count:
        status, reason = Status.UNCERTAIN, f"{count - len(inverse)} of {count} parts do not descend along their step"
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
    """Critical rate of one batch along its own step; infinite where it never rises, None where it never descends."""
    own = objective.present
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
    return None if low == 0.0 else math.sqrt(low * high)


def _refused(reason: str, unit: str) -> Estimate:
    return Estimate.refused(reason, unit=unit, method="refused")
