"""Learning rates by number of heads: what is suggested, and where training is expected to fail."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from dyntune.plots.style import BLUE, INK, MUTED, ORANGE, label, new_rows, number, tidy
from dyntune.records import Estimate, Status
from dyntune.suggest.heads_rule import Heads

__all__ = ["HeadsData", "Point", "draw_losses", "draw_rates", "heads_data", "plot_heads"]

_UPPER, _LOWER = 3.0, 1.9  # inches
_WIDEST = 64.0  # times the value: an interval that reaches farther is cut, and drawn with an arrow


@dataclass(frozen=True, kw_only=True)
class Point:
    """A number with its interval at one number of heads."""

    heads: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class HeadsData:
    """What the figure shows.

    Args:
        title: One line above the figure.
        heads: Numbers of heads, ascending.
        suggested: Learning rates.
        critical: Rates at which training is expected to fail.
        losses: After the short training.
        value: The number of heads that was chosen; None when refused.
        narrow: Numbers of heads that were left out of the choice.
        observed: By number of heads, where training failed in a brute force; empty without one.
    """

    title: str
    heads: tuple[int, ...]
    suggested: tuple[Point, ...]
    critical: tuple[Point, ...]
    losses: tuple[Point, ...]
    value: int | None
    narrow: tuple[int, ...]
    observed: tuple[tuple[int, float], ...]


def heads_data(found: Heads, *, observed: Mapping[int, float] | None = None) -> HeadsData:
    """What :func:`plot_heads` shows, as plain data."""
    rows = sorted(found.table, key=lambda row: row.heads)
    return HeadsData(
        title=_title(found),
        heads=tuple(row.heads for row in rows),
        suggested=_points({row.heads: row.lr for row in rows}),
        critical=_points({row.heads: row.critical_lr for row in rows}),
        losses=_points({row.heads: row.loss for row in rows}),
        value=found.value,
        narrow=tuple(row.heads for row in rows if not row.admitted),
        observed=tuple(sorted((h, lr) for h, lr in (observed or {}).items() if lr > 0 and math.isfinite(lr))),
    )


def _title(found: Heads) -> str:
    if found.value is None:
        return f"No number of heads suggested: {found.reason}"
    text = f"{found.value} heads at {number(found.lr)}; critical rates: {found.verdict}"
    return text if found.status is Status.OK else f"{text}, {found.status.name.lower()}"


def _points(estimates: Mapping[int, Estimate]) -> tuple[Point, ...]:
    return tuple(
        Point(heads=heads, value=e.value, low=e.low, high=e.high)
        for heads, e in estimates.items()
        if e.value is not None and math.isfinite(e.value)
    )


def draw_rates(ax: Axes, data: HeadsData) -> None:
    """Draw learning rates on given axes; both are logarithmic."""
    ax.set_yscale("log")
    for points, color, shift in (
        (data.critical, ORANGE, 0.015 * _span(data)),
        (data.suggested, BLUE, -0.015 * _span(data)),
    ):
        for p in points:
            x = math.log2(p.heads) + shift
            low, high = max(p.low, p.value / _WIDEST), min(p.high, p.value * _WIDEST)
            ax.plot([x, x], [low, high], color=color, linewidth=3.0, alpha=0.35, solid_capstyle="butt")
            for end, cut, arrow in ((low, p.low < low, "v"), (high, p.high > high, "^")):
                if cut:
                    ax.plot([x], [end], marker=arrow, color=color, markersize=4)
            full = "none" if p.heads in data.narrow else "full"
            ax.plot([x], [p.value], marker="o", color=color, markersize=5, fillstyle=full)
    for heads, lr in data.observed:
        ax.plot([math.log2(heads)], [lr], marker="x", color=INK, markersize=6)
    last = math.log2(data.heads[-1])
    names = ((data.critical, ORANGE, "expected to fail"), (data.suggested, BLUE, "suggested"))
    for points, color, name in names:
        if points:
            label(ax, last + 0.04 * _span(data), points[-1].value, name, color=color, va="center")
    if data.observed:
        label(ax, last + 0.04 * _span(data), data.observed[-1][1], "failed", color=INK, va="center", offset=(0.0, 11.0))
    ax.yaxis.set_major_locator(LogLocator(numticks=6))
    ax.yaxis.set_minor_locator(NullLocator())
    _name_heads(ax, data)
    tidy(ax, title=data.title, xlabel="", ylabel="learning rate", grid="y", columns=54)


def draw_losses(ax: Axes, data: HeadsData) -> None:
    """Draw losses after the short training on given axes."""
    for p in data.losses:
        x = math.log2(p.heads)
        chosen = p.heads == data.value
        color = BLUE if chosen else MUTED
        if math.isfinite(p.low) and math.isfinite(p.high):
            ax.plot([x, x], [p.low, p.high], color=color, linewidth=3.0, alpha=0.35, solid_capstyle="butt")
        full = "none" if p.heads in data.narrow else "full"
        ax.plot([x], [p.value], marker="o", color=color, markersize=5, fillstyle=full)
    if not data.losses:
        label(ax, 0.03, 0.5, "every short training failed", color=MUTED, xycoords="axes fraction", ha="left")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    _name_heads(ax, data)
    tidy(ax, title="", xlabel="heads", ylabel="loss, short training", grid="y")


def _name_heads(ax: Axes, data: HeadsData) -> None:
    ax.set_xlim(math.log2(data.heads[0]) - 0.1 * _span(data), math.log2(data.heads[-1]) + 0.1 + 0.36 * _span(data))
    ax.xaxis.set_major_locator(FixedLocator([math.log2(h) for h in data.heads]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([str(h) for h in data.heads])


def _span(data: HeadsData) -> float:
    """Octaves that are shown; room for what stands beside the points is a share of them."""
    return max(1.0, math.log2(data.heads[-1] / data.heads[0]))


def plot_heads(found: Heads, *, observed: Mapping[int, float] | None = None, ax: Axes | None = None) -> Axes:
    """Draw learning rates over the number of heads: suggested, expected to fail, and where training really failed.

    Bars are 95% intervals over seeds; hollow points are heads too narrow to be chosen. In a figure of its own, the loss
    after the short training is below, with the chosen number in blue.

    Args:
        found: What :func:`dyntune.suggest_heads` returned.
        observed: By number of heads, the learning rate at which training failed, where that is known.
        ax: Where to draw the upper panel alone; default a figure of its own (``.figure`` of what is returned), unknown
            to pyplot.

    Returns:
        The axes of the upper panel.
    """
    data = heads_data(found, observed=observed)
    if ax is not None:
        draw_rates(ax, data)
        return ax
    upper, lower = new_rows(_UPPER, _LOWER)
    draw_rates(upper, data)
    draw_losses(lower, data)
    return upper
