"""What a page of results holds: plain data, which :mod:`dyntune.report.html` turns into HTML."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes

from dyntune.errors import InvalidArgumentError

__all__ = ["FigureBlock", "Page", "Section", "Table"]


@dataclass(frozen=True, kw_only=True)
class FigureBlock:
    """A figure with its caption.

    Args:
        axes: What one of the ``plot_*`` returned.
        caption: How to read it; also what readers hear who do not see it.
    """

    axes: Axes
    caption: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of numbers.

    Args:
        header: Names of the columns.
        rows: Cells as text, as many in each row as the header has; the first names the row.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        uneven = [row for row in self.rows if len(row) != len(self.header)]
        if uneven:
            raise InvalidArgumentError(f"Table: row {uneven[0]!r} does not have {len(self.header)} cells.")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question with its answer.

    Args:
        heading: What the section is about.
        finding: The answer in one sentence.
        figures: What shows it.
        table: The numbers with their intervals.
        advice: What to do, one sentence each.
        background: How the finding came about, one sentence each.
    """

    heading: str
    finding: str
    figures: tuple[FigureBlock, ...] = ()
    table: Table | None = None
    advice: tuple[str, ...] = ()
    background: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report.

    Args:
        title: What was looked at.
        lead: The sentence below the title.
        sections: In the order of reading.
        notes: Where the numbers come from: versions, seeds, cost.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
