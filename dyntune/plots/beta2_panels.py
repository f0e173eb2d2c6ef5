"""What was measured beside a beta2: autocorrelation of gradients, and how often their running average was stale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dyntune.plots.style import BLUE, GREEN, MUTED, ORANGE, label, number, tidy
from dyntune.records import Estimate, Recommendation

__all__ = ["Band", "Panel", "draw_panel", "panels"]

THRESHOLD = 2.3  # as dyntune.dynamics.ema_bank.STALE; floors do not let a figure import it
NOT_CALIBRATED = "not calibrated, moves nothing"


@dataclass(frozen=True, kw_only=True)
class Band:
    """A curve with its interval.

    Args:
        name: In words.
        x: Ascending.
        y: Values.
        low: Lower ends; the value itself where there is none.
        high: Upper ends.
        color: Of line and band.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    color: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes below the score.

    Args:
        title: One line above it.
        xlabel: Of the horizontal axis.
        ylabel: Of the vertical axis.
        bands: What is drawn.
        line: A horizontal line, and what it is; None for none.
        factors: Whether the horizontal axis is of factors, even in log(beta / (1 - beta)).
    """

    title: str
    xlabel: str
    ylabel: str
    bands: tuple[Band, ...]
    line: tuple[float, str] | None = None
    factors: bool = False


def panels(result: Recommendation) -> list[Panel]:
    """Those that there is something to show in."""
    made = [_correlation(result), _share(result), _over_time(result)]
    return [panel for panel in made if panel is not None]


def _band(result: Recommendation, name: str, *, x: str, y: str, color: str, ends: Sequence[str] = ()) -> Band | None:
    """From series of those names; None without a finite point."""
    columns = [result.series.get(key, ()) for key in (x, y, *ends)]
    rows = [
        tuple(float(v) for v in row)
        for row in zip(*columns, strict=False)
        if all(v is not None and math.isfinite(v) for v in row)
    ]
    rows.sort()
    if not rows:
        return None
    found = list(zip(*rows, strict=True))
    low, high = (found[2], found[3]) if ends else (found[1], found[1])
    return Band(name=name, x=found[0], y=found[1], low=low, high=high, color=color)


def _correlation(result: Recommendation) -> Panel | None:
    bands = []
    for name, key, color in (("gradients", "gradient", BLUE), ("squared gradients", "squared", GREEN)):
        time = result.evidence.get(f"autocorrelation time of {name}")
        y = f"autocorrelation_{key}"
        said = f"{name}, {_time(time)}"
        band = _band(result, said, x="autocorrelation_lag", y=y, color=color, ends=(f"{y}_low", f"{y}_high"))
        if band is not None:
            bands.append(band)
    if not bands:
        return None
    return Panel(
        title="Autocorrelation in the pilot",
        xlabel="lag, steps",
        ylabel="autocorrelation",
        bands=tuple(bands),
        line=(0.0, ""),
    )


def _time(found: object) -> str:
    if not isinstance(found, Estimate) or found.value is None:
        return "time not established"
    return f"time {number(found.value)} steps ({number(found.low)} .. {number(found.high)})"


def _share(result: Recommendation) -> Panel | None:
    band = _band(
        result,
        f"staleness above {THRESHOLD}",
        x="stale_beta2",
        y="stale_share",
        color=ORANGE,
        ends=("stale_low", "stale_high"),
    )
    if band is None:
        return None
    return Panel(
        title=f"Staleness above {THRESHOLD} ({NOT_CALIBRATED})",
        xlabel="beta2 of the running average",
        ylabel="share of tensors and steps",
        bands=(band,),
        factors=True,
    )


def _over_time(result: Recommendation) -> Panel | None:
    bands = [
        _band(result, name, x="staleness_step", y=f"staleness_{key}", color=color)
        for name, key, color in (("largest of the tensors", "largest", ORANGE), ("median", "median", BLUE))
    ]
    found = tuple(band for band in bands if band is not None)
    if not found:
        return None
    return Panel(
        title="Staleness of the second moment over training",
        xlabel="step",
        ylabel="staleness",
        bands=found,
        line=(THRESHOLD, f"{THRESHOLD}: {NOT_CALIBRATED}"),
    )


def place(beta: float) -> float:
    """Where a factor is drawn: by log(beta / (1 - beta)), cut at the ends of what is compared."""
    beta = min(max(beta, 0.5), 0.99999)
    return math.log(beta / (1 - beta))


def draw_panel(ax: Axes, panel: Panel) -> None:
    """Draw on given axes."""
    for band in panel.bands:
        x = [place(b) for b in band.x] if panel.factors else list(band.x)
        few = len(x) <= 24  # markers of more run into each other
        ax.fill_between(x, band.low, band.high, color=band.color, alpha=0.18, linewidth=0)
        ax.plot(x, band.y, color=band.color, linewidth=1.3, marker="o" if few else "", markersize=3, label=band.name)
    if panel.line is not None:
        ax.axhline(panel.line[0], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        if panel.line[1]:
            label(ax, 1.0, panel.line[0], panel.line[1], color=MUTED, xycoords=ax.get_yaxis_transform(), ha="right",
                  offset=(0.0, 3.0))  # fmt: skip
            ax.set_ylim(top=max(ax.get_ylim()[1], 1.2 * panel.line[0]))
    if not panel.factors:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        ax.margins(x=0.02)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    tidy(ax, title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, grid="y")
    if len(panel.bands) > 1 or panel.line == (0.0, ""):
        clear = (1.0, 1.0, "upper right") if panel.line == (0.0, "") else (0.0, 0.5, "center left")  # of the line
        where: dict[str, Any] = {"loc": clear[2], "bbox_to_anchor": clear[:2]}
        ax.legend(frameon=False, fontsize="small", handlelength=1.4, **where)
