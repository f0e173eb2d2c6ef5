"""Figures as strings."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest

from dyntune.plots import plot_recommendation
from dyntune.plots.style import BLUE, DARK, INK, MUTED, ORANGE, PAPER, cleaned, label, new_axes
from dyntune.plots.svg import to_svg
from tests.plots.records import HOSTILE, recommendation


def svg(name: str = "figure", **options: bool) -> str:
    figure = plot_recommendation(recommendation()).get_figure(root=True)
    return to_svg(figure, name=name, description="a figure", **options)


def test_same_bytes_for_the_same_record():
    assert svg() == svg()


def test_is_one_element_without_addresses_or_metadata():
    text = svg()
    root = ET.fromstring(text)
    assert root.tag == "svg"
    assert "http" not in text
    assert root.find("metadata") is None
    assert root.attrib["aria-label"] == "a figure"


def test_identifiers_are_unique_and_every_reference_has_its_target():
    both = svg("one") + svg("two")
    names = re.findall(r' id="([^"]*)"', both)
    assert len(names) == len(set(names))
    assert set(re.findall(r'href="#([^"]*)"', both)) | set(re.findall(r"url\(#([^)]*)\)", both)) <= set(names)


def test_colours_are_variables_with_the_light_colour_as_fallback():
    text = svg()
    assert f"var(--dt-blue, {BLUE})" in text
    bare = re.findall(r"(?<!, )#[0-9a-f]{6}\b", text)
    assert bare == []


def test_text_is_text_in_the_readers_font():
    root = ET.fromstring(svg())
    texts = list(root.iter("text"))
    assert any("suggested" in "".join(element.itertext()) for element in texts)
    assert all("system-ui" in element.attrib["style"] for element in texts)
    assert all("font-size" in element.attrib["style"] for element in texts)


def test_standalone_has_its_name_space_and_a_dark_side():
    text = svg(standalone=True)
    assert 'xmlns="http://www.w3.org/2000/svg"' in text
    assert "prefers-color-scheme: dark" in text


def test_hostile_names_come_out_as_text():
    axes = new_axes(height=2.0)
    label(axes, 0.5, 0.5, HOSTILE)
    text = to_svg(axes.get_figure(root=True), name="x", description=HOSTILE)
    assert "<script" not in text
    root = ET.fromstring(text)  # so there is no character that XML forbids
    words = ["".join(element.itertext()) for element in root.iter("text")]
    assert root.attrib["aria-label"].startswith("<script>")
    assert any("<script>alert(1)</script>" in word for word in words)


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(mpl.rcParams)
    svg()
    assert dict(mpl.rcParams) == before


def test_no_pyplot():
    code = (
        "import sys, dyntune, dyntune.plots, dyntune.plots.svg; "
        "import torch; dyntune.eigenvalues(torch.eye(3)).plot(); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cleaned_is_one_short_line_that_xml_can_hold():
    assert cleaned("a\n b\x1bc\x00") == "a b c"
    assert len(cleaned("x" * 500)) == 80
    assert cleaned("\ud800") == ""


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", [INK, MUTED, BLUE, ORANGE])
def test_text_is_readable_on_both_papers(color):
    for ink, paper in ((color, PAPER), (DARK[color], DARK[PAPER])):
        light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
        # 3 is the bound for graphics and large text, 4.5 that for text.
        assert (light + 0.05) / (dark + 0.05) >= (4.5 if color in (INK, MUTED, BLUE) else 3.0)
