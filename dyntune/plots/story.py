"""The evidence behind the story of a run: its main series over the steps with the alarms marked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError
from dyntune.monitor.ratios import GRADIENT_NORM, LEARNING_RATE, LOSS, first_column
from dyntune.monitor.run import Array, Run
from dyntune.monitor.telling import column
from dyntune.plots.style import BLUE, GREEN, INK, MUTED, ORANGE, cleaned, label, new_column, number, tidy

__all__ = ["Panel", "StoryData", "plot_story", "story_data"]

PANEL = 1.45  # inches
MORE = 2  # columns of the evidence that are drawn
GROUPS = 3  # learning rates beside the first group's
POINTS = 600  # of a line: a figure is some 500 pixels wide
LOG = 20.0  # largest over smallest from which a linear axis hides the smaller half of the story
BESIDE = 18  # characters that can stand beside so low a panel
COLUMNS = 58  # characters of the title in a line
SAME = 1e-3  # of the largest value: what changes less is drawn as constant
LARGEST = 1e300  # drawn instead of what is larger: the range of two such numbers is still a number
DOTS = 60  # values up to which each is marked


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One series.

    Args:
        name: Its column.
        said: That as people write it.
        steps: Shape (n,), ascending; the middle of a stretch where there are more values than can be drawn.
        values: Shape (n,); medians of the stretches, NaN where none is finite.
        low: Shape (n,); lowest of each stretch.
        high: Shape (n,); highest.
        missing: Steps at which the value is not finite.
        log: Whether the axis is logarithmic.
        groups: (name, steps, values) of learning rates of other parameter groups.
    """

    name: str
    said: str
    steps: Array
    values: Array
    low: Array
    high: Array
    missing: Array
    log: bool
    groups: tuple[tuple[str, Array, Array], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class StoryData:
    """What the figure shows.

    Args:
        panels: From top to bottom.
        since: Where the trouble began; None without an alarm.
        noticed: Where it was seen.
        others: Steps of later alarms.
        span: First and last step.
        title: One line above.
    """

    panels: tuple[Panel, ...]
    since: int | None
    noticed: int | None
    others: tuple[int, ...]
    span: tuple[float, float]
    title: str


def story_data(
    run: Run,
    *,
    since: int | None = None,
    noticed: int | None = None,
    others: Sequence[int] = (),
    columns: Sequence[str] = (),
    title: str = "",
) -> StoryData:
    """What :func:`plot_story` shows, as plain data.

    Raises:
        InvalidArgumentError: The run has none of the columns, and so nothing to draw.
    """
    usual = [first_column(run, names) for names in (LOSS, GRADIENT_NORM, LEARNING_RATE)]
    names = [name for name in usual if name is not None]
    more = [name for name in columns if name in run and name not in names and run.series(name)[0].size > 1]
    names += more[:MORE]
    if not names:
        raise InvalidArgumentError("the run has neither loss nor learning rate: there is nothing to draw yet.")
    panels = tuple(_panel(run, name) for name in names)
    ends = [run.series(name)[0] for name in names]
    marks = [float(step) for step in (since, noticed, *others) if step is not None]
    low = min([*(float(steps.min()) for steps in ends if steps.size), *marks])
    high = max([*(float(steps.max()) for steps in ends if steps.size), *marks])
    return StoryData(panels=panels, since=since, noticed=noticed, others=tuple(others), span=(low, high), title=title)


def _panel(run: Run, name: str) -> Panel:
    at, found = run.series(name)
    order = np.argsort(at, kind="stable")
    steps, values = at[order].astype(np.float64), found[order]
    finite = np.isfinite(values)
    values = np.where(finite, np.clip(values, -LARGEST, LARGEST), np.nan)
    groups = tuple(_groups(run, name)) if name in LEARNING_RATE else ()
    known = np.concatenate([values[finite], *(x[np.isfinite(x)] for _, _, x in groups)])
    log = bool(known.size) and float(known.min()) > 0 and float(known.max()) / float(known.min()) > LOG
    where, middle, low, high = _thinned(steps, values)
    return Panel(
        name=name,
        said=cleaned(column(name), limit=60),
        steps=where,
        values=middle,
        low=low,
        high=high,
        missing=steps[~finite],
        log=log,
        groups=groups,
    )


def _groups(run: Run, name: str) -> Iterator[tuple[str, Array, Array]]:
    """Where they differ from the first group's; a recorder writes them only there."""
    for other in [found for found in run.names if found.startswith(f"{name}/")][:GROUPS]:
        steps, values = run.series(other)
        where, middle, _, _ = _thinned(steps.astype(np.float64), values)
        yield f"group {cleaned(other.removeprefix(f'{name}/'), limit=12)}", where, middle


def _thinned(steps: Array, values: Array) -> tuple[Array, Array, Array, Array]:
    """Middles of stretches, and the median, lowest and highest value of each: a spike of one step is seen."""
    if steps.size <= POINTS:
        return steps, values, values, values
    cuts: NDArray[np.int64] = np.linspace(0, steps.size, POINTS + 1).astype(np.int64)
    rows = []
    for first, end in pairwise(cuts.tolist()):
        known = values[first:end][np.isfinite(values[first:end])]
        found = (np.median(known), known.min(), known.max()) if known.size else (np.nan, np.nan, np.nan)
        rows.append((steps[(first + end - 1) // 2], *found))
    where, middle, low, high = np.array(rows, dtype=np.float64).T
    return where, middle, low, high


def plot_story(
    run: Run,
    *,
    since: int | None = None,
    noticed: int | None = None,
    others: Sequence[int] = (),
    columns: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Draw loss, gradient norm and learning rate below each other, and up to two more columns, with alarms marked.

    Axes are logarithmic where values are positive and far apart. Crosses are values that are not finite.

    Args:
        run: Any run.
        since: Where the trouble began: a line through all panels.
        noticed: Where it was seen: a broken line.
        others: Steps of later alarms: thin lines.
        columns: More columns by preference; those that the run does not have are left out.
        title: One line above.

    Returns:
        A figure that pyplot does not know.

    Raises:
        InvalidArgumentError: The run has none of the columns.

    Example:
        >>> from dyntune.monitor.run import Row
        >>> run = Run(rows=[Row(step=i, values={"train/loss": 2.0 - i, "train/lr": 0.1}) for i in range(2)])
        >>> [ax.get_ylabel() for ax in plot_story(run, since=1).axes]
        ['loss', 'learning rate']
    """
    data = story_data(run, since=since, noticed=noticed, others=others, columns=columns, title=title)
    axes = new_column(len(data.panels), height=PANEL)
    for place, (ax, panel) in enumerate(zip(axes, data.panels, strict=True)):
        _draw(ax, panel, data)
        last, beside = place == len(axes) - 1, len(panel.said) <= BESIDE
        tidy(ax, title="", xlabel="step" if last else "", ylabel=panel.said if beside else "", grid="y")
        if not beside:
            label(ax, 0.0, 1.0, panel.said, xycoords="axes fraction", va="bottom", offset=(0.0, 3.0))
    _name_marks(axes[0], data)
    figure = axes[0].get_figure(root=True)
    assert isinstance(figure, Figure)  # since they were made in one
    figure.align_ylabels(axes)
    title = textwrap.fill(cleaned(data.title, limit=160), COLUMNS)
    figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold", color=INK, parse_math=False)
    return figure


def _draw(ax: Axes, panel: Panel, data: StoryData) -> None:
    low, high = data.span
    room = 0.02 * ((high - low) or 1.0)
    ax.set_xlim(low - room, high + room)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if panel.log:
        ax.set_yscale("log")
        known = panel.values[np.isfinite(panel.values)]
        ticks = (1.0,) if known.max() > 1000 * known.min() else (1.0, 3.0)
        ax.yaxis.set_major_locator(LogLocator(subs=ticks, numticks=6))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
        _show_zero(ax, panel)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(float(value))))
    ax.fill_between(panel.steps, panel.low, panel.high, color=BLUE, alpha=0.22, linewidth=0)
    dots = "o" if np.count_nonzero(np.isfinite(panel.values)) <= DOTS else ""
    ax.plot(panel.steps, panel.values, color=BLUE, linewidth=1.2, marker=dots, markersize=3)
    for said, steps, values in panel.groups:
        ax.plot(steps, values, color=GREEN, linewidth=1.2, marker="" if steps.size > 1 else "o", markersize=3)
        if steps.size:
            label(
                ax, float(steps[-1]), float(values[-1]), said, color=GREEN, ha="right", va="bottom", offset=(0.0, 1.0)
            )
    if panel.missing.size:
        # One in a fortieth of the width at most: they are to be told apart.
        _, chosen = np.unique(np.floor(40 * (panel.missing - low) / ((high - low) or 1.0)), return_index=True)
        crosses = panel.missing[chosen]
        ax.plot(
            crosses,
            np.full(crosses.size, 0.93),
            transform=ax.get_xaxis_transform(),
            color=INK,
            linestyle="none",
            marker="x",
            markersize=4,
        )
    for step in data.others:
        ax.axvline(step, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
    if data.noticed is not None and data.noticed != data.since:
        ax.axvline(data.noticed, color=ORANGE, linewidth=1.0, linestyle=(0, (4, 3)))
    if data.since is not None:
        ax.axvline(data.since, color=ORANGE, linewidth=1.4)


def _show_zero(ax: Axes, panel: Panel) -> None:
    """Of what does not change, how large it is, not the last digits."""
    known = np.concatenate([panel.low, panel.high])
    known = known[np.isfinite(known)]
    if known.size and np.ptp(known) <= SAME * np.abs(known).max():
        largest = float(np.abs(known).max()) or 1.0
        ax.set_ylim(-1.5 * largest if known.min() < 0 else 0.0, 1.5 * largest if known.max() >= 0 else 0.0)


def _name_marks(ax: Axes, data: StoryData) -> None:
    """What the lines are, beside them, where there is more room."""
    if data.since is None:
        return
    low, high = data.span
    across = ax.get_xaxis_transform()
    left = data.since - low > 0.5 * ((high - low) or 1.0)
    later = data.noticed is not None and data.noticed != data.since
    said = f"from step {data.since:,}, noticed at {data.noticed:,}" if later else f"step {data.since:,}"
    side = "right" if left else "left"
    label(ax, data.since, 1.0, said, color=ORANGE, xycoords=across, ha=side, va="bottom", offset=(0.0, 1.0))
