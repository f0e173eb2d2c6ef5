"""The charts of a run: how far from the edge, loss, learning rate, gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from dyntune.monitor.ratios import GRADIENT_NORM, LEARNING_RATE, LOSS, first_column, nearest_ratio, stability_ratios
from dyntune.monitor.run import Run
from dyntune.plots.style import number
from dyntune.report.axis import LOG_RATIO, Axis
from dyntune.report.chart import Chart, Series, chart
from dyntune.report.envelope import envelope
from dyntune.report.words import unit

__all__ = ["distance", "edge", "training"]

MOST_RATES = 4  # learning rates of parameter groups in one chart: more cannot be told apart
FAR = 8.0  # stability ratio from which 1 would lie too low on a linear axis to see what is below
LOOKS = ("blue", "green", "muted", "orange")


def distance(run: Run) -> str:
    """The latest distance from the edge in words, or why there is none."""
    ratio = nearest_ratio(stability_ratios(run))
    if ratio is None or ratio.last is None:
        return "No stability ratio was established: how far the edge is cannot be said from this run."
    value, step = float(ratio.values[ratio.last]), int(ratio.steps[ratio.last])
    of = "threshold along the step" if ratio.kind == "along the step" else f"{ratio.kind} threshold"
    if not value > 0:
        return f"At step {step:,} curvature was not positive: no learning rate is at the {of} there."
    if value < 1:
        return (
            f"At the curvature of step {step:,} the learning rate could be {number(1 / value)} times as large before "
            f"it reaches the {of}. Curvature answers to the rate, so this is a distance and not a suggestion."
        )
    return f"At the curvature of step {step:,} the learning rate is {number(value)} times the one at the {of}."


def edge(run: Run, steps: Axis) -> Chart | None:
    """The stability ratios; None without any."""
    ratios = stability_ratios(run)
    if not ratios:
        return None
    names = {
        "deterministic": "deterministic (full batch)",
        "stochastic": "stochastic (small batches)",
        "along the step": "along the step",
    }
    return chart(
        "Stability ratio",
        [
            Series(name=names[r.kind], points=envelope(r.steps, r.values, r.low, r.high), look=look)
            for r, look in zip(ratios, LOOKS, strict=False)
        ],
        steps=steps,
        note=(
            "How far the learning rate has come towards the largest one that is stable at that step's curvature. 1 is "
            "the threshold that the name says. Training is drawn to it, and the best learning rates train there: 1 is "
            "no danger by itself."
        ),
        levels=((1.0, "threshold"),),
        from_zero=True,
        log_ratio=math.inf if max(float(np.nanmax(r.values, initial=0.0)) for r in ratios) < FAR else LOG_RATIO,
    )


def training(run: Run, steps: Axis) -> Iterator[Chart]:
    """Loss, learning rate and gradient norm, where they were recorded."""
    for title, names, note in (
        ("Loss", LOSS, "As it was given to the monitor, batch by batch."),
        ("Learning rate", LEARNING_RATE, ""),
        ("Gradient norm", GRADIENT_NORM, "Length of the whole gradient, as the optimizer takes it."),
    ):
        name = first_column(run, names)
        if name is None:
            continue
        columns = [name]
        if names is LEARNING_RATE:
            columns += [n for n in run.names if n.startswith(f"{name}/")][: MOST_RATES - 1]
        series = [
            Series(
                name=title.lower() if len(columns) == 1 else f"group {c.removeprefix(name).strip('/') or '0'}",
                points=envelope(*run.series(c), *run.interval(c)),
                look=look,
            )
            for c, look in zip(columns, LOOKS, strict=False)
        ]
        binned = any(s.points.binned for s in series)
        more = "Line: the median of a stretch of steps; shaded: from the lowest to the highest." if binned else ""
        shown = "" if unit(run, name) in ("1", title.lower()) else unit(run, name)
        # A rate that is warmed up and decayed to nothing is read more easily as it is.
        ratio = math.inf if names is LEARNING_RATE else LOG_RATIO
        note = " ".join(filter(None, (note, more)))
        yield chart(title, series, steps=steps, unit=shown, note=note, from_zero=True, log_ratio=ratio)
