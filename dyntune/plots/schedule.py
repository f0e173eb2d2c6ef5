"""A learning-rate schedule over the steps of a training."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from dyntune.plots.style import BLUE, MUTED, label, new_axes, number, tidy
from dyntune.records import Status
from dyntune.suggest.schedule_rule import Schedule

__all__ = ["ScheduleData", "draw_schedule", "plot_schedule", "schedule_data"]

_FINE = 300  # points of a curve, besides its corners: more than a figure has pixels to tell apart along a slope


@dataclass(frozen=True, kw_only=True)
class ScheduleData:
    """What the figure shows.

    Args:
        title: One line above the figure.
        steps: Steps, ascending, those where the shape changes among them; empty when refused.
        rates: The first group's learning rate at each.
        phases: Names of the phases by first and last step, in order.
        peak: The highest rate; None when refused.
        x_range: Range of steps that is shown.
    """

    title: str
    steps: tuple[int, ...]
    rates: tuple[float, ...]
    phases: tuple[tuple[int, int, str], ...]
    peak: float | None
    x_range: tuple[float, float]


def schedule_data(result: Schedule) -> ScheduleData:
    """What :func:`plot_schedule` shows, as plain data."""
    last = result.num_steps - 1
    refused = result.peak is None
    corners = {0, result.warmup_steps, result.num_steps - result.decay_steps, last}
    steps = sorted({round(last * i / _FINE) for i in range(_FINE + 1)} | {t for t in corners if t <= last})
    return ScheduleData(
        title=_title(result),
        steps=() if refused else tuple(steps),
        rates=() if refused else tuple(result.rate(t) for t in steps),
        phases=() if refused else _phases(result),
        peak=result.peak,
        x_range=(0.0, float(result.num_steps)),
    )


def _title(result: Schedule) -> str:
    if result.peak is None:
        return f"No schedule: {result.reason}"
    text = f"Learning rate {result.words}"
    return text if result.status is Status.OK else f"{text}: {result.status.name.lower().replace('_', ' ')}"


def _phases(result: Schedule) -> tuple[tuple[int, int, str], ...]:
    """Warm-up, stable phase and decay, those that there are."""
    last, start = result.num_steps - 1, result.num_steps - result.decay_steps
    ends = [
        (0, result.warmup_steps, "warm-up"),
        (result.warmup_steps, min(start, last), "constant" if result.shape == "constant" else "stable"),
        (start, last, "decay"),
    ]
    return tuple((a, b, name) for a, b, name in ends if a < b)


def draw_schedule(ax: Axes, data: ScheduleData) -> None:
    """Draw on given axes."""
    ax.set_xlim(*data.x_range)
    top = 1.0 if data.peak is None else data.peak
    ax.set_ylim(0.0, 1.18 * top)
    width = data.x_range[1] - data.x_range[0]
    upward = ax.get_xaxis_transform()
    for first, last, name in data.phases:
        if first > 0:
            ax.axvline(first, color=MUTED, linewidth=0.8, linestyle=":")
        if last - first >= 0.12 * width:  # narrower than its name
            label(ax, 0.5 * (first + last), 0.93, name, color=MUTED, xycoords=upward, ha="center", va="center")
    if len(data.steps) == 1:
        ax.plot(data.steps, data.rates, color=BLUE, linestyle="none", marker="o", markersize=4.5, clip_on=False)
    elif data.steps:
        ax.plot(data.steps, data.rates, color=BLUE, linewidth=1.6, clip_on=False, zorder=3)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.yaxis.set_major_locator(NullLocator() if data.peak is None else MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    tidy(ax, title=data.title, xlabel="step", ylabel="learning rate", grid="y", columns=54)


def plot_schedule(result: Schedule, *, ax: Axes | None = None) -> Axes:
    """Draw the first parameter group's learning rate over the steps of a training.

    Args:
        result: What :func:`dyntune.suggest_schedule` returned.
        ax: Where to draw; default a figure of its own (``.figure`` of what is returned), unknown to pyplot.

    Returns:
        The axes.

    Example:
        >>> plot_schedule(Schedule.of(0.1, num_steps=100, warmup_steps=10)).get_ylabel()
        'learning rate'
    """
    axes = new_axes(height=2.6) if ax is None else ax
    draw_schedule(axes, schedule_data(result))
    return axes
