"""A temperature for logits, with its interval and what it does to calibration: :func:`suggest_temperature`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from dyntune.calibration.calibration_error import CalibrationError, calibration_error
from dyntune.calibration.estimators import ESTIMATORS, Kind
from dyntune.calibration.outcomes import Array, Classes, as_array, outcomes
from dyntune.calibration.temperature import (
    TemperatureFit,
    checked_logits,
    fit_temperature,
    negative_log_likelihood,
    predicted,
)
from dyntune.errors import InvalidArgumentError, RefusedError
from dyntune.records import Estimate, Recommendation, Status

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

__all__ = ["Temperature", "suggest_temperature"]

TemperatureObjective: TypeAlias = Literal["nll", "smooth", "debiased"]
DRAWS = 40  # of the bootstrap of a temperature that has no standard error: enough for its ends, few enough to wait for
LEVEL, QUANTILE = 0.95, 1.959964  # of the normal distribution
WIDE = math.log(2)  # half width of log T from which the temperature is not established to a factor of two
SOURCES = (
    "Guo et al. (2017), arXiv:1706.04599 (temperature scaling)",
    "White (1982) (standard error of a model that may be wrong)",
    "Blasiok, Nakkiran (2023), arXiv:2309.12236 (smooth calibration error)",
)
RULES = {
    "nll": "the temperature at which the targets are most likely; its interval from the sandwich error of log T",
    "smooth": "the temperature with the least smooth calibration error; its interval from the bootstrap",
    "debiased": "the temperature with the least debiased calibration error; its interval from the bootstrap",
}


@dataclass(frozen=True, kw_only=True)
class Temperature(Recommendation):
    """A temperature with calibration before it and, on rows that it was not fitted on, after it.

    Args:
        before: Calibration error at temperature 1.
        after: Of held-out rows: each fold at the temperature of the others. None where refused.
    """

    before: CalibrationError
    after: CalibrationError | None

    def scale(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits over the temperature."""
        return logits / float(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw reliability before and after (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_reliability

        return plot_reliability(self.before, ax=ax, after=self.after)


def suggest_temperature(
    logits: Array,
    targets: Array,
    *,
    objective: TemperatureObjective = "nll",
    kind: Kind = "smooth",
    classes: Classes = "top",
    num_folds: int = 5,
    num_resamples: int = 200,
    seed: int = 0,
    strict: bool = False,
) -> Temperature:
    """The temperature that calibrates logits, its interval, and calibration before and after it.

    Args:
        logits: Of held-out rows. Shape (N, K) with class numbers as targets; (N,) with 0 and 1; (N, L) with targets
            (N, L) of 0 and 1 for labels that do not exclude each other.
        targets: Class numbers (N,), or 0 and 1.
        objective: ``"nll"``: the likelihood, convex and with a standard error. ``"smooth"`` or ``"debiased"``: that
            calibration error itself; noisier.
        kind: Of the calibration errors that are reported, see :func:`dyntune.calibration_error`.
        classes: Likewise.
        num_folds: For the calibration after: each fold's rows at the temperature of the others; at least 2.
        num_resamples: Of bootstraps.
        seed: Of folds and bootstraps.
        strict: Raise when the status is not OK.

    Returns:
        ``value`` with its 95% interval, ``before``, ``after``, ``scale(logits)``. Where 1 lies inside the interval a
        check says so: nothing has to be changed. UNCERTAIN: the interval is wider than a factor of two to a side.
        REFUSED: no positive temperature is most likely (every row right, or worse than chance).

    Raises:
        InvalidArgumentError: Shapes that do not fit, unknown labels, fewer rows than folds.
        NonFiniteError: A logit is NaN or infinite.
        RefusedError, NotConvergedError: With ``strict=True``.

    Accuracy:
        Interval of ``"nll"``: covers a known temperature in 91 to 98% of draws at nominal 95% (``tests/suggest``). That
        of the others was not measured.
    Cost:
        A dozen passes over the logits on the CPU in float64, folds and bootstraps beside.
    Assumes:
        Independent rows that the model was not trained on.
    Source:
        Guo et al. (2017), arXiv:1706.04599.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> z = rng.standard_normal((2000, 10)) * 2
        >>> y = (z + rng.gumbel(size=z.shape)).argmax(1)  # a draw from softmax(z)
        >>> found = suggest_temperature(2.5 * z, y)
        >>> found.low < 2.5 < found.high, found.before.miscalibrated, found.after.miscalibrated
        (True, True, False)
    """
    if objective not in RULES:
        raise InvalidArgumentError(f"objective={objective!r}: choose one of {', '.join(RULES)}.")
    given = as_array(targets, "targets")
    z, y = checked_logits(as_array(logits, "logits"), given)
    if not 2 <= num_folds <= len(z):
        raise InvalidArgumentError(f"num_folds={num_folds} of {len(z)} rows: at least 2, and a row for each.")
    rows = _Rows(z, y, given, objective, classes)

    def judged(p: np.ndarray) -> CalibrationError:
        return calibration_error(
            rows.plain(p), given, kind=kind, classes=classes, num_resamples=num_resamples, seed=seed
        )

    before = judged(predicted(z, 1.0))
    try:
        fit = fit_temperature(z, y)
        value, low, high = rows.interval(fit, draws=min(DRAWS, num_resamples), seed=seed)
        held = rows.held_out(num_folds, seed)
    except RefusedError as error:
        refused = _refused(objective, before, str(error))
        if strict:
            refused.require()
        return refused
    after = judged(held)
    # log(p) of what is already a probability is its logit again, up to a constant of the row.
    held_nll = negative_log_likelihood(np.log(held.clip(np.finfo(float).tiny)), y, 1.0)
    gain = _mean(held_nll - negative_log_likelihood(z, y, 1.0), "nats / row")
    wide = math.log(high / low) / 2 > WIDE
    checks = [f"held-out rows: negative log-likelihood changes by {gain}"]
    if low <= 1 <= high:
        checks.append("1 lies inside the interval: the logits can stay as they are")
    result = Temperature(
        knob="temperature",
        value=value,
        low=low,
        high=high,
        level=LEVEL if objective == "nll" else None,
        status=Status.UNCERTAIN if wide else Status.OK,
        reason=f"{len(z)} rows leave it open by a factor of {math.sqrt(high / low):.3g} to a side" if wide else "",
        rule=RULES[objective],
        sources=SOURCES,
        evidence={
            "negative log-likelihood at 1, nats a row": fit.nll_before,
            "negative log-likelihood at its best temperature": fit.nll,
            "change of it on held-out rows": gain,
            f"{kind} calibration error before": before.error,
            f"{kind} calibration error after, held-out": after.error,
            "of perfect calibration": after.expected,
        },
        checks=tuple(checks),
        cost=0.0,
        before=before,
        after=after,
    )
    if strict:
        result.require()
    return result


@dataclass(frozen=True)
class _Rows:
    """Logits with their targets, and what is asked of them."""

    logits: np.ndarray  # (N, K), or (N, L, 2) for labels
    labels: np.ndarray  # (N,) or (N, L)
    targets: np.ndarray  # as the user gave them
    objective: TemperatureObjective
    classes: Classes

    def where(self, chosen: np.ndarray) -> _Rows:
        return replace(self, logits=self.logits[chosen], labels=self.labels[chosen], targets=self.targets[chosen])

    def plain(self, p: np.ndarray) -> np.ndarray:
        """Probabilities as :func:`calibration_error` takes them: (N,), (N, K) or (N, L)."""
        if self.labels.ndim == 1:
            return p
        positive: np.ndarray = p[..., 1]
        return positive[:, 0] if self.targets.ndim == 1 else positive

    def temperature(self) -> float:
        """By the objective."""
        fit = fit_temperature(self.logits, self.labels)
        return fit.temperature if self.objective == "nll" else self.least_error(fit.temperature)

    def least_error(self, start: float, weights: np.ndarray | None = None) -> float:
        """The temperature of the least calibration error within five octaves around `start`."""
        rows = np.ones((1, len(self.logits))) if weights is None else weights[None]

        def error(log_t: float) -> float:
            p = self.plain(predicted(self.logits, math.exp(log_t)))
            problems = outcomes(p, self.targets, classes=self.classes)
            kind: Kind = "smooth" if self.objective == "smooth" else "debiased"
            parts = [abs(ESTIMATORS[kind](o.confidence, o.correct.astype(float), rows)[0]) for o in problems]
            return float(np.mean(parts))

        # The error is not smooth in T, so that a grid finds its valley, in steps of 2%, then of 0.1%: both are below
        # the sampling error of any T that a thousand rows establish.
        centre = math.log(start)
        at = float(min(centre + np.arange(-87, 88) * 0.02, key=error))
        return math.exp(float(min(at + np.arange(-20, 21) * 0.001, key=error)))

    def interval(self, fit: TemperatureFit, *, draws: int, seed: int) -> tuple[float, float, float]:
        """The temperature with its interval."""
        if self.objective == "nll":
            half = math.exp(QUANTILE * fit.error)
            return fit.temperature, fit.temperature / half, fit.temperature * half
        value, count = self.least_error(fit.temperature), len(self.logits)
        drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(float)
        found = [self.least_error(fit.temperature, w) for w in drawn]
        low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return value, min(float(low), value), max(float(high), value)

    def held_out(self, folds: int, seed: int) -> np.ndarray:
        """Probabilities of every row at the temperature of the other folds."""
        fold = np.random.default_rng(seed).permutation(np.arange(len(self.logits)) % folds)
        made = np.empty_like(self.logits)
        for i in range(folds):
            made[fold == i] = predicted(self.logits[fold == i], self.where(fold != i).temperature())
        return made


def _mean(values: np.ndarray, unit: str) -> Estimate:
    half = QUANTILE * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return Estimate(
        value=mean,
        low=mean - half,
        high=mean + half,
        level=LEVEL,
        unit=unit,
        method="mean over rows",
        covers="sampling",
    )


def _refused(objective: str, before: CalibrationError, reason: str) -> Temperature:
    return Temperature(
        knob="temperature",
        value=None,
        low=0.0,
        high=math.inf,
        level=None,
        status=Status.REFUSED,
        reason=reason,
        rule=RULES[objective],
        sources=SOURCES,
        evidence={"calibration error before": before.error},
        checks=(),
        cost=0.0,
        before=before,
        after=None,
    )
