"""Calibration error with its interval and the value that perfect calibration would show: :func:`calibration_error`."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dyntune.calibration.estimators import ESTIMATORS, Kind
from dyntune.calibration.outcomes import Array, Classes, Outcomes, outcomes
from dyntune.errors import InvalidArgumentError
from dyntune.records import Estimate, Status, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CalibrationError", "calibration_error"]

LEVEL = 0.95
FALSE_CLAIMS = 0.05  # of miscalibration, where there is none
BATCH = 2_000_000  # weights at once: 16 MB


@dataclass(frozen=True, kw_only=True)
class CalibrationError:
    """How far probabilities are from frequencies.

    Args:
        error: With a bootstrap interval over rows.
        expected: What perfectly calibrated probabilities would show on as many rows: the mean of it.
        expected_high: Its 95% quantile: at or below, nothing can be told from perfect calibration.
        p_value: Of perfect calibration, against more error; in (0, 1].
        kind: Which estimator.
        each: For several classes or labels: the same of each, by name; `error` is their mean then.
        rows: How many.
        outcomes: Confidence and what came true, of each problem; for figures.
    """

    error: Estimate
    expected: float
    expected_high: float
    p_value: float
    kind: Kind
    rows: int
    each: dict[str, CalibrationError] = field(default_factory=dict)
    outcomes: tuple[Outcomes, ...] = field(default=(), repr=False)

    @property
    def miscalibrated(self) -> bool:
        """Whether it can be told from perfect calibration, with 5% false claims."""
        return self.p_value <= FALSE_CLAIMS

    def __float__(self) -> float:
        return float(self.error)

    def __str__(self) -> str:
        verdict = "miscalibrated" if self.miscalibrated else "not told from perfect calibration"
        return (
            f"{self.kind} calibration error {self.error}; perfect calibration shows {short_number(self.expected)} "
            f"(95% below {short_number(self.expected_high)}) on {self.rows:,} rows: {verdict} (p = {self.p_value:.3g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "error": self.error.to_dict(),
            "expected": self.expected,
            "expected_high": self.expected_high,
            "p_value": self.p_value,
            "miscalibrated": self.miscalibrated,
            "kind": self.kind,
            "rows": self.rows,
            "each": {name: part.to_dict() for name, part in self.each.items()},
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the reliability diagram (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_reliability

        return plot_reliability(self, ax=ax)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def calibration_error(
    probabilities: Array,
    targets: Array,
    *,
    kind: Kind = "smooth",
    classes: Classes = "top",
    num_resamples: int = 200,
    seed: int = 0,
) -> CalibrationError:
    """How far predicted probabilities are from frequencies, with an interval and what chance alone would show.

    Args:
        probabilities: Shape (N,): of the positive class; (N, K) with integer targets; (N, L) with targets (N, L) of 0
            and 1 for labels that do not exclude each other.
        targets: Class numbers (N,), or 0 and 1.
        kind: ``"smooth"``: no bins, no bias from their number. ``"debiased"``: root of the mean square over equal-mass
            bins less its noise; may be negative. ``"equal-mass"`` and ``"binned"``: the usual ones, biased upwards.
        classes: ``"top"``: the predicted class. ``"each"``: every class; the error is the mean over them.
        num_resamples: Bootstrap draws, and draws under perfect calibration; 39 at least, for a p-value below 5%.
        seed: Of both.

    Returns:
        The error, its interval, its value under perfect calibration and the p-value of that.

    Raises:
        InvalidArgumentError: Empty, shapes that do not fit, values outside [0, 1], unknown labels.
        NonFiniteError: A probability is NaN or infinite.

    Accuracy:
        Claims of miscalibration are exact for any number of rows: given the confidences, what perfect calibration
        shows is drawn from (5% false ones at most, ``tests/calibration``). The interval is the basic bootstrap's, which
        takes the estimator's bias off once; near zero, where errors cannot be negative, it is too short.
    Cost:
        Twice `num_resamples` evaluations: 0.1 s for 1,000 rows, a second for 10,000.
    Assumes:
        Independent rows that were not used to fit the model or its temperature; labels that do not exclude each other
        come true independently.
    Source:
        Blasiok, Nakkiran (2023), arXiv:2309.12236 (smooth); Kumar, Liang, Ma (2019), arXiv:1909.10155 (debiased);
        Broecker, Smith (2007) (resampling outcomes from the forecasts).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> f = rng.beta(5, 1.2, 2000)
        >>> calibration_error(f, rng.random(2000) < f).miscalibrated
        False
        >>> calibration_error(f, rng.random(2000) < f**2).miscalibrated
        True
    """
    if kind not in ESTIMATORS:
        raise InvalidArgumentError(f"kind={kind!r}: choose one of {', '.join(ESTIMATORS)}.")
    if num_resamples < 39:
        raise InvalidArgumentError(
            f"num_resamples={num_resamples}: an interval of 95% has 2.5% on each side, which takes 39 draws at least."
        )
    problems = outcomes(probabilities, targets, classes=classes)
    # Rows are drawn alike for all problems, and so is the class that comes true where they exclude each other; labels
    # come true by themselves. Means over problems are then draws of the mean.
    excluding = classes == "each" and len(problems) > 1 and problems[0].name.startswith("class")
    found = [_of(problem, kind, num_resamples, (seed, 0 if excluding else i)) for i, problem in enumerate(problems)]
    if len(found) == 1:
        return found[0][0]
    values = np.array([float(f[0]) for f in found])
    boot = np.mean([f[1] for f in found], axis=0)
    null = np.mean([f[2] for f in found], axis=0)
    return _record(
        float(values.mean()),
        boot,
        null,
        kind=kind,
        rows=found[0][0].rows,
        each={p.name: f[0] for p, f in zip(problems, found, strict=True)},
        problems=problems,
    )


def _of(
    problem: Outcomes, kind: Kind, count: int, seed: tuple[int, int]
) -> tuple[CalibrationError, np.ndarray, np.ndarray]:
    f, y, estimate = problem.confidence, problem.correct.astype(float), ESTIMATORS[kind]
    rows_rng, null_rng = np.random.default_rng(seed[0]), np.random.default_rng([*seed, 1])
    rows = len(f)
    boot, null = [], []
    for size in _sizes(count, rows):
        drawn = rows_rng.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(float)
        boot.append(estimate(f, y, drawn))
        at = null_rng.random((size, rows)) - problem.below
        null.append(estimate(f, (at >= 0) & (at < f), np.ones((size, rows))))
    value = float(estimate(f, y, np.ones((1, rows)))[0])
    bootstrap, under_null = np.concatenate(boot), np.concatenate(null)
    return _record(value, bootstrap, under_null, kind=kind, rows=rows, problems=(problem,)), bootstrap, under_null


def _sizes(count: int, rows: int) -> list[int]:
    """Draws in batches of bounded memory."""
    most = max(1, BATCH // rows)
    return [min(most, count - i) for i in range(0, count, most)]


def _record(
    value: float,
    boot: np.ndarray,
    null: np.ndarray,
    *,
    kind: Kind,
    rows: int,
    problems: tuple[Outcomes, ...],
    each: dict[str, CalibrationError] | None = None,
) -> CalibrationError:
    tail = (1 - LEVEL) / 2
    floor = -1.0 if kind == "debiased" else 0.0
    low, high = (float(np.clip(2 * value - np.quantile(boot, q), floor, 1.0)) for q in (1 - tail, tail))
    # Ties count against the claim, so that it is never made more often than it says.
    p_value = (1 + int((null >= value).sum())) / (1 + len(null))
    return CalibrationError(
        error=Estimate(
            value=value,
            low=min(low, value),
            high=max(high, value),
            level=LEVEL,
            unit="probability",
            method=f"{kind} estimator, basic bootstrap over rows",
            covers="sampling",
            status=Status.OK,
        ),
        expected=float(null.mean()),
        expected_high=float(np.quantile(null, 1 - FALSE_CLAIMS)),
        p_value=p_value,
        kind=kind,
        rows=rows,
        each=each or {},
        outcomes=problems,
    )
