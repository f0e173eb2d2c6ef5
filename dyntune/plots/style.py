"""How every figure looks: colours, sizes, and axes that belong to no global state."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dyntune.records import short_number as number

__all__ = [
    "BLUE",
    "DARK",
    "GREEN",
    "GRID",
    "INK",
    "LABEL_SIZE",
    "MUTED",
    "ORANGE",
    "PAPER",
    "ROLES",
    "cleaned",
    "inner_axes",
    "label",
    "new_axes",
    "new_column",
    "new_rows",
    "number",
    "tidy",
    "width_of",
]

# Okabe and Ito (2008), "Color Universal Design": apart for every kind of colour vision, here on white.
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
INK = "#1f2328"
MUTED = "#656d76"
GRID = "#d8dee4"
PAPER = "#ffffff"

# The same roles on a dark page: lighter, with a contrast of at least 4.5 against it.
DARK = {
    BLUE: "#58b2f0",
    ORANGE: "#ff9a57",
    GREEN: "#3fcf9f",
    INK: "#e6edf3",
    MUTED: "#9ea8b3",
    GRID: "#363d46",
    PAPER: "#0d1117",
}
# Names of the CSS variables that a page sets for them.
ROLES = {BLUE: "blue", ORANGE: "orange", GREEN: "green", INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}

WIDTH = 5.4  # inches; a page shows an inch as 96 pixels
TEXT_SIZE = 9.5
LABEL_SIZE = 9.0

_RC: Any = {  # the stubs of matplotlib list the keys as literals, and differ between versions
    "font.size": TEXT_SIZE,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.minor.size": 2.0,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "figure.dpi": 110.0,
}


def new_axes(*, height: float) -> Axes:
    """Axes in a figure of their own that pyplot does not know; `height` in inches."""
    with rc_context(_RC):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure.add_subplot()


def new_column(count: int, *, height: float) -> list[Axes]:
    """Axes below each other over the same x, as :func:`new_axes`; `height` in inches of each."""
    with rc_context(_RC):
        figure = Figure(figsize=(WIDTH, height * count), layout="constrained")
        return list(figure.subplots(count, sharex=True, squeeze=False)[:, 0])


def new_rows(*heights: float) -> list[Axes]:
    """Axes below each other, each with an x of its own, as :func:`new_axes`; `heights` in inches."""
    with rc_context(_RC):
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        ratios = {"height_ratios": list(heights)}
        return list(figure.subplots(len(heights), squeeze=False, gridspec_kw=ratios)[:, 0])


def inner_axes(ax: Axes, *, bottom: float, height: float) -> Axes:
    """Axes as wide as `ax` within it, from `bottom` on; both as shares of its height."""
    with rc_context(_RC):
        return ax.inset_axes((0.0, bottom, 1.0, height))


def width_of(ax: Axes) -> float:
    """Inches that `ax` has with all that stands beside it, before a layout has been made."""
    figure = ax.get_figure(root=True)
    whole = figure.get_figwidth() if figure is not None else WIDTH
    return float(whole * ax.get_position(original=True).width / 0.775)  # 0.775: what default margins leave of a figure


def tidy(
    ax: Axes, *, title: str, xlabel: str, ylabel: str, grid: Literal["x", "y"] | None = None, columns: int = 58
) -> None:
    """Labels, and nothing on the axes that says nothing; the title is broken after `columns` characters."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid is not None:
        ax.grid(visible=True, axis=grid, color=GRID, linewidth=0.6)
    ax.set_xlabel(cleaned(xlabel), parse_math=False)
    ax.set_ylabel(cleaned(ylabel), parse_math=False)
    ax.set_title(
        textwrap.fill(cleaned(title, limit=160).replace(" .. ", "\u00a0..\u00a0"), columns),  # ranges stay whole
        loc="left",
        parse_math=False,
        fontsize=10.5,
        fontweight="bold",
        color=INK,
    )


def label(ax: Axes, x: float, y: float, text: str, *, color: str = INK, **options: Any) -> None:
    """Text beside the thing it names, `offset` points from (x, y); `columns` breaks it into lines."""
    offset, columns = options.pop("offset", (0.0, 0.0)), options.pop("columns", None)
    text = cleaned(text)
    ax.annotate(
        textwrap.fill(text, columns) if columns else text,
        (x, y),
        xytext=offset,
        textcoords="offset points",
        color=color,
        fontsize=options.pop("fontsize", LABEL_SIZE),
        parse_math=False,
        annotation_clip=False,
        **options,
    )


def cleaned(text: str, *, limit: int = 80) -> str:
    """`text` on one line, without control characters, at most `limit` characters long.

    Names in a figure may be anybody's, and a control character would make the SVG unreadable.
    """
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp") else c for c in text)
    joined = re.sub(r"[^\S\u00a0]+", " ", kept).strip()
    return joined if len(joined) <= limit else f"{joined[: limit - 1]}…"
