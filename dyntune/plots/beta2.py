"""A beta2 with its range and bounds, how well each predicts squared gradients, and what else was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dyntune.plots.beta2_panels import draw_panel, panels, place
from dyntune.plots.style import BLUE, INK, MUTED, ORANGE, label, new_rows, number, tidy
from dyntune.records import Recommendation, Status

__all__ = ["Beta2Data", "beta2_data", "draw_beta2", "plot_beta2"]

# Values that people know, as ticks.
_TICKS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999)
_TOP = 0.3  # nats; what is worse than three times the tolerance is beyond the frame
# Inches of the upper panel with and without scores, and of each below it.
_HEIGHT, _UNSCORED, _BELOW = 3.2, 2.2, 2.2


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
        bounds: The ends of what may be used, by name.
        present: What the optimizer has; None where it is not told.
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
    bounds: tuple[tuple[str, float], ...] = ()
    present: float | None = None


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
    last = result.evidence.get("beta2 at the last step")  # Adafactor's knob is an exponent: the factor is drawn
    grows = isinstance(last, float)
    ends = {"beta1²": "lowest for beta1", "1 − 3/steps": "highest for the length of training"}
    bounds = [(name, result.evidence.get(key)) for name, key in ends.items()]
    present = result.evidence.get("present value")
    return Beta2Data(
        title=_title(result),
        knob="beta2 at the last step" if grows else result.knob,
        betas=tuple(b for b, _, _ in points),
        excess=tuple(e for _, e, _ in points),
        low=tuple(e - m for _, e, m in points),
        high=tuple(e + m for _, e, m in points),
        value=float(last) if isinstance(last, float) else result.value,
        admitted=(float(last), float(last)) if isinstance(last, float) else (result.low, result.high),
        tokens_per_step=tokens if isinstance(tokens, float) else None,
        bounds=tuple((name, bound) for name, bound in bounds if isinstance(bound, float) and 0 < bound < 1),
        present=present if isinstance(present, float) and 0 < present < 1 else None,
    )


def _title(result: Recommendation) -> str:
    if result.value is None:
        return f"No {result.knob} suggested: {result.reason}"
    text = f"{result.knob} {number(result.value, 4)} ({number(result.low, 4)} .. {number(result.high, 4)})"
    text = f"{text}: {result.evidence.get('active bound')}"
    return text if result.status is Status.OK else f"{text}, {result.status.name.lower().replace('_', ' ')}"


def _half_life(place: float) -> float:
    return math.log(2) / math.log1p(math.exp(-place))


def draw_beta2(ax: Axes, data: Beta2Data) -> None:
    """Draw on given axes."""
    shown = [*data.betas, *(_TICKS[0], _TICKS[-1])] + ([] if data.value is None else [data.value])
    left, right = min(map(place, shown)), max(map(place, shown))
    top = min(_TOP, max([0.12, *(1.15 * h for h in data.high)]))
    bottom = min([0.0, *data.low]) - 0.02
    ax.set_ylim(max(bottom, -top / 2), top)
    if data.value is not None:
        ax.axvspan(*(place(end) for end in data.admitted), color=BLUE, alpha=0.13, linewidth=0)
        ax.axvline(place(data.value), color=BLUE, linewidth=1.3)
    if data.betas:
        places = [place(b) for b in data.betas]
        ax.fill_between(places, data.low, data.high, color=MUTED, alpha=0.25, linewidth=0)
        ax.plot(places, data.excess, color=INK, linewidth=1.3, marker="o", markersize=3.5)
    _draw_marks(ax, data)
    draw_factors(ax, (left - 0.2, right + 0.2))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5) if data.betas else NullLocator())
    _draw_half_life(ax, data)
    ylabel = "prediction of g²: nats above best" if data.betas else ""
    tidy(ax, title=data.title, xlabel=data.knob, ylabel=ylabel, grid="y", columns=54)


def draw_factors(ax: Axes, limits: tuple[float, float]) -> None:
    """Ticks at factors that people know."""
    inside = [b for b in _TICKS if limits[0] <= place(b) <= limits[1]]
    ax.set_xlim(limits)
    ax.xaxis.set_major_locator(FixedLocator([place(b) for b in inside]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([f"{b:g}" for b in inside])


def _draw_marks(ax: Axes, data: Beta2Data) -> None:
    """The bounds and the present value, as upright lines that say what they are."""
    marks = [(name, bound, ORANGE, 0.98, 1.0) for name, bound in data.bounds]
    if data.present is not None and data.present != data.value:  # on the other side and at the other end: they may meet
        marks.append(("present", data.present, INK, 0.03, -1.0))
    for name, beta, color, height, side in marks:
        ax.axvline(place(beta), color=color, linewidth=0.9, linestyle=(0, (4, 3)))
        label(
            ax,
            place(beta),
            height,
            name,
            color=color,
            rotation=90,
            va="top" if height > 0.5 else "bottom",
            ha="left" if side > 0 else "right",
            offset=(2.0 * side, 0.0),
            xycoords=ax.get_xaxis_transform(),
        )


def _draw_half_life(ax: Axes, data: Beta2Data) -> None:
    """A second axis above: the half-life of each factor."""
    per_step = data.tokens_per_step or 1.0
    unit = "steps" if data.tokens_per_step is None else "tokens"
    upper = ax.secondary_xaxis("top")
    places = [place(b) for b in (0.8, 0.9, 0.98, 0.999, 0.9999)]
    upper.xaxis.set_major_locator(FixedLocator(places))
    upper.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(_half_life(x) * per_step)))
    upper.set_xlabel(f"half-life, {unit}", color=MUTED)
    upper.spines["top"].set_visible(False)
    upper.tick_params(colors=MUTED)


def plot_beta2(result: Recommendation, *, ax: Axes | None = None) -> Axes:
    """Draw the suggested beta2 with its range and bounds, and how well each predicts squared gradients.

    The horizontal axis is even in log(beta2 / (1 - beta2)); the one above has the half-life, in tokens where tokens per
    step are known. The band is the 95% interval of all factors at once. In a figure of its own, what else was measured
    is below it: autocorrelation of gradients and of their squares, and staleness, over beta2 from a pilot and over
    training from a record. Adafactor is drawn by its factor at the last step.

    Args:
        result: What :func:`dyntune.suggest_beta2` or :func:`dyntune.suggest_beta2_from_run` returned.
        ax: Where to draw the upper panel alone; default a figure of its own (``.figure`` of what is returned), unknown
            to pyplot.

    Returns:
        The axes of the upper panel.

    Example:
        >>> from dyntune.suggest.beta2_rule import Beta2Evidence, beta2_rule
        >>> plot_beta2(beta2_rule(Beta2Evidence(present=0.999, beta1=0.9))).get_xlabel()
        'beta2'
    """
    data = beta2_data(result)
    if ax is not None:
        draw_beta2(ax, data)
        return ax
    below = panels(result)
    upper, *rest = new_rows(_HEIGHT if data.betas else _UNSCORED, *[_BELOW] * len(below))
    draw_beta2(upper, data)
    for axes, panel in zip(rest, below, strict=True):
        draw_panel(axes, panel)
        if panel.factors:
            draw_factors(axes, upper.get_xlim())
    return upper
