"""A figure as an SVG string: the same bytes every time, and readable on light and dark pages."""

from __future__ import annotations

import io
import re
import warnings
from xml.etree import ElementTree as ET

from matplotlib import rc_context
from matplotlib.figure import Figure

from dyntune.plots.style import DARK, PAPER, ROLES, cleaned

__all__ = ["to_svg"]

_NAMESPACE = "http://www.w3.org/2000/svg"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_COLOR = re.compile("|".join(ROLES), re.IGNORECASE)


def to_svg(figure: Figure, *, name: str, description: str, standalone: bool = False) -> str:
    """Draw a figure as SVG.

    Colours of :mod:`dyntune.plots.style` become CSS variables (``--dt-ink`` and so on, with the light colour where a
    page does not set them). Text stays text; it is escaped. Identifiers begin with `name`, so that several figures can
    stand in one page.

    Args:
        figure: The figure; it is left as it is.
        name: An identifier, unique in the page: letters, digits, ``-`` and ``_``.
        description: What the figure shows, for readers who do not see it.
        standalone: A file of its own rather than a part of an HTML page: with its name space, a background, and the
            dark colours for viewers that ask for them.

    Returns:
        One ``<svg>`` element.

    Example:
        >>> from dyntune.plots.style import new_axes
        >>> svg = to_svg(new_axes(height=2.0).get_figure(), name="empty", description="nothing")
        >>> svg.startswith("<svg"), "http" in svg
        (True, False)
    """
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "svg.id": None}), warnings.catch_warnings():
        # The viewer's fonts draw the text, not the one that measures it here.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="none")
    root = ET.fromstring(buffer.getvalue())
    _simplify(root, name)
    root.attrib.clear()
    width, height = (72 * float(inches) for inches in figure.get_size_inches())
    root.attrib |= {
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-label": cleaned(description, limit=500),
    }
    if standalone:
        _make_standalone(root, width, height)
    return ET.tostring(root, encoding="unicode")


def _simplify(root: ET.Element, name: str) -> None:
    """Drop metadata and name spaces, make identifiers unique, and turn colours into variables."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in list(element.attrib):
            value = element.attrib.pop(key).replace("url(#", f"url(#{name}-")
            plain = key.rpartition("}")[2]
            if plain == "id":
                value = f"{name}-{value}"
            elif plain == "href":
                value = value.replace("#", f"#{name}-")
            elif plain in ("style", "fill", "stroke"):
                value = _COLOR.sub(_variable, value)
            element.attrib[plain] = value
        if element.tag == "text":
            element.attrib["style"] = _with_font(element.attrib.get("style", ""))
    for element in root.findall("metadata"):
        root.remove(element)
    for holder in root.iter("defs"):
        for element in holder.findall("style"):  # a rule for everything in the page; stated on the root instead
            holder.remove(element)


def _variable(match: re.Match[str]) -> str:
    color = match.group().lower()
    return f"var(--dt-{ROLES[color]}, {color})"


def _with_font(style: str) -> str:
    """The size and weight that the layout was made for, in the reader's own font.

    Older matplotlib writes the shorthand ``font``, newer one property for each.
    """
    style = re.sub(r"font:\s*((?:bold|\d{3})\s+)?([\d.]+px)[^;]*", _longhand, style)
    return re.sub(r"font-family:[^;]*", f"font-family: {_FONT}", style)


def _longhand(match: re.Match[str]) -> str:
    weight = f"font-weight: {match.group(1).strip()}; " if match.group(1) else ""
    return f"{weight}font-size: {match.group(2)}; font-family: "


def _make_standalone(root: ET.Element, width: float, height: float) -> None:
    root.attrib |= {"xmlns": _NAMESPACE, "width": f"{width / 72 * 96:g}", "height": f"{height / 72 * 96:g}"}
    dark = " ".join(f"--dt-{ROLES[color]}: {DARK[color]};" for color in ROLES)
    style = ET.Element("style")
    style.text = f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}"
    paper = ET.Element("rect", {"width": "100%", "height": "100%", "style": f"fill: var(--dt-paper, {PAPER})"})
    root[:0] = [style, paper]
