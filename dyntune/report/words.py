"""Words of a page: details of a record on one line, names as they are spoken."""

from __future__ import annotations

from dyntune.monitor.run import Column, Event, Run
from dyntune.plots.style import number

__all__ = ["MOST_LINES", "capital", "named", "percent", "text", "unit"]

MOST_LINES = 200  # of a table of details
MOST_TEXT = 300  # characters of a detail


def named(run: Run, name: str) -> list[Event]:
    """The events of one name."""
    return [event for event in run.events if event.name == name]


def text(item: object) -> str:
    """A detail on one line."""
    said = number(item) if isinstance(item, float) else str(item)
    said = {"True": "yes", "False": "no"}.get(said, said)
    said = " ".join(said.split())
    return said if len(said) <= MOST_TEXT else f"{said[: MOST_TEXT - 1]}…"


def capital(said: str) -> str:
    """With a capital letter."""
    return f"{said[:1].upper()}{said[1:]}"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:,.0f} %" if share >= 1 else f"{100 * share:.2g} %"


def unit(run: Run, name: str) -> str:
    """Of a column, as it is shown."""
    return run.columns.get(name, Column(name=name)).unit.replace("^2", "²")
