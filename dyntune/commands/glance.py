"""A run in a few lines of text: what ``dyntune watch`` shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dyntune.monitor.ratios import GRADIENT_NORM, LEARNING_RATE, LOSS, first_column, stability_ratios
from dyntune.monitor.rows import Array
from dyntune.monitor.run import Event, Run
from dyntune.monitor.verdict import Verdict, verdict
from dyntune.records import short_number

__all__ = ["Glance", "Signal", "glance", "sparkline"]

BARS = "▁▂▃▄▅▆▇█"
BROKEN = "×"
WIDTH = 40  # characters of a sparkline
MOST_TEXT = 300


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A number with its course.

    Args:
        name: What it is.
        value: The latest one.
        course: All of them as a sparkline; empty for fewer than two.
    """

    name: str
    value: str
    course: str


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What there is to see of a run at one moment. All text is printable.

    Args:
        title: Its file.
        step: The latest one; None without a row.
        verdict: What it comes to.
        signals: The numbers of interest.
        alerts: A line for each, oldest first.
        ended: Whether its monitor was closed.
    """

    title: str
    step: int | None
    verdict: Verdict
    signals: tuple[Signal, ...]
    alerts: tuple[str, ...]
    ended: bool

    @property
    def line(self) -> str:
        """All of it in one line, but for alerts."""
        step = "no step yet" if self.step is None else f"step {self.step:,}"
        return "  ".join([step, *(f"{s.name} {s.value}" for s in self.signals), self.verdict.state.value])

    def lines(self) -> list[str]:
        """All of it."""
        wide = max((len(s.name) for s in self.signals), default=0)
        far = max((len(s.value) for s in self.signals), default=0)
        rows = [f"{s.name:<{wide}}  {s.value:<{far}}  {s.course}".rstrip() for s in self.signals]
        head = self.title if self.step is None else f"{self.title}, step {self.step:,}"
        advice = [f"- {printable(line)}" for line in self.verdict.advice]
        return [head, printable(self.verdict.sentence), *advice, *rows, *self.alerts]


def glance(run: Run) -> Glance:
    """Look at a run.

    Args:
        run: As far as it has come.

    Example:
        >>> from dyntune.monitor.run import Row
        >>> seen = glance(Run(rows=[Row(step=i, values={"train/loss": 2.0 - i}) for i in range(2)]))
        >>> seen.line
        'step 1  loss 1  undetermined'
    """
    ends = [event.name for event in run.events if event.name in ("closed", "resumed")]
    return Glance(
        title=printable(run.path or "run"),
        step=int(run.steps.max()) if len(run) else None,
        verdict=verdict(run),
        signals=tuple(_signals(run)),
        alerts=tuple(_alert(event) for event in run.events if event.name == "alert"),
        ended=bool(ends) and ends[-1] == "closed",
    )


def _signals(run: Run) -> list[Signal]:
    found = [
        Signal(name=f"ratio ({r.kind})", value=_last(r.values), course=sparkline(r.values))
        for r in stability_ratios(run)
    ]
    for name, columns in (("loss", LOSS), ("lr", LEARNING_RATE), ("gradient norm", GRADIENT_NORM)):
        column = first_column(run, columns)
        if column is not None:
            values = run.series(column)[1]
            found.append(Signal(name=name, value=_last(values), course=sparkline(values)))
    if "monitor/overhead" in run:
        values = run.series("monitor/overhead")[1]
        known = values[np.isfinite(values)]
        if known.size:
            found.append(Signal(name="overhead", value=f"{100 * float(known[-1]):.2g}%", course=sparkline(values)))
    return found


def _last(values: Array) -> str:
    return short_number(float(values[-1])) if values.size else "none"


def sparkline(values: Array, *, width: int = WIDTH) -> str:
    """The course of a series in characters, each the median of a part of it.

    Args:
        values: Shape (n,).
        width: At most so many characters.

    Example:
        >>> import numpy as np
        >>> sparkline(np.array([0.0, 1.0, np.nan, 7.0]))
        '▁▂×█'
    """
    if values.size < 2:
        return ""
    parts = np.array_split(values, min(width, values.size))
    middles = [float(np.median(part[np.isfinite(part)])) if np.isfinite(part).any() else None for part in parts]
    known = [m for m in middles if m is not None]
    if not known:
        return BROKEN * len(middles)
    low, high = min(known), max(known)
    # Halves, since the difference of two very large numbers may be infinite.
    span = high / 2 - low / 2
    places = [
        None if m is None else round((len(BARS) - 1) * ((m / 2 - low / 2) / span if span > 0 else 0)) for m in middles
    ]
    return "".join(BROKEN if place is None else BARS[place] for place in places)


def _alert(event: Event) -> str:
    detail = event.detail
    when = "" if event.step is None else f" at step {event.step:,}"
    text = detail.get("text") or detail.get("kind") or "no words"
    advice = f" What to change: {detail['advice']}" if detail.get("advice") else ""
    return printable(f"alert{when} ({detail.get('severity', 'unknown')}): {text}{advice}")


def printable(text: str) -> str:
    """On one line, without what a terminal would obey: names in a log may be anybody's."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"
