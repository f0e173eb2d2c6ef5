"""Which pairs of a choice and a learning rate train: a brute force, and the edge that was measured, over each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from dyntune.errors import InvalidArgumentError
from dyntune.plots.style import BLUE, INK, ORANGE, PAPER, label, new_axes, tidy
from dyntune.records import Estimate

__all__ = ["StabilityMapData", "draw_stability_map", "plot_stability_map", "stability_map_data"]

_HEIGHT = 3.4  # inches
# Dark is low: the best rates stand out on paper.
_LOSSES = LinearSegmentedColormap.from_list("loss", [BLUE, "#9ecae1", PAPER])
_FAILED = "#f2c9b0"


@dataclass(frozen=True, kw_only=True)
class StabilityMapData:
    """What the figure shows.

    Args:
        title: One line above the figure.
        choices: Along the horizontal axis.
        outcomes: By choice, (learning rate, final loss) ascending in the rate; an infinite loss is a failure.
        edges: By choice, the rate at which training is expected to fail with its interval; None where there is none.
        suggested: By choice, the suggested rate; None where there is none.
    """

    title: str
    choices: tuple[str, ...]
    outcomes: tuple[tuple[tuple[float, float], ...], ...]
    edges: tuple[tuple[float, float, float] | None, ...]
    suggested: tuple[float | None, ...]


def stability_map_data(
    outcomes: Mapping[Any, Mapping[float, float]],
    *,
    critical: Mapping[Any, Estimate] | None = None,
    suggested: Mapping[Any, Estimate] | None = None,
    title: str = "",
) -> StabilityMapData:
    """What :func:`plot_stability_map` shows, as plain data."""
    if not outcomes or not all(outcomes.values()):
        raise InvalidArgumentError("outcomes is empty, or a choice in it: the map needs a loss for every choice.")
    bad = [lr for rates in outcomes.values() for lr in rates if not 0 < lr < math.inf]
    if bad:
        raise InvalidArgumentError(f"outcomes has the learning rate {bad[0]}: rates are positive.")
    critical, suggested = critical or {}, suggested or {}
    return StabilityMapData(
        title=title,
        choices=tuple(str(c) for c in outcomes),
        outcomes=tuple(
            tuple((lr, loss if math.isfinite(loss) else math.inf) for lr, loss in sorted(rates.items()))
            for rates in outcomes.values()
        ),
        edges=tuple(_edge(critical.get(c)) for c in outcomes),
        suggested=tuple(None if (e := suggested.get(c)) is None else e.value for c in outcomes),
    )


def _edge(found: Estimate | None) -> tuple[float, float, float] | None:
    return None if found is None or found.value is None else (found.value, found.low, found.high)


def draw_stability_map(ax: Axes, data: StabilityMapData) -> None:
    """Draw the map on given axes; the vertical axis is logarithmic."""
    ax.set_yscale("log")
    finite = [loss for column in data.outcomes for _, loss in column if math.isfinite(loss)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    for x, column in enumerate(data.outcomes):
        edges = _between([lr for lr, _ in column])
        for (_, loss), bottom, top in zip(column, edges, edges[1:], strict=False):
            share = (loss - low) / (high - low) if high > low else 0.0
            color = _LOSSES(share) if math.isfinite(loss) else _FAILED
            ax.fill_between([x - 0.42, x + 0.42], bottom, top, color=color, linewidth=0.0)
    reach = [lr for column in data.outcomes for lr in _between([lr for lr, _ in column])]
    bottom, top = min(reach), max(reach)
    for x, (edge, lr) in enumerate(zip(data.edges, data.suggested, strict=True)):
        if edge is not None:
            ax.plot([x - 0.42, x + 0.42], [edge[0]] * 2, color=ORANGE, linewidth=2.0)
            ax.plot([x, x], [max(edge[1], bottom), min(edge[2], top)], color=ORANGE, linewidth=1.0)
        if lr is not None:
            ax.plot([x], [lr], marker="o", color=INK, markersize=4)
    _name(ax, data)
    ax.set_ylim(bottom, top)
    ax.set_xlim(-0.6, len(data.choices) - 0.4 + 0.28 * max(2, len(data.choices)))
    ax.set_xticks(range(len(data.choices)), data.choices)
    ax.xaxis.set_major_locator(FixedLocator(list(range(len(data.choices)))))
    ax.yaxis.set_major_locator(LogLocator(numticks=6))
    ax.yaxis.set_minor_locator(NullLocator())


def _name(ax: Axes, data: StabilityMapData) -> None:
    """Names to the right of the last column; where two would meet, the lower one goes down."""
    x = len(data.choices) - 0.5
    column = data.outcomes[-1]
    failed = [lr for lr, loss in column if not math.isfinite(loss)]
    trained = [(loss, lr) for lr, loss in column if math.isfinite(loss)]
    wanted: list[tuple[float, str, str]] = []
    if failed:
        wanted.append((max(failed), "failed", INK))
    if data.edges[-1] is not None:
        wanted.append((data.edges[-1][0], "expected to fail", ORANGE))
    if trained:
        wanted.append((min(trained)[1], "lowest loss", BLUE))
    if data.suggested[-1] is not None:
        wanted.append((data.suggested[-1], "suggested", INK))
    rates = [lr for column in data.outcomes for lr, _ in column]
    apart = 0.07 * math.log(max(rates) / min(rates))  # a line of text, of the height of the axes
    at = math.inf
    for lr, text, color in sorted(wanted, reverse=True):
        at = min(math.log(lr), at - apart)
        label(ax, x, math.exp(at), text, color=color, va="center")


def _between(rates: list[float]) -> list[float]:
    """Edges of the cells around ascending rates, halfway in logarithms."""
    logs = np.log(rates)
    if len(logs) == 1:
        return [rates[0] / 2**0.5, rates[0] * 2**0.5]
    middle = (logs[1:] + logs[:-1]) / 2
    ends = [2 * logs[0] - middle[0], *middle, 2 * logs[-1] - middle[-1]]
    return [float(x) for x in np.exp(ends)]


def plot_stability_map(
    outcomes: Mapping[Any, Mapping[float, float]],
    *,
    critical: Mapping[Any, Estimate] | None = None,
    suggested: Mapping[Any, Estimate] | None = None,
    title: str = "",
    xlabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw what training came to at every learning rate of every choice, and the measured edge over it.

    Args:
        outcomes: Choice, such as a number of heads, -> learning rate -> final loss; an infinite loss or NaN is a
            failure. Each choice may have its own rates.
        critical: By choice, the rate at which training is expected to fail.
        suggested: By choice, the suggested rate.
        title: One line above the figure.
        xlabel: What the choices are.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Raises:
        InvalidArgumentError: No outcomes, or a learning rate that is not positive.
    """
    data = stability_map_data(outcomes, critical=critical, suggested=suggested, title=title)
    ax = new_axes(height=_HEIGHT) if ax is None else ax
    draw_stability_map(ax, data)
    tidy(ax, title=data.title, xlabel=xlabel, ylabel="learning rate")
    return ax
