"""How well each beta2 predicts squared gradients, and what is admitted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dyntune.plots.style import BLUE, INK, MUTED, label, new_axes, number, tidy
from dyntune.records import Recommendation, Status

__all__ = ["Beta2Data", "beta2_data", "draw_beta2", "plot_beta2"]

# Values that people know, as ticks.
_TICKS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999)
_TOP = 0.3  # nats; what is worse than three times the tolerance is beyond the frame


@dataclass(frozen=True, kw_only=True)
class Beta2Data:
    """What the figure shows.

    Args:
        title: One line above the figure.
        knob: What the optimizer calls the factor.
        betas: Factors that were compared, ascending.
        excess: Score of each above the best, in nats.
        low: Lower end of its interval.
        high: Upper end of its interval.
        value: The choice; None when refused.
        admitted: Range of the recommendation.
        tokens_per_step: For the second axis; None for steps alone.
    """

    title: str
    knob: str
    betas: tuple[float, ...]
    excess: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    value: float | None
    admitted: tuple[float, float]
    tokens_per_step: float | None


def beta2_data(result: Recommendation) -> Beta2Data:
    """What :func:`plot_beta2` shows, as plain data."""
    rows = zip(
        result.series.get("score_beta2", ()),
        result.series.get("score_excess", ()),
        result.series.get("score_margin", ()),
        strict=False,
    )
    points = sorted((b, e, m) for b, e, m in rows if 0 < b < 1 and e is not None and m is not None)
    tokens = result.evidence.get("tokens per step")
    return Beta2Data(
        title=_title(result),
        knob=result.knob,
        betas=tuple(b for b, _, _ in points),
        excess=tuple(e for _, e, _ in points),
        low=tuple(e - m for _, e, m in points),
        high=tuple(e + m for _, e, m in points),
        value=result.value,
        admitted=(result.low, result.high),
        tokens_per_step=tokens if isinstance(tokens, float) else None,
    )


def _title(result: Recommendation) -> str:
    if result.value is None:
        return f"No {result.knob} suggested: {result.reason}"
    text = f"{result.knob} {number(result.value, 4)} ({number(result.low, 4)} .. {number(result.high, 4)})"
    text = f"{text}: {result.evidence.get('active bound')}"
    return text if result.status is Status.OK else f"{text}, {result.status.name.lower().replace('_', ' ')}"


def _place(beta: float) -> float:
    """Where a factor is drawn: by log(beta / (1 - beta)), cut at the ends of what is compared."""
    beta = min(max(beta, 0.5), 0.99999)
    return math.log(beta / (1 - beta))


def _half_life(place: float) -> float:
    return math.log(2) / math.log1p(math.exp(-place))


def draw_beta2(ax: Axes, data: Beta2Data) -> None:
    """Draw on given axes."""
    shown = [*data.betas, *(_TICKS[0], _TICKS[-1])] + ([] if data.value is None else [data.value])
    left, right = min(map(_place, shown)), max(map(_place, shown))
    ax.set_xlim(left - 0.2, right + 0.2)
    top = min(_TOP, max([0.12, *(1.15 * h for h in data.high)]))
    bottom = min([0.0, *data.low]) - 0.02
    ax.set_ylim(max(bottom, -top / 2), top)
    if data.value is not None:
        ax.axvspan(*(_place(end) for end in data.admitted), color=BLUE, alpha=0.13, linewidth=0)
        ax.axvline(_place(data.value), color=BLUE, linewidth=1.3)
    if data.betas:
        places = [_place(b) for b in data.betas]
        ax.fill_between(places, data.low, data.high, color=MUTED, alpha=0.25, linewidth=0)
        ax.plot(places, data.excess, color=INK, linewidth=1.3, marker="o", markersize=3.5)
    else:
        label(ax, 0.5, 0.5, "nothing was scored", color=MUTED, xycoords="axes fraction", ha="center")
    inside = [b for b in _TICKS if left - 0.2 <= _place(b) <= right + 0.2]
    ax.xaxis.set_major_locator(FixedLocator([_place(b) for b in inside]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([f"{b:g}" for b in inside])
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    _draw_half_life(ax, data)
    tidy(ax, title=data.title, xlabel=data.knob, ylabel="score above the best, nats", grid="y", columns=54)


def _draw_half_life(ax: Axes, data: Beta2Data) -> None:
    """A second axis above: the half-life of each factor."""
    per_step = data.tokens_per_step or 1.0
    unit = "steps" if data.tokens_per_step is None else "tokens"
    upper = ax.secondary_xaxis("top")
    places = [_place(b) for b in (0.8, 0.9, 0.98, 0.999, 0.9999)]
    upper.xaxis.set_major_locator(FixedLocator(places))
    upper.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(_half_life(x) * per_step)))
    upper.set_xlabel(f"half-life, {unit}", color=MUTED)
    upper.spines["top"].set_visible(False)
    upper.tick_params(colors=MUTED)


def plot_beta2(result: Recommendation, *, ax: Axes | None = None) -> Axes:
    """Draw how well each beta2 predicts squared gradients, with the suggested one and its range.

    The horizontal axis is even in log(beta2 / (1 - beta2)); the one above has the half-life, in tokens where tokens per
    step are known. The band is the 95% interval of all factors at once.

    Args:
        result: What :func:`dyntune.suggest_beta2` returned.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Returns:
        The axes.

    Example:
        >>> from dyntune.suggest.beta2_rule import Beta2Evidence, beta2_rule
        >>> plot_beta2(beta2_rule(Beta2Evidence(present=0.999, beta1=0.9))).get_xlabel()
        'beta2'
    """
    axes = new_axes(height=3.2) if ax is None else ax
    draw_beta2(axes, beta2_data(result))
    return axes
