"""A recommendation with the evidence behind it, on one logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dyntune.plots.beta2 import plot_beta2
from dyntune.plots.style import BLUE, GREEN, INK, MUTED, ORANGE, cleaned, label, new_axes, number, tidy
from dyntune.records import Estimate, Recommendation, Status

__all__ = ["Curve", "Mark", "RecommendationData", "draw_recommendation", "plot_recommendation", "recommendation_data"]

Role = Literal["value", "limit", "evidence"]
Kind = Literal["ramp", "run", "sweep"]

_COLORS: dict[Role, str] = {"value": BLUE, "limit": ORANGE, "evidence": MUTED}
_LOOKS: dict[Kind, dict[str, Any]] = {
    "ramp": {"color": MUTED, "linewidth": 1.1},
    "run": {"color": MUTED, "linewidth": 1.1, "linestyle": ":", "marker": "o", "markersize": 4.5, "fillstyle": "none"},
    "sweep": {"color": GREEN, "linewidth": 1.6, "marker": "o", "markersize": 4.5},
}
_CURVE_HEIGHT, _ROW_HEIGHT = 2.3, 0.21  # inches
# Losses are shown up to this much of the way from the lowest to the first one; above, a run has blown up.
_OVERSHOOT = 1.3


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value of the knob with its interval: one row of the figure.

    Args:
        name: What it is, in words.
        value: The number, > 0.
        low: Lower end of its interval.
        high: Upper end, possibly ``inf``.
        role: The choice itself, the stability limit, or other evidence.
    """

    name: str
    value: float
    low: float
    high: float
    role: Role


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Losses over values of the knob.

    Args:
        kind: One run while the knob rises, the short runs behind the suggestion, or full runs to compare with.
        name: The same in words.
        x: Values of the knob, > 0, ascending.
        y: Losses; NaN or infinite where a run blew up.
    """

    kind: Kind
    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RecommendationData:
    """What the figure shows.

    Args:
        knob: What is chosen.
        title: One line above the figure.
        marks: The choice first, then the limit, then other evidence in ascending order.
        curves: Losses, those that there are.
        x_range: Range of the knob that is shown.
        y_range: Range of losses that is shown; None without curves.
    """

    knob: str
    title: str
    marks: tuple[Mark, ...]
    curves: tuple[Curve, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float] | None


def recommendation_data(result: Recommendation) -> RecommendationData:
    """What :func:`plot_recommendation` shows, as plain data."""
    marks = tuple(_marks(result))
    curves = tuple(_curves(result))
    return RecommendationData(
        knob=result.knob,
        title=_title(result),
        marks=marks,
        curves=curves,
        x_range=_x_range(marks, curves),
        y_range=_y_range(curves),
    )


def _title(result: Recommendation) -> str:
    if result.value is None:
        return f"No {result.knob} suggested: {result.reason}"
    text = f"{result.knob} {number(result.value)} ({number(result.low)} .. {number(result.high)})"
    text = text[:1].upper() + text[1:]
    return text if result.status is Status.OK else f"{text}: {result.status.name.lower().replace('_', ' ')}"


def _marks(result: Recommendation) -> Iterable[Mark]:
    if result.value is not None:
        yield Mark(name="suggested", value=result.value, low=result.low, high=result.high, role="value")
    limit = result.max_stable
    if limit is not None and limit.value is not None:
        yield Mark(name="stable up to", value=limit.value, low=limit.low, high=limit.high, role="limit")
    found = [
        Mark(name=name.replace("_", " "), value=item.value, low=item.low, high=item.high, role="evidence")
        for name, item in result.evidence.items()
        if isinstance(item, Estimate) and item.unit == result.knob and item.value is not None and item is not limit
    ]
    yield from sorted((mark for mark in found if 0 < mark.value < math.inf), key=lambda mark: mark.value)


def _curves(result: Recommendation) -> Iterable[Curve]:
    names: dict[Kind, str] = {
        "ramp": f"one run while the {result.knob} rises",
        "run": "short runs",
        "sweep": "full runs, at the end",
    }
    for kind, name in names.items():
        x, y = result.series.get(f"{kind}_lr", ()), result.series.get(f"{kind}_loss", ())
        points = [(a, math.nan if b is None else b) for a, b in zip(x, y, strict=False) if a > 0]
        if kind == "run":
            points += [(a, math.nan) for a in result.series.get("failed_lr", ()) if a > 0]
        if any(math.isfinite(b) for _, b in points):
            points.sort()
            yield Curve(kind=kind, name=name, x=tuple(a for a, _ in points), y=tuple(b for _, b in points))


def _x_range(marks: Sequence[Mark], curves: Sequence[Curve]) -> tuple[float, float]:
    """All values, and ends of intervals that are not far from theirs; half an octave more at either side."""
    values = [mark.value for mark in marks] + [x for curve in curves for x in curve.x]
    values += [end for mark in marks for end in (mark.low, mark.high) if mark.value / 10 < end < mark.value * 10]
    return (min(values) / 1.4, max(values) * 1.4) if values else (1e-4, 1.0)


def _y_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    finite = [[y for y in curve.y if math.isfinite(y)] for curve in curves]
    if not finite:
        return None
    bottom = min(min(ys) for ys in finite)
    # The first loss of the ramp, or the largest of a sweep, is about that of the untrained model.
    start = max(min(ys[0], max(ys)) for ys in finite)
    width = (start - bottom) or abs(start) or 1.0
    names = 0.12 if any(curve.kind != "ramp" for curve in curves) else 0.0  # a line for them below the curves
    return bottom - (0.06 + names) * width, bottom + _OVERSHOOT * width


def draw_recommendation(ax: Axes, data: RecommendationData) -> None:
    """Draw on given axes: curves above, below them one row for each mark."""
    ax.set_xscale("log")
    ax.set_xlim(*data.x_range)
    curve_range = data.y_range or (0.0, 1.0)
    rows, bottom = _row_positions(ax, data, curve_range)
    ax.set_ylim(bottom, curve_range[1])
    for mark, row in zip(data.marks, rows, strict=True):
        _draw_mark(ax, mark, row, data.x_range)
    if data.y_range is not None:
        ax.axhline(data.y_range[0], color=MUTED, linewidth=0.8)
        _draw_curves(ax, data, data.y_range)
    _draw_ticks(ax, data, rows)
    tidy(ax, title=data.title, xlabel=data.knob, ylabel="", columns=40)


def _row_positions(ax: Axes, data: RecommendationData, curve_range: tuple[float, float]) -> tuple[list[float], float]:
    """Heights of the rows, in units of loss below the curves, and the lower end of the axis.

    The rows are `_ROW_HEIGHT` apart where the axes are high enough, and the only content where there are no curves.
    """
    bottom, top = curve_range
    count = len(data.marks)
    if data.y_range is None:
        step = (top - bottom) / max(count, 1)
        return [top - step * (i + 0.5) for i in range(count)], bottom
    figure = ax.get_figure(root=True)
    inches = ax.get_position().height * (figure.get_figheight() if figure is not None else 4.0)
    share = min(0.6, (count + 0.4) * _ROW_HEIGHT / inches)
    step = (top - bottom) * share / (1 - share) / (count + 0.4)
    return [bottom - step * (i + 0.7) for i in range(count)], bottom - step * (count + 0.4)


def _draw_mark(ax: Axes, mark: Mark, row: float, x_range: tuple[float, float]) -> None:
    color = _COLORS[mark.role]
    low, high = max(mark.low, x_range[0]), min(mark.high, x_range[1])
    if mark.role != "evidence":
        ax.axvspan(low, high, color=color, alpha=0.13, linewidth=0)
        ax.axvline(mark.value, color=color, linewidth=1.3)
    ax.plot([low, high], [row, row], color=color, linewidth=4, alpha=0.45, solid_capstyle="butt")
    for end, cut, arrow in ((low, mark.low < x_range[0], "<"), (high, mark.high > x_range[1], ">")):
        if cut:
            ax.plot([end], [row], marker=arrow, color=color, markersize=5, clip_on=False)
    ax.plot([mark.value], [row], marker="o", color=color, markersize=5)


def _draw_curves(ax: Axes, data: RecommendationData, y_range: tuple[float, float]) -> None:
    """Curves, crosses at the top for runs that blew up, and names where the curves are not."""
    bottom, top = y_range
    upper, edge = top - 0.04 * (top - bottom), ax.get_yaxis_transform()
    corners: list[dict[str, Any]] = [
        {"x": 0.0, "ha": "left", "offset": (6.0, 4.0)},
        {"x": 1.0, "ha": "right", "offset": (-4.0, 4.0)},
    ]
    for curve in data.curves:
        look = _LOOKS[curve.kind]
        color = look["color"]
        alive = [(x, min(y, 2 * top)) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        ax.plot(*zip(*alive, strict=True), **look)
        if curve.kind == "ramp":
            x, y = alive[0]
            label(ax, x, min(y, top), curve.name, color=color, va="bottom", offset=(2.0, 4.0), columns=24)
            continue
        dead = [x for x, y in zip(curve.x, curve.y, strict=True) if not y <= top]
        if dead:
            ax.plot(dead, [upper] * len(dead), color=color, linestyle="none", marker="x", markersize=6)
            label(ax, dead[0], upper, "blew up", color=color, ha="right", va="center", offset=(-7.0, 0.0))
        sign = "○" if curve.kind == "run" else "●"
        label(ax, y=bottom, text=f"{sign} {curve.name}", color=color, xycoords=edge, **corners.pop(0))
    label(ax, 0.0, top, "loss", xycoords=edge, ha="right", offset=(-4.0, 5.0))


def _draw_ticks(ax: Axes, data: RecommendationData, rows: Sequence[float]) -> None:
    losses = [] if data.y_range is None else _loss_ticks(data.y_range)
    names = [f"{cleaned(mark.name, limit=30)} {number(mark.value)}" for mark in data.marks]
    ax.yaxis.set_major_locator(FixedLocator([*losses, *rows]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_yticklabels([*(f"{y:g}" for y in losses), *names])
    for text, mark in zip(ax.get_yticklabels()[len(losses) :], data.marks, strict=True):
        text.set_color(INK if mark.role == "evidence" else _COLORS[mark.role])
        text.set_parse_math(False)
    ax.xaxis.set_major_locator(LogLocator(numticks=8))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x, 2)))
    ax.xaxis.set_minor_formatter(FuncFormatter(lambda _x, _p: ""))


def _loss_ticks(y_range: tuple[float, float]) -> list[float]:
    inside = [float(y) for y in MaxNLocator(nbins=5).tick_values(*y_range)]
    return [round(y, 10) for y in inside if y_range[0] <= y <= y_range[1]]


def plot_recommendation(result: Recommendation, *, ax: Axes | None = None) -> Axes:
    """Draw a recommendation with its evidence on a logarithmic axis.

    Above: losses over the knob, from the series ``ramp_lr``, ``ramp_loss`` and ``sweep_lr``, ``sweep_loss`` where the
    recommendation has them. Below: the value with its range, the stability limit with its interval, and every estimate
    in the evidence that has the knob as its unit. A beta2 is drawn by :func:`plot_beta2`.

    Args:
        result: A recommendation for a positive knob, such as :func:`dyntune.suggest_lr` returns.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Returns:
        The axes.
    """
    if "active bound" in result.evidence:
        return plot_beta2(result, ax=ax)
    data = recommendation_data(result)
    curves = _CURVE_HEIGHT if data.y_range is not None else 0.0
    axes = new_axes(height=0.8 + curves + _ROW_HEIGHT * (len(data.marks) + 0.4)) if ax is None else ax
    draw_recommendation(axes, data)
    return axes
