"""The suggested share of each source, with its interval, beside its weight and its floor."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dyntune.plots.style import BLUE, INK, MUTED, ORANGE, cleaned, label, new_axes, tidy
from dyntune.suggest.mixture_changed import ChangedMixture
from dyntune.suggest.mixture_rule import Mixture

__all__ = ["MixtureData", "draw_mixture", "mixture_data", "plot_mixture"]

_HEAD, _ROW = 1.3, 0.42  # inches
_HALF = 0.28  # of a row: how far a bar and a mark reach


@dataclass(frozen=True, kw_only=True)
class MixtureData:
    """What the figure shows.

    Args:
        title: One line above the figure.
        names: Of the sources.
        shares: Suggested; None where refused.
        low: Lower ends of their intervals.
        high: Upper ends.
        beside: Weights of the sources in the objective, or the shares that a changed objective is compared with.
        beside_is: Which of the two.
        floors: Least shares.
    """

    title: str
    names: tuple[str, ...]
    shares: tuple[float, ...] | None
    low: tuple[float, ...]
    high: tuple[float, ...]
    beside: tuple[float, ...]
    beside_is: str
    floors: tuple[float, ...]


def mixture_data(found: Mixture | ChangedMixture) -> MixtureData:
    """What :func:`plot_mixture` shows, as plain data."""
    changed = isinstance(found, ChangedMixture)
    if found.proportions is None:
        title = "No mixture: nothing to choose by"
    elif isinstance(found, ChangedMixture):
        title = f"Shares of a changed objective ({found.objective})"
    elif found.to_proportional.value is None:
        title = "Shares for the least noisy gradient"
    else:
        less = found.to_proportional
        title = (
            f"Gradient variance {less.value:.2f} ({less.low:.2f} .. {less.high:.2f}) times that of weights as shares"
        )
    return MixtureData(
        title=title,
        names=found.names,
        shares=found.proportions,
        low=found.low,
        high=found.high,
        beside=found.present if isinstance(found, ChangedMixture) else found.weights,
        beside_is="compared with" if changed else "weight",
        floors=found.floors,
    )


def draw_mixture(ax: Axes, data: MixtureData) -> None:
    """Draw it on given axes: a row for each source, the first on top."""
    last = len(data.names) - 1
    for i, name in enumerate(data.names):
        if data.shares is not None:
            ax.barh(i, data.shares[i], height=2 * _HALF, color=BLUE, alpha=0.75)
            ax.plot([data.low[i], data.high[i]], [i, i], color=INK, linewidth=1.2)
        for x, color in ((data.beside[i], ORANGE), (data.floors[i], MUTED)):
            ax.plot([x, x], [i - _HALF - 0.1, i + _HALF + 0.1], color=color, linewidth=1.8)
        label(ax, 0.0, i, cleaned(name, limit=24), ha="right", va="center", offset=(-6.0, 0.0))
    below = {"rotation": 0, "va": "top", "ha": "center", "offset": (0.0, -2.0)}
    apart = data.beside[last] - data.floors[last] > 0.06 * max(*data.high, *data.beside)
    label(ax, data.beside[last], last + _HALF + 0.1, data.beside_is, color=ORANGE, **below)
    if apart:
        label(ax, data.floors[last], last + _HALF + 0.1, "floor", color=MUTED, **below)
    top = max(*data.beside, *(data.high if data.shares is not None else data.floors))
    ax.set_xlim(0.0, min(1.02, top * 1.08))
    ax.set_ylim(last + 0.9, -0.6)
    ax.yaxis.set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g}%"))
    tidy(ax, title=data.title, xlabel="share of the rows", ylabel="", grid="x")


def plot_mixture(found: Mixture | ChangedMixture, *, ax: Axes | None = None) -> Axes:
    """Draw the suggested shares with their intervals, the weights and the floors.

    Args:
        found: What :func:`dyntune.suggest_mixture` or a mixing law's ``minimum`` returned.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.
    """
    ax = new_axes(height=_HEAD + _ROW * len(found.names)) if ax is None else ax
    draw_mixture(ax, mixture_data(found))
    return ax
