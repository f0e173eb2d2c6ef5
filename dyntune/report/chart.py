"""Series over steps as plain data for the page: paths in a box of 1000 by 200, ticks in percent, numbers to hover."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dyntune.monitor.rows import Array
from dyntune.plots.style import number
from dyntune.report.axis import LOG_RATIO, Axis, axis_of
from dyntune.report.envelope import Envelope

__all__ = ["HEIGHT", "WIDTH", "Chart", "Line", "Series", "Tick", "chart", "steps_axis"]

WIDTH, HEIGHT = 1000, 200  # of the box; the page stretches it
DOTS = 80  # points of a series up to which each is marked
CROSS = 0.02  # of the width, which a cross takes
ROWS = 13  # of the table beside a chart


@dataclass(frozen=True, kw_only=True)
class Series:
    """What a chart shows of one column.

    Args:
        name: As people write it.
        points: Its values.
        look: Which of the page's styles: ``"blue"``, ``"green"``, ``"muted"`` or ``"orange"``.
    """

    name: str
    points: Envelope
    look: str = "blue"


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A place on an axis in percent, and what is written there."""

    place: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series as drawn.

    Args:
        name: As people write it.
        look: The style.
        band: Path around lowest and highest values.
        path: Path through the middles.
        dots: Path of points by themselves.
        crosses: Places of missing values, in percent of the width.
    """

    name: str
    look: str
    band: str
    path: str
    dots: str
    crosses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart.

    Args:
        title: What it shows.
        unit: Of the values; empty without.
        finding: The latest values in words.
        note: How to read it.
        lines: The series.
        levels: Horizontal lines, with what they are.
        steps: Ticks below.
        values: Ticks beside.
        log: Whether the values are on a logarithmic axis.
        hover: Numbers for the script: for each series its name, steps, middles, lows and highs; None for no number.
        header: Of the table.
        rows: Of the table: some of the points.
    """

    title: str
    unit: str
    finding: str
    note: str
    lines: tuple[Line, ...]
    levels: tuple[Tick, ...]
    steps: tuple[Tick, ...]
    values: tuple[Tick, ...]
    log: bool
    hover: list[dict[str, object]]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def steps_axis(*steps: Array) -> Axis:
    """The range of steps, the same for every chart of a page."""
    known = np.concatenate([s for s in steps if s.size]) if any(s.size for s in steps) else np.zeros(1)
    low, high = float(known.min()), float(known.max())
    return Axis(low, high if high > low else low + 1)


def chart(
    title: str,
    series: Sequence[Series],
    *,
    steps: Axis,
    unit: str = "",
    note: str = "",
    levels: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    log_ratio: float = LOG_RATIO,
) -> Chart:
    """Lay a chart out.

    Args:
        title: What it shows.
        series: At least one.
        steps: From :func:`steps_axis`.
        unit: Of the values.
        note: How to read it.
        levels: (value, name) of horizontal lines.
        from_zero: Begin the axis at zero where no value is negative.
        log_ratio: Largest value over the smallest from which the axis is logarithmic.
    """
    ends = [e for s in series for e in (s.points.low, s.points.high)]
    axis = axis_of(*ends, include=tuple(v for v, _ in levels), from_zero=from_zero, log_ratio=log_ratio)
    return Chart(
        title=title,
        unit=unit,
        finding=_finding(series),
        note=note,
        lines=tuple(_line(s, steps, axis) for s in series),
        levels=tuple(Tick(place=_percent(1 - _place(axis, v)), text=name) for v, name in levels),
        steps=tuple(Tick(place=_percent(_place(steps, v)), text=f"{v:,.0f}") for v in steps.ticks(6) if v == int(v)),
        values=tuple(Tick(place=_percent(1 - _place(axis, v)), text=number(v)) for v in axis.ticks(4)),
        log=axis.log,
        hover=[
            {
                "name": s.name,
                "step": s.points.steps.tolist(),
                "middle": _plain(s.points.middle),
                "low": _plain(s.points.low),
                "high": _plain(s.points.high),
            }
            for s in series
        ],
        header=("step", *(s.name for s in series)),
        rows=_rows(series),
    )


def _place(axis: Axis, value: float) -> float:
    return float(axis.place(np.array([value]))[0])


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _finding(series: Sequence[Series]) -> str:
    parts = []
    for s in series:
        finite = np.flatnonzero(np.isfinite(s.points.middle))
        name = f"{s.name} " if len(series) > 1 else ""
        if finite.size:
            at = int(finite[-1])
            then = ", not established or not finite after that" if (s.points.missing > s.points.steps[at]).any() else ""
            parts.append(f"{name}{_between(s.points, at)} at step {s.points.steps[at]:,.0f}{then}")
        else:
            parts.append(f"{name}not established")
    return "; ".join(parts)


def _between(points: Envelope, at: int) -> str:
    """A value with its lowest and highest, where they differ."""
    middle, low, high = (float(x[at]) for x in (points.middle, points.low, points.high))
    if not math.isfinite(middle):
        return "none"
    return number(middle) if low == high else f"{number(middle)} ({number(low)} .. {number(high)})"


def _line(series: Series, steps: Axis, axis: Axis) -> Line:
    points = series.points
    x = np.round(WIDTH * steps.place(points.steps), 1)
    middle, low, high = (np.round(HEIGHT * (1 - axis.place(v)), 1) for v in (points.middle, points.low, points.high))
    pieces = _pieces(np.isfinite(middle))
    wide = [span for span in pieces if (low[span] != high[span]).any()]
    alone = [span for span in pieces if span.stop - span.start == 1]
    marked = pieces if np.isfinite(middle).sum() <= DOTS else alone
    return Line(
        name=series.name,
        look=series.look,
        band="".join(_around(x[span], low[span], high[span]) for span in wide),
        path="".join(_through(x[span], middle[span]) for span in pieces if span not in alone),
        dots="".join(f"M{a:g} {b:g}h0" for span in marked for a, b in zip(x[span], middle[span], strict=True)),
        crosses=tuple(_apart(steps.place(points.missing).tolist())),
    )


def _apart(places: list[float]) -> Iterator[float]:
    """Places in percent, without those that would be drawn over the one before."""
    last = -math.inf
    for place in places:
        if place - last >= CROSS:
            last = place
            yield _percent(place)


def _pieces(known: NDArray[np.bool_]) -> list[slice]:
    """Runs of points without a gap."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], known.astype(np.int8), [0]])))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _through(x: Array, y: Array) -> str:
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in zip(x, y, strict=True))


def _around(x: Array, low: Array, high: Array) -> str:
    return _through(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]])) + "Z"


def _plain(values: Array) -> list[float | None]:
    """The three digits that are shown, so that the script rounds nothing; None for what is no number."""
    return [float(f"{v:.3g}") if math.isfinite(v) else None for v in values.tolist()]


def _rows(series: Sequence[Series]) -> tuple[tuple[str, ...], ...]:
    """Points of the longest series that are spread evenly, and what the others had by then."""
    steps = max((s.points.steps for s in series), key=len)
    if not steps.size:
        return ()
    chosen = np.unique(np.linspace(0, steps.size - 1, min(ROWS, steps.size)).round().astype(int))
    rows = []
    for step in steps[chosen].tolist():
        cells = []
        for s in series:
            at = int(np.searchsorted(s.points.steps, step, side="right")) - 1
            cells.append("" if at < 0 else _between(s.points, at))
        rows.append((f"{step:,.0f}", *cells))
    return tuple(rows)
