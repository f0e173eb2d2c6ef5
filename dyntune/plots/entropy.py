"""The critical learning rate over the entropy coefficient, and what an entropy did over a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dyntune.errors import InvalidArgumentError
from dyntune.plots.style import BLUE, INK, MUTED, ORANGE, label, new_axes, new_rows, tidy
from dyntune.records import short_number
from dyntune.suggest.entropy_rule import EntropyCoefficient

__all__ = ["EntropyCoefData", "draw_entropy_coef", "entropy_coef_data", "plot_entropy", "plot_entropy_coef"]

_HEIGHT, _ROW = 3.2, 1.8  # inches
_POINTS = 121
_NARROW = 100.0  # a range of rates in which powers of ten alone are too few ticks
_WIDEST = 1e3  # times the least critical rate: what lies above is drawn at that


@dataclass(frozen=True, kw_only=True)
class EntropyCoefData:
    """What the figure shows.

    Args:
        title: One line above the figure.
        alphas: Coefficients.
        critical: Critical rate at each.
        low: Lower end of its bracket.
        high: Upper end.
        lr: The learning rate that was asked about.
        stable: First and last coefficient at which it is stable for certain; None where there is none.
        present: The coefficient in use; None where it is not known.
        value: The suggested one; None where refused.
    """

    title: str
    alphas: tuple[float, ...]
    critical: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    lr: float
    stable: tuple[float, float] | None
    present: float | None
    value: float | None


def entropy_coef_data(found: EntropyCoefficient) -> EntropyCoefData:
    """What :func:`plot_entropy_coef` shows, as plain data."""
    first, last = found.evidence.spectrum.range
    alphas = tuple(first + (last - first) * (i / (_POINTS - 1)) ** 2 for i in range(_POINTS))
    rates = [found.critical_lr(alpha) for alpha in alphas]
    told = [(math.nan if r.value is None else r.value, r.low, r.high) for r in rates]
    if found.value is None:
        title = "No entropy coefficient is stable for certain at this learning rate"
    else:
        title = f"Entropy coefficient {short_number(found.value)} at learning rate {short_number(found.lr)}"
    return EntropyCoefData(
        title=title,
        alphas=alphas,
        critical=tuple(value for value, _, _ in told),
        low=tuple(low for _, low, _ in told),
        high=tuple(high for _, _, high in told),
        lr=found.lr,
        stable=None if math.isnan(found.low) else (found.low, found.high),
        present=found.evidence.present,
        value=found.value,
    )


def draw_entropy_coef(ax: Axes, data: EntropyCoefData) -> None:
    """Draw it on given axes; the rate is logarithmic."""
    ax.set_yscale("log")
    finite = [x for x in (*data.critical, *data.low) if 0 < x < math.inf]
    least = min([data.lr, *finite])
    most = max([data.lr, *(x for x in data.critical if x < math.inf)])
    top = min(most * 2, least * _WIDEST) if finite else data.lr * 10

    def cut(values: Sequence[float]) -> list[float]:
        return [math.nan if math.isnan(x) else min(x, top) for x in values]

    ax.fill_between(data.alphas, cut(data.low), cut(data.high), color=ORANGE, alpha=0.2, linewidth=0.0)
    ax.plot(data.alphas, cut(data.critical), color=ORANGE, linewidth=1.6)
    span = data.alphas[-1] - data.alphas[0]
    if data.stable is not None:
        ax.plot(data.stable, [data.lr] * 2, color=BLUE, linewidth=3.0, solid_capstyle="butt")
    ends = data.alphas[0], data.alphas[-1]
    ax.plot(ends, [data.lr] * 2, color=BLUE, linewidth=1.0, linestyle=(0, (4, 3)))
    end = data.alphas[-1] + 0.02 * span
    rate = cut(data.critical)[-1]
    apart = abs(math.log(rate / data.lr)) > 0.09 * math.log(2 * top / least) if rate > 0 else True
    if not math.isnan(rate):
        label(ax, end, rate, "critical", color=ORANGE, va="center" if apart else "bottom")
    label(ax, end, data.lr, "learning rate", color=BLUE, va="center" if apart else "top")
    both = data.value is not None and data.present == data.value
    marks = [(data.present, "in use", "x", INK), (data.value, "suggested", "o", BLUE)]
    for alpha, text, shape, color in [(data.value, "in use, and suggested", "o", BLUE)] if both else marks:
        if alpha is not None and ends[0] <= alpha <= ends[1]:
            ax.plot([alpha], [data.lr], marker=shape, color=color, markersize=6, clip_on=False)
            label(ax, alpha, data.lr, text, color=MUTED, va="center", offset=(4.0, 10.0 if shape == "o" else -10.0))
    ax.set_ylim(least / 2, top * 1.2)
    ax.set_xlim(data.alphas[0] - 0.02 * span, data.alphas[-1] + 0.24 * span)
    ax.xaxis.set_major_locator(FixedLocator([x for x in MaxNLocator(nbins=5).tick_values(*ends) if x <= ends[1]]))
    narrow = top / least < _NARROW
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: short_number(x)))
    ax.yaxis.set_minor_locator(NullLocator())
    tidy(ax, title=data.title, xlabel="entropy coefficient", ylabel="learning rate", grid="y")


def plot_entropy_coef(found: EntropyCoefficient, *, ax: Axes | None = None) -> Axes:
    """Draw the critical learning rate over the entropy coefficient, with its bracket and the stable range.

    Args:
        found: What :func:`dyntune.suggest_entropy_coef` returned.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.
    """
    ax = new_axes(height=_HEIGHT) if ax is None else ax
    draw_entropy_coef(ax, entropy_coef_data(found))
    return ax


def plot_entropy(
    steps: Sequence[float], entropy: Sequence[float], drift: Sequence[float], *, ratio: Sequence[float] | None = None
) -> Axes:
    """Draw the mean entropy over training, its drift per gradient step, and how near the edge the policy was.

    Args:
        steps: Environment steps.
        entropy: Nats, as many.
        drift: Change per gradient step, as many.
        ratio: Largest eigenvalue times learning rate over the threshold, as many; 1 is the edge.

    Returns:
        The axes of the entropy, the upmost.

    Raises:
        InvalidArgumentError: Nothing to draw, or series of different lengths.
    """
    series = [entropy, drift, *([] if ratio is None else [ratio])]
    if not steps or any(len(each) != len(steps) for each in series):
        raise InvalidArgumentError(f"steps, entropy, drift and ratio have {[len(steps), *map(len, series)]} entries.")
    names = ("entropy, nats", "drift a step", "share of the edge")
    rows = new_rows(*[_ROW] * len(series))
    for i, (ax, values, name) in enumerate(zip(rows, series, names, strict=False)):
        ax.plot(steps, values, color=BLUE, linewidth=1.4)
        if i == 1:
            ax.axhline(0.0, color=MUTED, linewidth=0.8)
        if i < 2:
            ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
        else:  # a healthy run is thousands of times below
            ax.set_yscale("log")
            ax.axhline(1.0, color=ORANGE, linewidth=1.0, linestyle=(0, (4, 3)))
            ax.yaxis.set_major_locator(LogLocator(numticks=5))
            ax.yaxis.set_minor_locator(NullLocator())
        reach = max(steps) - min(steps) or 1.0
        ax.set_xlim(min(steps) - 0.03 * reach, max(steps) + 0.03 * reach)
        last = i == len(series) - 1
        tidy(ax, title="Entropy over training" if i == 0 else "", xlabel="steps" if last else "", ylabel=name, grid="y")
    return rows[0]
