"""The reliability diagram: what came true over what was predicted, with the band of perfect calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from dyntune.calibration.calibration_error import CalibrationError
from dyntune.calibration.estimators import bin_edges, smoothed_residuals
from dyntune.plots.style import BLUE, INK, MUTED, ORANGE, new_axes, tidy
from dyntune.records import short_number

__all__ = ["ReliabilityData", "draw_reliability", "plot_reliability", "reliability_data"]

_HEIGHT = 4.2  # inches
# A smoothed curve is drawn where at least this share of the highest density of rows is: elsewhere it is one row's luck.
_SPARSE = 0.01
_WIDTHS = (0.02, 0.1)  # of the smoothing: not so narrow that it shows rows, nor so wide that it shows nothing
_DRAWS = 100  # of perfect calibration, for the band


@dataclass(frozen=True, kw_only=True)
class ReliabilityData:
    """What the figure shows of one set of predictions.

    Args:
        title: One line above the figure.
        confidence: Predicted probability, for the curve.
        frequency: How often it came true.
        low: Lower end of the band of perfect calibration (95%).
        high: Upper end.
        bins: Mean confidence of bins with as many rows each.
        came_true: Share of each bin that came true.
    """

    title: str
    confidence: tuple[float, ...]
    frequency: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    bins: tuple[float, ...]
    came_true: tuple[float, ...]


def reliability_data(found: CalibrationError, *, seed: int = 0) -> ReliabilityData:
    """What :func:`plot_reliability` shows, as plain data; several classes or labels are pooled."""
    f = np.concatenate([o.confidence for o in found.outcomes])
    y = np.concatenate([o.correct for o in found.outcomes]).astype(float)
    width = float(np.clip(abs(float(found)), *_WIDTHS))
    residual, density = smoothed_residuals(f, y, width)
    shown = density > _SPARSE * density.max()
    centres = ((np.arange(len(density)) + 0.5) / len(density))[shown]
    rng = np.random.default_rng(seed)
    chance = [smoothed_residuals(f, rng.random(len(f)) < f, width)[0][shown] / density[shown] for _ in range(_DRAWS)]
    low, high = np.quantile(chance, [0.025, 0.975], axis=0)
    member = np.searchsorted(bin_edges(f, equal_mass=True), f, side="right")
    parts = [member == i for i in np.unique(member)]
    verdict = "miscalibrated" if found.miscalibrated else "not told from perfect"
    return ReliabilityData(
        title=f"Calibration error {short_number(float(found))}: {verdict}",
        confidence=tuple(centres.tolist()),
        frequency=tuple((centres + residual[shown] / density[shown]).clip(0, 1).tolist()),
        low=tuple((centres + low).clip(0, 1).tolist()),
        high=tuple((centres + high).clip(0, 1).tolist()),
        bins=tuple(float(f[p].mean()) for p in parts),
        came_true=tuple(float(y[p].mean()) for p in parts),
    )


def plot_reliability(found: CalibrationError, *, ax: Axes | None = None, after: CalibrationError | None = None) -> Axes:
    """Draw what came true over what was predicted.

    Args:
        found: Of :func:`dyntune.calibration_error`.
        ax: Where to draw; a new figure by default.
        after: A second one, such as after temperature scaling.
    """
    return draw_reliability(reliability_data(found), None if after is None else reliability_data(after), ax=ax)


def draw_reliability(data: ReliabilityData, after: ReliabilityData | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw plain data: the curves over the diagonal, a band where perfect calibration would lie, bins as dots."""
    ax = new_axes(height=_HEIGHT) if ax is None else ax
    last = data if after is None else after
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.fill_between(last.confidence, last.low, last.high, color=MUTED, alpha=0.25, linewidth=0)
    for part, colour, name in ((data, ORANGE, "before"), (after, BLUE, "after")):
        if part is None:
            continue
        colour = BLUE if after is None else colour
        ax.plot(part.confidence, part.frequency, color=colour, linewidth=2, label=name)
        ax.plot(part.bins, part.came_true, "o", color=colour, markersize=4, alpha=0.7)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    title = data.title
    if after is not None:
        ax.legend(frameon=False, loc="upper left", labelcolor=INK)
        title = f"Before: {_small(data.title)}; after, held-out: {_small(after.title)}"
    tidy(ax, title=title, xlabel="predicted probability", ylabel="came true")
    return ax


def _small(text: str) -> str:
    return text[0].lower() + text[1:]
