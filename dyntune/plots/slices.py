"""The loss along a line, with what gradient and curvature predict for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from dyntune.curvature.slices import Array, LossSlice
from dyntune.plots.style import BLUE, MUTED, ORANGE, label, new_axes, number, tidy

__all__ = ["SliceData", "draw_slice", "plot_slice", "slice_data"]

# A prediction may leave the measured losses by this share of their range before it is cut: enough to see where it goes.
_MARGIN = 0.35
_FINE = 400  # points of the drawn parabola


@dataclass(frozen=True, kw_only=True, eq=False)
class SliceData:
    """What the figure shows.

    Args:
        distances: t, shape (n,).
        losses: Shape (n,); NaN where not finite.
        spoiled: t of the losses that are not finite.
        fine: t of the drawn prediction, shape (m,); empty without one.
        predicted: The prediction there, shape (m,).
        reach: Up to which distance from t = 0 the prediction is within 10 %; None without one.
        ends: Names of t by position: the present weights, or the two ends of a path.
        title: One line above the figure.
        xlabel: What t is.
        y_range: Range of losses that is shown.
    """

    distances: Array
    losses: Array
    spoiled: Array
    fine: Array
    predicted: Array
    reach: float | None
    ends: tuple[tuple[float, str], ...]
    title: str
    xlabel: str
    y_range: tuple[float, float]


def slice_data(result: LossSlice) -> SliceData:
    """What :func:`plot_slice` shows, as plain data."""
    finite = result.finite
    losses = np.where(finite, result.losses, np.nan)
    fine = (
        np.linspace(result.distances[0], result.distances[-1], _FINE) if result.predicted is not None else np.empty(0)
    )
    predicted = np.empty(0)
    if result.slope is not None and result.curvature is not None:
        predicted = result.loss + result.slope * fine + 0.5 * result.curvature * fine**2
    path = result.kind == "path"
    return SliceData(
        distances=result.distances,
        losses=losses,
        spoiled=result.distances[~finite],
        fine=fine,
        predicted=predicted,
        reach=result.reach(),
        ends=((0.0, "start"), (1.0, "end")) if path else ((0.0, "here"),),
        title=_title(result),
        xlabel=_xlabel(result),
        y_range=_y_range(losses, predicted),
    )


def _xlabel(result: LossSlice) -> str:
    return f"t, {result.unit}" if result.kind == "path" else f"t along {result.direction} ({result.unit})"


def _title(result: LossSlice) -> str:
    if result.kind == "path":
        barrier = result.barrier
        if barrier is None or not math.isfinite(barrier):
            return "Between the two: a loss that is not finite"
        if barrier <= result.rounding:
            return "Between the two: no barrier"
        return f"Between the two: a barrier of {number(barrier)}"
    reach = result.reach()
    if not reach:
        return "The quadratic model does not reach the nearest point"
    whole = reach >= float(np.abs(result.distances).max())
    return f"Quadratic within 10 % {'everywhere shown' if whole else f'up to |t| = {number(reach, 2)}'}"


def _y_range(losses: Array, predicted: Array) -> tuple[float, float]:
    shown = losses[np.isfinite(losses)]
    if shown.size == 0:
        return 0.0, 1.0
    low, high = float(shown.min()), float(shown.max())
    width = (high - low) or abs(high) or 1.0
    if predicted.size:
        low = max(min(low, float(predicted.min())), low - _MARGIN * width)
        high = min(max(high, float(predicted.max())), high + _MARGIN * width)
    return low - 0.06 * (high - low or width), high + 0.16 * (high - low or width)


def draw_slice(ax: Axes, data: SliceData) -> None:
    """Draw on given axes."""
    ax.set_xlim(float(data.distances[0]), float(data.distances[-1]))
    ax.set_ylim(*data.y_range)
    bottom, top = data.y_range
    upward = ax.get_xaxis_transform()
    if data.reach:
        ax.axvspan(-data.reach, data.reach, color=ORANGE, alpha=0.09, linewidth=0)
    for t, name in data.ends:
        ax.axvline(t, color=MUTED, linewidth=0.8, ymax=0.92)
        label(ax, t, 0.93, name, color=MUTED, xycoords=upward, ha="center", va="bottom")
    if data.fine.size:
        ax.plot(data.fine, data.predicted, color=ORANGE, linewidth=1.3, linestyle=(0, (5, 3)))
    ax.plot(data.distances, data.losses, color=BLUE, linewidth=1.6, marker="o", markersize=3.2)
    if data.spoiled.size:
        height = top - 0.14 * (top - bottom)
        ax.plot(
            data.spoiled, np.full(data.spoiled.size, height), color=BLUE, linestyle="none", marker="x", markersize=6
        )
        label(ax, float(data.spoiled[0]), height, "not finite", color=BLUE, va="bottom", offset=(0.0, 6.0))
    _name_curves(ax, data)
    tidy(ax, title=data.title, xlabel=data.xlabel, ylabel="loss")


def _name_curves(ax: Axes, data: SliceData) -> None:
    """Names at the right end, where the curves are farthest apart; the measured one alone without a prediction."""
    across = ax.get_yaxis_transform()
    bottom, top = data.y_range
    finite = data.losses[np.isfinite(data.losses)]
    last = float(finite[-1]) if finite.size else 0.5 * (bottom + top)
    if not data.fine.size:
        label(ax, 1.0, last, "measured", color=BLUE, xycoords=across, va="center", offset=(6.0, 0.0))
        return
    inside = (data.predicted >= bottom) & (data.predicted <= top)
    if not inside[-1]:  # it leaves the figure before: name it there
        leaves = int(np.flatnonzero(inside)[-1]) if inside.any() else 0
        at = (float(data.fine[leaves]), min(max(float(data.predicted[leaves]), bottom), top))
        label(
            ax, *at, "quadratic", color=ORANGE, va="top" if at[1] > 0.5 * (bottom + top) else "bottom", offset=(8.0, 0)
        )
        label(ax, 1.0, last, "measured", color=BLUE, xycoords=across, va="center", offset=(6.0, 0.0))
        return
    height = 0.055 * (top - bottom)  # half a line of text
    guess = float(data.predicted[-1])
    middle, apart = 0.5 * (last + guess), max(0.5 * abs(last - guess), height)
    sign = 1.0 if last >= guess else -1.0
    for name, y, color in (("measured", middle + sign * apart, BLUE), ("quadratic", middle - sign * apart, ORANGE)):
        label(ax, 1.0, y, name, color=color, xycoords=across, va="center", offset=(6.0, 0.0))


def plot_slice(result: LossSlice, *, ax: Axes | None = None) -> Axes:
    """Draw losses along a line, with the quadratic prediction and how far it holds (shaded: within 10 %).

    Args:
        result: What :func:`dyntune.loss_slice` or :func:`dyntune.loss_path` returned.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Returns:
        The axes.

    Example:
        >>> import torch, dyntune
        >>> model, batch = torch.nn.Linear(2, 1, bias=False), (torch.eye(2), torch.zeros(2, 1))
        >>> found = dyntune.loss_slice(model, batch, criterion=torch.nn.MSELoss(), direction=torch.ones(2), radius=1.0)
        >>> plot_slice(found).get_ylabel()
        'loss'
    """
    axes = new_axes(height=3.2) if ax is None else ax
    draw_slice(axes, slice_data(result))
    return axes
