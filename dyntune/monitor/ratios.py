"""Where the numbers of interest stand in a run, whoever recorded it, and the stability ratios that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dyntune.monitor.rows import Array
from dyntune.monitor.run import Run

__all__ = ["GRADIENT_NORM", "LEARNING_RATE", "LOSS", "Ratio", "first_column", "nearest_ratio", "stability_ratios"]

# Names by preference: of a monitor, of traced checkpoints.
LOSS = ("train/loss", "loss")
LEARNING_RATE = ("train/lr", "lr")
GRADIENT_NORM = ("grad/norm",)

# (what the threshold is of, columns that are ratios, columns that have a limit)
_KINDS = (
    (
        "deterministic",
        ("stability/lr_ratio",),
        ("curvature/lambda_max_preconditioned", "curvature/lambda_max", "preconditioned", "lambda_max"),
    ),
    ("stochastic", ("stability/batch_ratio",), ("curvature/batch_sharpness", "batch")),
    ("along the step", (), ("stability/step_curvature", "directional")),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ratio:
    """How near to a stability threshold training was: 1 is the threshold.

    Args:
        kind: Which threshold: ``"deterministic"`` (full batches), ``"stochastic"`` (small batches), or ``"along the
            step"`` (the deterministic one, for the direction of the step alone).
        column: The column that it was taken from.
        steps: Shape (m,), ascending.
        values: Shape (m,); NaN where it was refused.
        low: Lower ends of the intervals, shape (m,); NaN where there is none.
        high: Upper ends, shape (m,).
    """

    kind: str
    column: str
    steps: NDArray[np.int64]
    values: Array
    low: Array
    high: Array

    @property
    def last(self) -> int | None:
        """Index of the most recent value that is a number."""
        known = np.flatnonzero(np.isfinite(self.values))
        return int(known[-1]) if known.size else None


def first_column(run: Run, names: tuple[str, ...]) -> str | None:
    """The first of `names` that the run has."""
    return next((name for name in names if name in run), None)


def stability_ratios(run: Run) -> tuple[Ratio, ...]:
    """The ratios that the run holds, at most one of each kind.

    A column that is a ratio already comes first; else one with a stability limit is divided by it.

    Args:
        run: Any run.

    Returns:
        Those with at least one row, in the order deterministic, stochastic, along the step.

    Example:
        >>> from dyntune.monitor.run import Row
        >>> run = Run(rows=(Row(step=4, values={"lambda_max": 10.0, "lambda_max.limit": 20.0}),))
        >>> [(ratio.kind, ratio.values.tolist()) for ratio in stability_ratios(run)]
        [('deterministic', [0.5])]
    """
    found = []
    for kind, ratios, limited in _KINDS:
        name = first_column(run, ratios)
        if name is not None:
            found.append(_ratio(run, kind, name, None))
            continue
        name = first_column(run, tuple(name for name in limited if f"{name}.limit" in run))
        if name is not None:
            found.append(_ratio(run, kind, name, run.limit(name)))
    return tuple(found)


def nearest_ratio(ratios: tuple[Ratio, ...]) -> Ratio | None:
    """The ratio that is largest now: that of the threshold which training meets first.

    One whose last value is of the first half of the steps up to the newest is left aside, and so is that along the
    step, which is but one direction, where there is another.
    """
    known = [(int(ratio.steps[ratio.last]), ratio) for ratio in ratios if ratio.last is not None]
    newest = max((step for step, _ in known), default=0)
    fresh = [ratio for step, ratio in known if 2 * step >= newest]
    whole = [ratio for ratio in fresh if ratio.kind != "along the step"] or fresh
    return max(whole, key=lambda ratio: float(ratio.values[ratio.last or 0]), default=None)


def _ratio(run: Run, kind: str, name: str, limit: Array | None) -> Ratio:
    steps, values = run.series(name)
    low, high = run.interval(name)
    order = np.argsort(steps, kind="stable")
    scale = np.ones_like(values) if limit is None else np.where(limit > 0, limit, np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        values, low, high = (x[order] / scale[order] for x in (values, low, high))
    return Ratio(kind=kind, column=name, steps=steps[order], values=values, low=low, high=high)
