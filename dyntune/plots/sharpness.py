"""Curvature numbers beside the limits that an optimizer has at its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dyntune.curvature.sharpness import UNIT, Sharpness
from dyntune.plots.style import BLUE, INK, MUTED, ORANGE, inner_axes, label, new_axes, number, tidy, width_of
from dyntune.records import Estimate, Status
from dyntune.stability.scales import group_ratios
from dyntune.stability.thresholds import batch_threshold, recurrence, threshold

__all__ = ["SharpnessData", "SharpnessPanel", "SharpnessRow", "draw_sharpness", "plot_sharpness", "sharpness_data"]

_NAMES = {
    "lambda_max": "largest eigenvalue",
    "lambda_min": "smallest eigenvalue",
    "preconditioned": "largest, preconditioned",
    "batch": "batch sharpness",
    "directional": "curvature of a bare step",
    "critical_lr": "rate of a bare step",
}
_COVERS = {"numerical": "solver", "sampling": "batches", "both": "solver and batches"}
_PER_RATE = "1 / learning rate"
_NARROW, _NAMES_WIDTH = 4.2, 1.7  # inches: narrower axes have no room for names beside them
_ROW, _AXIS, _TITLE = 0.42, 0.62, 0.5  # inches: a row of two lines, an axis with its label, the title


@dataclass(frozen=True, kw_only=True)
class SharpnessRow:
    """One quantity on its panel's axis.

    Args:
        name: What it is, in words.
        covers: What its interval speaks of and how often it covers.
        value: Where it stands; None when refused.
        low: Lower end of its interval.
        high: Upper end, possibly ``inf``.
        text: The number as it was measured, or the reason why there is none.
        sure: Whether its status is OK.
    """

    name: str
    covers: str
    value: float | None
    low: float
    high: float
    text: str
    sure: bool


@dataclass(frozen=True, kw_only=True)
class SharpnessPanel:
    """Quantities that share an axis.

    Args:
        rows: In the order of the record.
        xlabel: What the axis shows.
        edge: Where the limit lies on it; None where there is no limit to compare with.
        x_range: Range that is shown.
    """

    rows: tuple[SharpnessRow, ...]
    xlabel: str
    edge: float | None
    x_range: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SharpnessData:
    """What the figure shows.

    Args:
        panels: First what can be compared with a limit, then the rest, one panel for each unit.
        title: One line above the figure.
    """

    panels: tuple[SharpnessPanel, ...]
    title: str


def sharpness_data(result: Sharpness, *, optimizer: torch.optim.Optimizer | None = None) -> SharpnessData:
    """What :func:`plot_sharpness` shows, as plain data."""
    limits = {} if optimizer is None else _limits(result, optimizer)
    against = [_row(name, item, limits[name]) for name, item in result.estimates.items() if name in limits]
    groups: dict[str, list[SharpnessRow]] = {}
    for name, item in result.estimates.items():
        if name not in limits:
            groups.setdefault(item.unit, []).append(_row(name, item, None))
    panels = [_panel(rows, unit.replace("^2", "²"), edge=None) for unit, rows in groups.items()]
    if against and optimizer is not None:
        rate = number(float(optimizer.param_groups[0]["lr"]))
        panels.insert(0, _panel(against, f"multiple of its limit at learning rate {rate} (1: the edge)", edge=1.0))
    return SharpnessData(panels=tuple(panels), title=_title(result, limits))


def _limits(result: Sharpness, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """For each quantity that has one, its largest value for which this optimizer is stable at its learning rate.

    A quantity is compared only with the limit of the matrix that it belongs to: Adam bounds no eigenvalue of H, and a
    batch sharpness along the plain gradient says nothing of Adam's.
    """
    r = recurrence(optimizer)
    if r.lr <= 0:
        return {}
    scaled = r.preconditioned or any(ratio != 1.0 for ratio in group_ratios(optimizer))
    unit = _PER_RATE if scaled else UNIT
    decay = r.coupled_decay
    full, small = threshold(r).value, batch_threshold(r).value
    candidates: dict[str, float | None] = {
        # coupled decay adds itself to every eigenvalue of H; on P^-1/2 H P^-1/2 it acts in a way that was not measured
        "lambda_max": None if full is None else full / r.lr - decay,
        "preconditioned": None if full is None or (scaled and decay) else full / r.lr - decay,
        "batch": None if small is None or decay else small / r.lr,
        "directional": None if decay else 2 / r.lr,
        "critical_lr": r.lr,
    }
    found = result.estimates
    units = dict.fromkeys(found, unit) | {"critical_lr": "learning rate"}
    return {
        name: limit
        for name, limit in candidates.items()
        if name in found and limit is not None and limit > 0 and found[name].unit == units[name]
    }


def _row(name: str, item: Estimate, limit: float | None) -> SharpnessRow:
    """The estimate on its axis: as it is, or over its limit."""
    ends = (item.value or 0.0, item.low, item.high)
    if limit is not None and name == "critical_lr":  # the present rate over the critical one: past 1 a step fails
        ends = (_over(limit, ends[0]), _over(limit, item.high), _over(limit, item.low))
    elif limit is not None:
        ends = (ends[0] / limit, item.low / limit, item.high / limit)
    return SharpnessRow(
        name=_NAMES.get(name, name),
        covers=_COVERS[item.covers] + ("" if item.level is None else f", {100 * item.level:.6g} %"),
        value=None if item.value is None else ends[0],
        low=ends[1],
        high=ends[2],
        text=_text(name, item, limit),
        sure=item.status is Status.OK,
    )


def _over(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 else math.inf


def _text(name: str, item: Estimate, limit: float | None) -> str:
    if item.value is None:
        return f"refused: {item.reason}"
    shown = f"{number(item.value)} ({number(item.low)} .. {number(item.high)})"
    if limit is None:
        return shown
    return f"{number(limit)} of {shown}" if name == "critical_lr" else f"{shown} of {number(limit)}"


def _panel(rows: list[SharpnessRow], xlabel: str, *, edge: float | None) -> SharpnessPanel:
    ends = [0.0, *(() if edge is None else (edge,))]
    ends += [x for row in rows if row.value is not None for x in (row.value, row.low, row.high) if math.isfinite(x)]
    width = (max(ends) - min(ends)) or 1.0
    left = min(ends) - 0.06 * width if min(ends) < 0 else 0.0
    return SharpnessPanel(rows=tuple(rows), xlabel=xlabel, edge=edge, x_range=(left, max(ends) + 0.06 * width))


def _title(result: Sharpness, limits: dict[str, float]) -> str:
    for name in ("preconditioned", "lambda_max", "batch", "directional"):
        item = result.estimates.get(name)
        if name in limits and item is not None and item.value is not None:
            ends = f"{number(item.low / limits[name])} .. {number(item.high / limits[name])}"
            return f"{_NAMES[name].capitalize()}: {number(item.value / limits[name])} ({ends}) of its limit"
    return f"Curvature on {result.record.get('num_rows', '?')} rows"


def draw_sharpness(ax: Axes, data: SharpnessData) -> None:
    """Draw on given axes; with several panels they become a frame that holds one below the other."""
    narrow = width_of(ax) < _NARROW
    columns = int((width_of(ax) - (0.0 if narrow else _NAMES_WIDTH)) / 0.09)
    heights = [_ROW * len(panel.rows) for panel in data.panels]
    whole = sum(heights) + _AXIS * (len(heights) - 1)
    top = whole
    for panel, height in zip(data.panels, heights, strict=True):
        top -= height
        inner = ax if len(heights) == 1 else inner_axes(ax, bottom=top / whole, height=height / whole)
        top -= _AXIS
        _draw_panel(inner, panel, narrow=narrow)
        title = data.title if panel is data.panels[0] else ""
        tidy(inner, title=title, xlabel=panel.xlabel, ylabel="", grid="x", columns=columns)
        if inner is not ax:
            ax.set_axis_off()


def _draw_panel(ax: Axes, panel: SharpnessPanel, *, narrow: bool) -> None:
    left, right = panel.x_range
    ax.set_xlim(left, right)
    ax.set_ylim(len(panel.rows) - 0.5, -0.5)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(3 if narrow else 5))
    if left < 0:
        ax.axvline(0, color=MUTED, linewidth=0.8)
    if panel.edge is not None:
        ax.axvline(panel.edge, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    for at, row in enumerate(panel.rows):
        _draw_interval(ax, row, at)
        _write(ax, row, at, narrow=narrow)


def _draw_interval(ax: Axes, row: SharpnessRow, at: int) -> None:
    if row.value is None:
        return
    color = BLUE if row.sure else ORANGE
    left, right = ax.get_xlim()
    ax.plot((max(row.low, left), min(row.high, right)), (at, at), color=color, linewidth=6, alpha=0.35,
            solid_capstyle="butt")  # fmt: skip
    for end, known, arrow in ((left, math.isfinite(row.low), "<"), (right, math.isfinite(row.high), ">")):
        if not known:
            ax.plot([end], [at], marker=arrow, color=color, markersize=6, clip_on=False)
    full = "full" if row.sure else "none"
    ax.plot([row.value], [at], marker="o", color=color, markersize=6, fillstyle=full, clip_on=False)


def _write(ax: Axes, row: SharpnessRow, at: int, *, narrow: bool) -> None:
    """The name and what the interval covers on the left, where there is room; the number above the interval."""
    ink, across = INK if row.sure else ORANGE, ax.get_yaxis_transform()
    covers = f"interval: {row.covers}"
    if narrow:
        label(ax, 0.0, at, f"{row.name} {row.text}", color=ink, xycoords=across, va="bottom", offset=(0.0, 3.0),
              fontsize=7.0)  # fmt: skip
        label(ax, 0.0, at, covers, color=MUTED, xycoords=across, va="top", offset=(0.0, -3.0), fontsize=7.0)
        return
    label(ax, 0.0, at, row.name, xycoords=across, ha="right", va="center", offset=(-10.0, 6.0))
    label(ax, 0.0, at, covers, color=MUTED, xycoords=across, ha="right", va="center", offset=(-10.0, -6.0))
    if row.value is None:
        label(ax, 0.0, at, row.text, color=ORANGE, xycoords=across, va="center", offset=(4.0, 0.0), columns=40)
        return
    left, right = ax.get_xlim()
    low, high = max(row.low, left), min(row.high, right)
    side, x = ("left", low) if low - left < (right - left) / 2 else ("right", high)
    label(ax, x, at, row.text, color=ink, ha=side, va="bottom", offset=(0.0, 4.0))


def plot_sharpness(
    result: Sharpness, *, optimizer: torch.optim.Optimizer | None = None, ax: Axes | None = None
) -> Axes:
    """Draw curvature numbers with their intervals, beside the optimizer's limits where it is given.

    With `optimizer` everything that has a limit at its present learning rate is drawn as a multiple of it, so that 1 is
    the edge; what has none, or belongs to another matrix, stands below in its own unit. The edge is where training
    settles, no danger by itself.

    Args:
        result: What :func:`dyntune.sharpness` returned.
        optimizer: The one that trains the model: its type, learning rate and momentum give the limits.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Returns:
        The axes.

    Raises:
        InvalidArgumentError: An optimizer without an entry in the table of ``dyntune.stability.thresholds``.

    Source:
        The limits: ``dyntune.stability.threshold`` for eigenvalues, ``batch_threshold`` for batch sharpness, and 2 over
        the learning rate for the curvature along one step, beyond which a quadratic rises.

    Example:
        >>> import dyntune
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> found = dyntune.sharpness(model, batch, criterion=torch.nn.MSELoss())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        >>> plot_sharpness(found, optimizer=optimizer).get_title(loc="left")[:23]
        'Largest eigenvalue: 0.5'
    """
    data = sharpness_data(result, optimizer=optimizer)
    rows = sum(len(panel.rows) for panel in data.panels)
    axes = new_axes(height=_TITLE + _ROW * rows + _AXIS * len(data.panels)) if ax is None else ax
    draw_sharpness(axes, data)
    return axes
