"""Extreme eigenvalues with their brackets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from matplotlib.axes import Axes

from dyntune.curvature.eigenvalues import Eigenvalues
from dyntune.plots.style import BLUE, INK, MUTED, ORANGE, label, new_axes, number, tidy

__all__ = ["EigenvaluesData", "draw_eigenvalues", "eigenvalues_data", "plot_eigenvalues"]


@dataclass(frozen=True, kw_only=True)
class EigenvaluesData:
    """What the figure shows; all tuples have one entry per eigenvalue, in the order of the result.

    Args:
        names: ``largest``, ``2nd largest`` and so on.
        values: The eigenvalues.
        low: Lower ends of the brackets.
        high: Upper ends of the brackets; ``inf`` where nothing is known.
        certified: Whether the bracket is as narrow as was asked for.
        title: One line above the figure.
        zero: Whether zero lies within the range that is shown.
    """

    names: tuple[str, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    certified: tuple[bool, ...]
    title: str
    zero: bool


def eigenvalues_data(result: Eigenvalues) -> EigenvaluesData:
    """What :func:`plot_eigenvalues` shows, as plain data."""
    values = tuple(result.values.tolist())
    certified = tuple(result.converged_each.tolist())
    missing = certified.count(False)
    found = f"{len(values)} eigenvalue{'s' if len(values) > 1 else ''} from {result.num_products} products"
    verdict = f", {missing} NOT certified" if missing else f", certified to {100 * result.rtol:g} %"
    return EigenvaluesData(
        names=_names(result.which, len(values)),
        values=values,
        low=tuple(result.low.tolist()),
        high=tuple(result.high.tolist()),
        certified=certified,
        title=found + verdict,
        zero=min(values) < 0 < max(values),
    )


def _names(which: str, count: int) -> tuple[str, ...]:
    largest = [f"{_ordinal(i)}largest" for i in range(count)]
    smallest = [f"{_ordinal(i)}smallest" for i in range(count)]
    if which == "both":
        return tuple(largest[: count // 2] + smallest[: count // 2])
    if which == "magnitude":
        return tuple(f"{name} |λ|" for name in largest)
    return tuple(smallest if which == "smallest" else largest)


def _ordinal(index: int) -> str:
    if index == 0:
        return ""
    place = index + 1
    suffix = "th" if place // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{suffix} "


def draw_eigenvalues(ax: Axes, data: EigenvaluesData) -> None:
    """Draw on given axes: one row per eigenvalue, the first on top."""
    shown = [x for x in (*data.values, *data.low, *data.high) if math.isfinite(x)]
    width = max(shown) - min(shown) or abs(shown[0]) or 1.0
    left, right = min(shown) - 0.08 * width, max(shown) + 0.08 * width
    ax.set_xlim(left, right)
    ax.set_ylim(len(data.values) - 0.4, -0.6)
    if data.zero:
        ax.axvline(0, color=MUTED, linewidth=0.8)
    for row, (value, low, high, sure) in enumerate(zip(data.values, data.low, data.high, data.certified, strict=True)):
        color = BLUE if sure else ORANGE
        ends = (low if math.isfinite(low) else left, high if math.isfinite(high) else right)
        ax.plot(ends, (row, row), color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
        for end, known, arrow in ((ends[0], math.isfinite(low), "<"), (ends[1], math.isfinite(high), ">")):
            ax.plot([end], [row], marker="|" if known else arrow, color=color, markersize=9, clip_on=False)
        ax.plot([value], [row], marker="o", color=color, markersize=5, fillstyle="full" if sure else "none")
        text = f"{number(value, 4)}  ({number(low, 4)} .. {number(high, 4)})"
        label(
            ax,
            1.0,
            row,
            text if sure else f"{text}, not certified",
            color=INK if sure else ORANGE,
            xycoords=ax.get_yaxis_transform(),
            offset=(14.0, 0.0),
            va="center",
        )
    ax.set_yticks(range(len(data.values)), data.names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    tidy(ax, title=data.title, xlabel="eigenvalue (loss / parameter²)", ylabel="", grid="x")


def plot_eigenvalues(result: Eigenvalues, *, ax: Axes | None = None) -> Axes:
    """Draw eigenvalues with their brackets.

    Args:
        result: What :func:`dyntune.eigenvalues` returned.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Returns:
        The axes.

    Example:
        >>> import torch, dyntune
        >>> found = dyntune.eigenvalues(torch.diag(torch.arange(1.0, 31.0)), k=2)
        >>> plot_eigenvalues(found).get_title(loc="left")[:13]
        '2 eigenvalues'
    """
    data = eigenvalues_data(result)
    axes = new_axes(height=1.0 + 0.3 * len(data.values)) if ax is None else ax
    draw_eigenvalues(axes, data)
    return axes
