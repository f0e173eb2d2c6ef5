"""A column of a recorded run over its steps, with intervals and the stability limit where it is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError
from dyntune.monitor.ratios import LOSS
from dyntune.monitor.run import Array, Run
from dyntune.plots.style import BLUE, INK, ORANGE, PAPER, cleaned, label, new_axes, number, tidy

__all__ = ["RunData", "draw_run", "plot_run", "run_data"]

# The range that is shown reaches this far beyond the values, in shares of their range, to hold intervals and the limit;
# what lies farther off is cut and said in words.
_MARGIN = 1.0
_NAMES = {
    "batch": "batch sharpness",
    "directional": "directional sharpness",
    "preconditioned": "preconditioned lambda_max",
    "critical_lr": "critical learning rate",
    "stability/lr_ratio": "stability ratio (deterministic)",
    "stability/batch_ratio": "stability ratio (stochastic)",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class RunData:
    """What the figure shows.

    Args:
        name: The column.
        steps: Shape (n,), ascending.
        values: Shape (n,); NaN where there is none.
        low: Lower ends of the intervals, shape (n,); the value itself where there is none.
        high: Upper ends, shape (n,).
        limit: Stability limit at every step, shape (n,); NaN where none is known.
        missing: Steps at which the column was refused or is not finite.
        uncertain: Whether each value has a status other than OK, shape (n,).
        title: One line above the figure.
        ylabel: The column with its unit.
        y_range: Range of values that is shown.
    """

    name: str
    steps: Array
    values: Array
    low: Array
    high: Array
    limit: Array
    missing: Array
    uncertain: NDArray[np.bool_]
    title: str
    ylabel: str
    y_range: tuple[float, float]


def run_data(run: Run, name: str | None = None) -> RunData:
    """What :func:`plot_run` shows, as plain data.

    Raises:
        InvalidArgumentError: The run has no such column, or none at all.
    """
    name = _default(run) if name is None else name
    at, found = run.series(name)
    low, high = run.interval(name)
    order = np.argsort(at, kind="stable")
    steps, values, low, high, limit = (x[order] for x in (at.astype(np.float64), found, low, high, run.limit(name)))
    status = np.array([name in row.status for row in run.rows if name in row.values], dtype=bool)[order]
    finite = np.isfinite(values)
    values = np.where(finite, values, np.nan)
    unit = run.columns[name].unit if name in run.columns else ""
    return RunData(
        name=name,
        steps=steps,
        values=values,
        low=np.where(np.isnan(low), values, low),
        high=np.where(np.isnan(high), values, high),
        limit=limit,
        missing=steps[~finite],
        uncertain=status & finite,
        title=_title(name, steps, values, limit),
        ylabel=f"{_spoken(name)}{f' ({unit})' if unit else ''}".replace("^2", "²"),
        y_range=_y_range(values, low, high, limit),
    )


def _default(run: Run) -> str:
    if not run.names:
        raise InvalidArgumentError("the run has no columns yet: there is nothing to draw.")
    known = [name for name in ("stability/lr_ratio", "stability/batch_ratio") if name in run]
    return (known + [name for name in run.names if name not in LOSS] + [run.names[0]])[0]


def _title(name: str, steps: Array, values: Array, limit: Array) -> str:
    finite = np.flatnonzero(np.isfinite(values))
    spoken = _spoken(name)
    if finite.size == 0:
        return f"{spoken}: nothing could be measured"
    last = finite[-1]
    text = f"{spoken} {number(values[last])} at step {int(steps[last])}"
    if np.isfinite(limit[last]) and limit[last] > 0:
        text += f", {number(values[last] / limit[last], 2)} of its limit"
    return text


def _spoken(name: str) -> str:
    """A column's name as people write it."""
    return cleaned(_NAMES.get(name, name).replace("lambda", "λ").replace("_", " "), limit=40)


