"""The page builder."""

from __future__ import annotations

import pytest

from dyntune.errors import InvalidArgumentError
from dyntune.plots import plot_eigenvalues
from dyntune.report import FigureBlock, Page, Section, Table, render, write
from tests.plots.records import HOSTILE, found
from tests.report.reading import Reading, assert_self_contained

PAYLOADS = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "{{ 7 * 7 }}{% for x in () %}",
    "<svg/onload=alert(1)>",
    "javascript:alert(1)",
    "&lt;b&gt;",
    "]]><!--",
    HOSTILE,
]


def page(text: str) -> Page:
    figure = FigureBlock(axes=plot_eigenvalues(found(k=2)), caption=text)
    section = Section(
        heading=text,
        finding=text,
        figures=(figure, figure),
        table=Table(header=(text, text), rows=((text, text),)),
        advice=(text,),
        background=(text,),
    )
    return Page(title=text, lead=text, sections=(section, section), notes=(text,))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_string_is_escaped_everywhere(payload):
    reading = assert_self_contained(render(page(payload)))
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in payload)
    # title, h1, lead, note; and in both sections heading, finding, two captions, four cells, advice, background
    assert reading.text.count(" ".join(shown.split())) == 4 + 2 * 10


def test_no_more_elements_than_for_harmless_text():
    assert Reading(render(page(HOSTILE))).tags == Reading(render(page("harmless"))).tags


def test_same_bytes_for_the_same_page():
    assert render(page("x")) == render(page("x"))


def test_parts_that_are_absent_leave_nothing_behind():
    bare = Page(title="t", lead="l", sections=(Section(heading="h", finding="f"),))
    tags = Reading(render(bare)).tags
    assert not {"figure", "table", "ul", "footer"} & set(tags)
    assert tags.count("section") == 1


def test_figures_have_a_description():
    reading = Reading(render(page("what it shows")))
    assert reading.values("aria-label") == ["what it shows"] * 4


def test_light_and_dark():
    html = render(page("x"))
    assert html.count("--dt-ink:") == 2
    assert "prefers-color-scheme: dark" in html


def test_uneven_rows_are_refused():
    with pytest.raises(InvalidArgumentError, match="2 cells"):
        Table(header=("a", "b"), rows=(("1",),))


def test_write_returns_where_it_wrote_and_survives_what_cannot_be_encoded(tmp_path):
    target = write(page("\ud800"), tmp_path / "page.html")
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
