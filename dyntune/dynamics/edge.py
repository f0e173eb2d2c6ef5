r"""Is training noisy, oscillating at the edge of stability, or diverging?

Curvature along the last step comes free where one batch is evaluated twice, before and after it: with gradients g and
g' of that batch and the step d, :math:`g' - g = \bar H d` (the Hessian averaged over the step), so that

.. math:: \eta\lambda_d = \eta \frac{d^\top (g' - g)}{d^\top P d}, \qquad
          \eta\lambda_d = 1 - \frac{\langle g', P^{-1} g \rangle}{\langle g, P^{-1} g \rangle}
          \text{ for } d = -\eta P^{-1} g .

The largest stable value is 2 for gradient descent; :func:`dyntune.stability.threshold` has it for the others.

Why the autocorrelation alone cannot tell. Stable SGD on a parabola at :math:`\eta\lambda = x < 2` forgets by a factor
1 - x per step while noise keeps it going: lag 1 is negative, for x above 1 lag 2 is positive, and the amplitude neither
grows nor shrinks. In one dimension, with the noise of the batches taken out, lag 1 is -1 and lag 2 is x - 1 (derived):
at 1.9 that is the picture of the edge of stability. Only the curvature along the step, 1.9 there, tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from dyntune.dynamics.momentum import moment_products
from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from dyntune.records import Estimate, Status

__all__ = ["EdgeReading", "Regime", "classify", "directional_curvature", "step_curvature"]

# Lag 1 below minus this and lag 2 above it is an oscillation of period 2: more than half of the squared length takes
# part in it.
OSCILLATION = 0.5
# The amplitude over two steps may fall short of 1 by this much at the edge. On a parabola it is (x - 1)^2: 0.95 is
# x = 1.975, 1.3% below the limit.
AMPLITUDE_SLACK = 0.05
# How far below its limit the curvature along the step still counts as the edge: the x of that amplitude over 2.
EDGE_SHARE = (1 + math.sqrt(1 - AMPLITUDE_SLACK)) / 2


class Regime(Enum):
    """What successive gradients say of training; the value of each member is what it means for the user."""

    SMOOTH = "successive gradients agree: training moves on; the learning rate is not what holds it back."
    STATIONARY_NOISE = (
        "successive gradients disagree because noise carries the parameters back and forth, below the stability limit: "
        "training has arrived at its noise floor. A lower learning rate, or a larger batch, lowers the floor."
    )
    DAMPED = (
        "the gradient flips its sign at every step and shrinks: the step overshoots, below the stability limit. There "
        "is nothing to do."
    )
    EDGE = (
        "edge of stability: the gradient flips its sign at every step, at the stability limit, without the loss "
        "running away. The best learning rates train there; do not lower it for this reason."
    )
    DIVERGING = (
        "diverging: curvature along the step is above the stability limit, the gradient flips its sign and grows, and "
        "the loss is above its start. Go back to a checkpoint and lower the learning rate."
    )
    UNDETERMINED = "what was measured does not tell noise from oscillation; see the reason."


@dataclass(frozen=True, kw_only=True)
class EdgeReading:
    """A regime and why.

    Args:
        regime: What the evidence says; its value is the advice.
        reason: The evidence in words.
        ratio: Learning rate times curvature along the step over its largest stable value; refused where it was not
            measured.
    """

    regime: Regime
    reason: str
    ratio: Estimate

    def __str__(self) -> str:
        return f"{self.regime.name.lower().replace('_', ' ')}: {self.reason}"


def classify(
    lag_one: Estimate,
    lag_two: Estimate,
    amplitude: Estimate,
    *,
    raw_lag_one: Estimate | None = None,
    directional: Estimate | None = None,
    limit: float = 2.0,
    loss_above_start: bool | None = None,
) -> EdgeReading:
    """Tell stationary noise, the edge of stability and divergence apart.

    Oscillation is lag 1 below -0.5 and lag 2 above 0.5. It is called the *edge* only if its amplitude over two steps
    does not fall below 0.95 and learning rate times curvature along the step reaches its limit, less 1.3%; *diverging*
    only if, on top of that, amplitude and curvature are above 1 and the limit, and the loss is above its start. An
    interval decides with its end, a refused estimate not at all. Without the curvature an oscillation that does not
    shrink stays undetermined, because noise below the edge sustains one just as well.

    Args:
        lag_one: Noise-corrected, or of full batches (:attr:`Autocorrelation.best`).
        lag_two: Likewise.
        amplitude: Gradient length over two steps (:attr:`Autocorrelation.amplitude`).
        raw_lag_one: As batches show it (``Autocorrelation.raw[0]``): where noise is so large that `lag_one` was
            refused, a negative one says that training is stationary.
        directional: Learning rate times curvature along the step (:func:`step_curvature`), from one batch before and
            after a step.
        limit: Its largest stable value: ``float(dyntune.stability.threshold(optimizer))``.
        loss_above_start: Whether the loss, smoothed, is above where training began.

    Raises:
        InvalidArgumentError: A limit that is not positive.

    Accuracy: false alarms on stable noisy SGD and on full batches are tested at ratios from 0.05 to 1.025 of the limit;
    on training runs they are not calibrated here.
    Source: lag conditions: derived from the parabola; edge of stability as an attractor: Cohen et al. (2021),
    arXiv:2103.00065; negative lag 1 as stationarity: Chee and Toulis (2018), arXiv:1710.06382.

    Example:
        >>> def known(x):
        ...     return Estimate(value=x, low=x, high=x, level=1.0, unit="1", method="known", covers="numerical")
        >>> classify(known(-1.0), known(1.0), known(1.0), directional=known(2.0)).regime.name
        'EDGE'
        >>> classify(known(-1.0), known(0.9), known(1.0), directional=known(1.9)).regime.name
        'STATIONARY_NOISE'
        >>> classify(known(-1.0), known(0.9), known(1.0)).regime.name
        'UNDETERMINED'
    """
    if not limit > 0:
        raise InvalidArgumentError(f"limit={limit:g}: a stability limit is positive; for gradient descent it is 2.")
    ratio = _ratio(directional, limit)
    if lag_one.value is None and raw_lag_one is not None and raw_lag_one.high < 0:
        reason = f"noise hides the mean gradient, and lag 1 is {float(raw_lag_one):.2f} with it"
        return EdgeReading(regime=Regime.STATIONARY_NOISE, reason=reason, ratio=ratio)
    regime, reason = _regime(lag_one, lag_two, amplitude, ratio, loss_above_start)
    return EdgeReading(regime=regime, reason=reason, ratio=ratio)


def _regime(
    lag_one: Estimate, lag_two: Estimate, amplitude: Estimate, ratio: Estimate, loss_above_start: bool | None
) -> tuple[Regime, str]:
    if lag_one.value is None:
        return Regime.UNDETERMINED, f"lag 1 was refused: {lag_one.reason}"
    said = f"lag 1 is {lag_one.value:.2f}"
    if lag_one.low > 0:
        return Regime.SMOOTH, said
    below = ratio.value is not None and ratio.high < EDGE_SHARE
    if lag_two.value is None or amplitude.value is None:
        refused = lag_two if lag_two.value is None else amplitude
        return Regime.UNDETERMINED, f"{said}; lag 2 and the amplitude are needed: {refused.reason}"
    said += f", lag 2 {lag_two.value:.2f}, the amplitude over two steps {amplitude.value:.3f}"
    if ratio.value is not None:
        said += f", the curvature along the step {ratio.value:.3f} of its limit"
    if not (lag_one.high < -OSCILLATION and lag_two.low > OSCILLATION):
        possible = lag_one.low < -OSCILLATION and lag_two.high > OSCILLATION
        if lag_one.high >= 0:
            return Regime.UNDETERMINED, f"{said}; its interval holds zero"
        if possible and not below and not amplitude.high < 1 - AMPLITUDE_SLACK:
            return Regime.UNDETERMINED, f"{said}; the intervals leave an oscillation possible"
        return Regime.STATIONARY_NOISE, f"{said}: no oscillation of period 2"
    if amplitude.high < 1 - AMPLITUDE_SLACK:
        return Regime.DAMPED, said
    if ratio.value is None:
        return Regime.UNDETERMINED, f"{said}; evaluate one batch before and after a step for the curvature along it"
    if below:
        return Regime.STATIONARY_NOISE, f"{said}: an oscillation below the limit, kept up by noise"
    if ratio.low < EDGE_SHARE or amplitude.low < 1 - AMPLITUDE_SLACK:
        return Regime.UNDETERMINED, f"{said}; the intervals leave both sides of the limit possible"
    if ratio.low > 1 and amplitude.low > 1:
        if loss_above_start is None:
            return Regime.UNDETERMINED, f"{said}: it grows; whether the loss is above its start is not known"
        if loss_above_start:
            return Regime.DIVERGING, f"{said}, and the loss is above its start"
        return Regime.EDGE, f"{said}: it grows, with the loss below its start"
    return Regime.EDGE, said


def _ratio(directional: Estimate | None, limit: float) -> Estimate:
    if directional is None or directional.value is None:
        return Estimate(
            value=None,
            low=-math.inf,
            high=math.inf,
            level=None,
            unit="limit",
            method="none",
            covers="sampling",
            status=Status.REFUSED,
            reason="not measured" if directional is None else directional.reason,
        )
    return Estimate(
        value=directional.value / limit,
        low=directional.low / limit,
        high=directional.high / limit,
        level=directional.level,
        unit="limit",
        method=directional.method,
        covers=directional.covers,
        status=directional.status,
        reason=directional.reason,
    )


def directional_curvature(
    gradient: Sequence[torch.Tensor], previous: Sequence[torch.Tensor], *, scale: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """``lr * curvature`` along a step ``-lr P^-1 previous``: ``1 - <g', P^-1 g> / <g, P^-1 g>``, without the rate.

    Args:
        gradient: Of the same batch at the new parameters.
        previous: At the old ones; the step went along it: no momentum, no clipping, no decay.
        scale: Diagonal P (:func:`dyntune.stability.scales.diagonal_scale`); None for the identity.

    Returns:
        On the device, float64. Shape (). Above 1 the gradient along the step flipped its sign, above 2 it grew.

    Raises:
        ShapeMismatchError: Lists of different lengths.

    Accuracy: exact for any loss, with the Hessian averaged over the step. Two batches would add their noise.
    Source: fundamental theorem of calculus.

    Example:
        >>> g = torch.tensor([2.0, 1.0])
        >>> round(float(directional_curvature([-0.9 * g], [g])), 3)
        1.9
    """
    along = list(previous) if scale is None else [g / s for g, s in zip(previous, scale, strict=True)]
    return 1 - moment_products(gradient, along)[0] / moment_products(previous, along)[0]


def step_curvature(
    gradient: Sequence[torch.Tensor],
    previous: Sequence[torch.Tensor],
    step: Sequence[torch.Tensor],
    *,
    lr: float,
    scale: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """``lr d.(g' - g) / d.Pd`` along any step d, with momentum, clipping or decay in it.

    Args:
        gradient: Of the same batch after the step.
        previous: Before it.
        step: New parameters minus old ones.
        lr: Learning rate.
        scale: Diagonal P; None for the identity.

    Returns:
        On the device, float64. Shape (). To be compared with :func:`dyntune.stability.threshold`.

    Raises:
        ShapeMismatchError: Lists of different lengths.

    Example:
        >>> d = torch.tensor([1.0, -2.0])
        >>> round(float(step_curvature([3.0 * d], [0.0 * d], [d], lr=0.5)), 6)
        1.5
    """
    if not len(gradient) == len(previous) == len(step):
        raise ShapeMismatchError(f"{len(gradient)} and {len(previous)} gradients for {len(step)} steps: one each.")
    change = torch._foreach_sub(list(gradient), list(previous))
    stretched = list(step) if scale is None else [d * s for d, s in zip(step, scale, strict=True)]
    return lr * moment_products(change, step)[0] / moment_products(stretched, step)[0]
