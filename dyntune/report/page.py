"""The page: plain data, and one template that turns it into HTML.

The result needs nothing but itself: figures are inline SVG, there is no script, and a content security policy forbids
the browser to load anything. Every string is escaped, since names of models, parameters and runs may be anybody's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes

from dyntune.errors import InvalidArgumentError
from dyntune.plots.style import DARK, ROLES
from dyntune.plots.svg import to_svg

__all__ = ["FigureBlock", "Page", "Section", "Table", "render", "write"]


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


def render(page: Page) -> str:
    """The page as HTML: one string, the same for the same page.

    Args:
        page: What to show. Nothing in it has to be escaped.

    Returns:
        A complete document.

    Example:
        >>> html = render(Page(title="<run 1>", lead="Nothing yet.", sections=()))
        >>> "&lt;run 1&gt;" in html, "<script" in html
        (True, False)
    """
    # autoescape has to be said: select_autoescape() would go by the template's name.
    environment = Environment(
        loader=PackageLoader("dyntune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["readable"] = _readable
    return environment.get_template("page.html.j2").render(
        page=page,
        drawings=[[_drawing(block, i, j) for j, block in enumerate(s.figures)] for i, s in enumerate(page.sections)],
        light={ROLES[color]: color for color in ROLES},
        dark={ROLES[color]: DARK[color] for color in ROLES},
    )


def write(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write the page to a file.

    Args:
        page: What to show.
        path: Where to; the folder has to exist.

    Returns:
        The path as it was given.

    Raises:
        OSError: The file could not be written.
    """
    target = Path(path)
    target.write_text(render(page), encoding="utf-8")
    return target


def _drawing(block: FigureBlock, section: int, index: int) -> Markup:
    figure = block.axes.get_figure(root=True)
    if figure is None:
        raise InvalidArgumentError("FigureBlock: the axes were removed from their figure; draw them again.")
    # Safe: text that matplotlib was given leaves to_svg escaped.
    return Markup(to_svg(figure, name=f"figure-{section}-{index}", description=block.caption))


def _readable(text: str) -> str:
    """Without the characters that HTML forbids; a lone surrogate could not even be written."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