def _y_range(values: Array, low: Array, high: Array, limit: Array) -> tuple[float, float]:
    shown = values[np.isfinite(values)]
    if shown.size == 0:
        return 0.0, 1.0
    bottom, top = float(shown.min()), float(shown.max())
    width = (top - bottom) or abs(top) or 1.0
    extra = np.concatenate([low, high, limit])
    near = extra[(extra >= bottom - _MARGIN * width) & (extra <= top + _MARGIN * width)]
    bottom, top = min(bottom, float(near.min(initial=bottom))), max(top, float(near.max(initial=top)))
    width = (top - bottom) or width
    if 0 < bottom < 0.5 * top:  # zero is near enough to say how large the values are
        return 0.0, top + 0.14 * width
    return bottom - 0.08 * width, top + 0.14 * width


def draw_run(ax: Axes, data: RunData) -> None:
    """Draw on given axes."""
    bottom, top = data.y_range
    ax.set_ylim(bottom, top)
    span = float(data.steps[-1] - data.steps[0]) or 1.0
    ax.set_xlim(float(data.steps[0]) - 0.02 * span, float(data.steps[-1]) + 0.02 * span)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    finite = np.isfinite(data.values)
    low, high = np.clip(data.low, bottom, top), np.clip(data.high, bottom, top)
    ax.fill_between(data.steps, low, high, where=finite, color=BLUE, alpha=0.22, linewidth=0)
    ax.plot(data.steps, data.values, color=BLUE, linewidth=1.6)
    for which, fill in ((finite & ~data.uncertain, BLUE), (data.uncertain, PAPER)):
        ax.plot(data.steps[which], data.values[which], color=BLUE, marker="o", markersize=4, linestyle="none", mfc=fill)
    _draw_limit(ax, data)
    if data.missing.size:
        height = top - 0.05 * (top - bottom)
        ax.plot(data.missing, np.full(data.missing.size, height), color=INK, linestyle="none", marker="x", markersize=6)
        text = "not established"
        if data.missing[0] - data.steps[0] > 0.4 * span:  # room for the words on the left
            label(ax, float(data.missing[0]), height, text, ha="right", va="center", offset=(-7.0, 0.0))
        else:
            label(ax, float(data.missing[-1]), height, text, va="center", offset=(7.0, 0.0))
    tidy(ax, title=data.title, xlabel="step", ylabel=data.ylabel, grid="y")


def _draw_limit(ax: Axes, data: RunData) -> None:
    known = np.isfinite(data.limit)
    if not known.any():
        return
    bottom, top = data.y_range
    across = ax.get_yaxis_transform()
    last = float(data.limit[known][-1])
    if not ((data.limit[known] >= bottom) & (data.limit[known] <= top)).any():
        where = "above" if last > top else "below"
        text = f"stability limit {number(last)}, {where} this figure"
        label(ax, 1.0, top if last > top else bottom, text, color=ORANGE, xycoords=across, ha="right", va="top")
        return
    ax.plot(data.steps[known], data.limit[known], color=ORANGE, linewidth=1.3, linestyle=(0, (5, 3)))
    label(ax, 1.0, last, "stability limit", color=ORANGE, xycoords=across, va="center", offset=(6.0, 0.0), columns=10)


def plot_run(run: Run, name: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw a column of a run over its steps, with its intervals and, where known, its stability limit.

    Open circles are values whose status is not OK, crosses steps at which none was established.

    Args:
        run: What :func:`dyntune.load_run` or :func:`dyntune.trace_checkpoints` returned.
        name: Which column; default the stability ratio, or else the first column besides the loss.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Returns:
        The axes.

    Raises:
        InvalidArgumentError: The run has no such column, or none at all.

    Example:
        >>> from dyntune.monitor.run import Row, Run
        >>> run = Run(rows=(Row(step=0, values={"loss": 2.0}), Row(step=10, values={"loss": 1.0})))
        >>> plot_run(run).get_title(loc="left")
        'loss 1 at step 10'
    """
    axes = new_axes(height=2.8) if ax is None else ax
    draw_run(axes, run_data(run, name))
    return axes
