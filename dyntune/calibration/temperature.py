r"""The temperature that makes logits most likely: one number, by Newton's method where its likelihood is convex.

With :math:`\beta = 1/T` the negative log-likelihood :math:`\sum_i \log \sum_k e^{\beta z_{ik}} - \beta z_{i y_i}` is
convex, its slope :math:`\sum_i E_{p_i}[z_i] - z_{i y_i}` and its curvature :math:`\sum_i Var_{p_i}[z_i]`. Steps are
taken in :math:`\log \beta`, where the error is about symmetric, and bisected where Newton's leaves the bracket.

Source: Guo et al. (2017), arXiv:1706.04599; White (1982) for the error of a model that may be wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dyntune.calibration.outcomes import class_numbers
from dyntune.errors import InvalidArgumentError, NonFiniteError, RefusedError

__all__ = ["TemperatureFit", "checked_logits", "fit_temperature", "negative_log_likelihood", "predicted"]

# Of 1/T relative to the spread of the logits: beyond, probabilities are those of a coin or of a table.
WIDEST = 1e6
STEPS, RTOL = 100, 1e-12


@dataclass(frozen=True, kw_only=True)
class TemperatureFit:
    """The most likely temperature.

    Args:
        temperature: T.
        error: Standard error of log T; the sandwich's, right also where no temperature makes the model right.
        nll: Mean negative log-likelihood at it, nats a row.
        nll_before: At 1.
    """

    temperature: float
    error: float
    nll: float
    nll_before: float


def checked_logits(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits as (N, K) of classes or (N, L, 2) of yes-or-no problems, and the true one's place in the last dimension.

    Raises:
        InvalidArgumentError: Shapes that do not fit, or unknown labels.
        NonFiniteError: A logit is NaN or infinite.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    if z.ndim not in (1, 2) or z.size == 0 or len(y) != len(z):
        raise InvalidArgumentError(
            f"logits of shape {z.shape} with targets of shape {y.shape}: give (N,) or (N, K), N of both, N > 0."
        )
    if not np.isfinite(z).all():
        raise NonFiniteError(
            f"{int((~np.isfinite(z)).sum())} of {z.size} logits are NaN or infinite: no temperature makes them "
            "probabilities. A masked class is a large negative number instead."
        )
    if z.ndim == 1 or y.ndim == 2:
        if y.shape != z.shape or not np.isin(y, (0, 1)).all():
            raise InvalidArgumentError(
                f"targets of shape {y.shape} beside logits of shape {z.shape}: 0 and 1 of the same shape are needed "
                "for a positive class or labels, class numbers of shape (N,) for logits of shape (N, K)."
            )
        columns = z.reshape(len(z), -1)
        return np.stack([np.zeros_like(columns), columns], -1), y.reshape(columns.shape).astype(np.int64)
    if z.shape[1] < 2:
        raise InvalidArgumentError(f"logits of shape {z.shape}: of one class there is nothing to choose; give (N,).")
    return z, class_numbers(y, z.shape[1])


def predicted(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities over the last dimension at a temperature, as :func:`checked_logits` lays logits out."""
    z = logits / temperature
    z = z - z.max(-1, keepdims=True)
    p: np.ndarray = np.exp(z)
    p /= p.sum(-1, keepdims=True)
    return p


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """Of each row in nats, summed over its labels; shape (N,)."""
    z = logits / temperature
    highest = z.max(-1, keepdims=True)
    true = np.take_along_axis(z - highest, labels[..., None], -1)[..., 0]
    lost = np.log(np.exp(z - highest).sum(-1)) - true
    rows: np.ndarray = lost.reshape(len(lost), -1).sum(-1)
    return rows


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> TemperatureFit:
    """The most likely temperature of logits as :func:`checked_logits` lays them out.

    Raises:
        RefusedError: No positive finite temperature is most likely.
    """
    spread = float(logits.std(-1).mean())
    if not spread > 0:
        raise RefusedError("all logits of a row are the same: every temperature gives the same probabilities.")
    low, high = 1 / (WIDEST * spread), WIDEST / spread
    if _slope(logits, labels, low)[0].sum() >= 0:
        raise RefusedError(
            "the true classes have lower logits than the others on average: the likelihood grows with the temperature "
            "for ever. Look whether logits and targets belong together."
        )
    margins = np.take_along_axis(logits, labels[..., None], -1)[..., 0] - logits.max(-1)
    if bool((margins >= 0).all()) or _slope(logits, labels, high)[0].sum() <= 0:
        raise RefusedError(
            f"every one of {len(logits)} rows has its true class on top: the likelihood grows as the temperature "
            "falls, for ever. Give rows on which the model errs, as held-out ones."
        )
    beta = min(max(1.0, low), high)
    for _ in range(STEPS):
        slope, curvature = (float(x.sum()) for x in _slope(logits, labels, beta))
        low, high = (beta, high) if slope < 0 else (low, beta)
        # Newton on the slope as a function of log beta; its derivative there is beta times the curvature.
        step = slope / (beta * curvature) if curvature > 0 else math.inf
        tried = beta * math.exp(-step) if abs(step) < 5 else math.nan
        following = tried if low < tried < high else math.sqrt(low * high)
        done = abs(following / beta - 1) <= RTOL
        beta = following
        if done:
            break
    slopes, curvatures = _slope(logits, labels, beta)
    error = math.sqrt(float((slopes**2).sum())) / (beta * float(curvatures.sum()))
    return TemperatureFit(
        temperature=1 / beta,
        error=error,
        nll=float(negative_log_likelihood(logits, labels, 1 / beta).mean()),
        nll_before=float(negative_log_likelihood(logits, labels, 1.0).mean()),
    )


def _slope(logits: np.ndarray, labels: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """First and second derivative of each row's negative log-likelihood by 1/T; (N,) both."""
    centred = logits - logits.max(-1, keepdims=True)
    p = predicted(centred, 1 / beta)
    mean = (p * centred).sum(-1)
    true = np.take_along_axis(centred, labels[..., None], -1)[..., 0]
    variance = (p * (centred - mean[..., None]) ** 2).sum(-1)
    rows = len(logits)
    return (mean - true).reshape(rows, -1).sum(-1), variance.reshape(rows, -1).sum(-1)
