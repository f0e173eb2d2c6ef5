"""From plain data to one HTML document that needs nothing but itself.

Figures are inline SVG, and a content security policy forbids the browser to load anything. The page of a run has one
script, which the policy knows by its hash; other pages have none. Every string is escaped, since names of models,
parameters and runs may be anybody's.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dyntune.errors import InvalidArgumentError
from dyntune.monitor.verdict import State
from dyntune.plots.style import DARK, ROLES
from dyntune.plots.svg import to_svg
from dyntune.report.monitored import RunPage
from dyntune.report.page import FigureBlock, Page

__all__ = ["render", "write"]

# Beside the words, for those who do not see the colour.
_SIGNS = {State.STABLE: "\u2713", State.EDGE: "\u2248", State.DIVERGING: "\u25b2", State.UNDETERMINED: "?"}


def render(page: Page | RunPage) -> str:
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
    colors = {
        "light": {ROLES[color]: color for color in ROLES},
        "dark": {ROLES[color]: DARK[color] for color in ROLES},
    }
    if isinstance(page, RunPage):
        script = _asset("run.js")
        return (
            _environment()
            .get_template("run.html.j2")
            .render(
                page=page,
                sign=_SIGNS[page.verdict.state],
                policy=_policy(script),
                style=Markup(_asset("run.css")),  # ours, without a character that HTML would read
                script=Markup(script),
                data=Markup(_data(page)),
                **colors,
            )
        )
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            drawings=[
                [_drawing(block, i, j) for j, block in enumerate(s.figures)] for i, s in enumerate(page.sections)
            ],
            **colors,
        )
    )


def write(page: Page | RunPage, path: str | os.PathLike[str]) -> Path:
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


@functools.cache
def _environment() -> Environment:
    # autoescape has to be said: select_autoescape() would go by the template's name.
    environment = Environment(
        loader=PackageLoader("dyntune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finished,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["readable"] = _readable
    return environment


def _finished(item: object) -> object:
    """Every string that a template writes is readable; what is markup already is left alone."""
    return _readable(item) if type(item) is str else item


def _readable(text: str) -> str:
    """Without the characters that HTML forbids; a lone surrogate could not even be written."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _asset(name: str) -> str:
    return files("dyntune.report").joinpath("templates", name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Nothing may be loaded, and nothing runs but this script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'"
    )


def _data(page: RunPage) -> str:
    """What the script reads, as JSON that holds no character of HTML's syntax: strings in it may be anybody's."""
    charts = ([page.edge] if page.edge is not None else []) + list(page.charts)
    text = json.dumps(
        {"range": page.steps, "charts": [c.hover for c in charts]}, separators=(",", ":"), allow_nan=False
    )
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _drawing(block: FigureBlock, section: int, index: int) -> Markup:
    figure = block.axes.get_figure(root=True)
    if figure is None:
        raise InvalidArgumentError("FigureBlock: the axes were removed from their figure; draw them again.")
    # Safe: text that matplotlib was given leaves to_svg escaped.
    return Markup(to_svg(figure, name=f"figure-{section}-{index}", description=block.caption))
