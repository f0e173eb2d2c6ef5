"""The page of a run in a browser: nothing in it runs, asks or complains but the script that it brings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dyntune.monitor.run import Row, Run
from dyntune.plots.style import BLUE, DARK, PAPER
from dyntune.report import render, run_page, write
from tests.report.chromium import Browser, command
from tests.report.runs import HOSTILE_NAMES, NAMES, monitored

REQUIRED = os.environ.get("DYNTUNE_REQUIRE_CHROMIUM", "0") not in ("", "0")

pytestmark = pytest.mark.skipif(
    command() is None and not REQUIRED, reason="no Chromium is installed (DYNTUNE_REQUIRE_CHROMIUM=1 makes that fail)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    assert command() is not None, "DYNTUNE_REQUIRE_CHROMIUM is set, and there is no Chromium"
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def edge(tmp_path_factory) -> Path:
    return write(run_page(monitored("edge")), tmp_path_factory.mktemp("pages") / "edge.html")


@pytest.fixture(scope="module")
def diverging(tmp_path_factory) -> Path:
    return write(run_page(monitored("diverging")), tmp_path_factory.mktemp("pages") / "diverging.html")


def assert_quiet(browser: Browser) -> None:
    assert browser.dialogs == []
    assert browser.requests == []
    assert browser.errors == []


def test_what_must_not_happen_would_be_seen(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<script>alert('here'); console.error('said'); fetch('http://example.invalid/a')"
        ".catch(() => { throw new Error('thrown') })</script><img src='http://example.invalid/b.png'>"
    )
    browser.open(page)
    assert browser.dialogs == ["here"]
    assert {"http://example.invalid/a", "http://example.invalid/b.png"} <= set(browser.requests)
    assert any("said" in error for error in browser.errors)


def test_a_script_that_got_into_the_page_would_not_run(browser, tmp_path):
    page = tmp_path / "injected.html"
    html = render(run_page(monitored("edge"))).replace(
        "<h1>", "<script>alert(1)</script><img src=x onerror=alert(2)><b onclick=alert(3) id=b>b</b><h1>"
    )
    page.write_text(html)
    browser.open(page)
    browser.value("document.getElementById('b').click()")
    assert browser.dialogs == []
    assert len(browser.requests) == browser.blocked == 1
    assert len(browser.errors) >= 3


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
def test_hostile_names_do_nothing(browser, tmp_path, name):
    run = monitored("diverging", steps=100, names=(name, *HOSTILE_NAMES[:3]), words=name or "w")
    browser.open(write(run_page(run, title=name), tmp_path / "page.html"))
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true })")
    x, y = middle(browser)
    browser.point(x, y)
    assert (
        browser.value("document.querySelectorAll('[onclick],[onmouseover],[onfocus],[onerror],[onload]').length") == 0
    )
    assert_quiet(browser)
    assert browser.value("document.querySelectorAll('script').length") == 2
    assert "at step" in browser.value("document.querySelector('.readout').textContent")


def middle(browser: Browser, index: int = 0) -> tuple[float, float]:
    """Of a chart, as it lies in the window."""
    box = browser.value(
        f"(() => {{ const hit = document.querySelectorAll('.hit')[{index}]; hit.scrollIntoView({{block: 'center'}});"
        " const r = hit.getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2, r.width]; })()"
    )
    return box[0], box[1]


def readouts(browser: Browser) -> list[str]:
    return browser.value("[...document.querySelectorAll('.readout')].map(r => r.textContent)")


def test_hovering_reads_every_chart_at_that_step(browser, edge):
    browser.open(edge)
    at_rest = readouts(browser)
    x, y = middle(browser)
    browser.point(x, y)
    assert browser.value("[...document.querySelectorAll('.cursor')].every(c => !c.hidden)")
    ratio, loss, rate, norm = readouts(browser)
    run = monitored("edge")
    values = dict(zip(run.steps.tolist(), run["stability/lr_ratio"].tolist(), strict=True))
    assert ratio.startswith(f"deterministic (full batch) {values[300]:.3g} (")
    assert ratio.count("at step 300") == 3
    assert loss == f"{run['train/loss'][300]:.3g} at step 300"
    assert rate.endswith("at step 300")
    assert norm.endswith("at step 300")
    browser.point(1, 1)
    assert readouts(browser) == at_rest
    assert browser.value("[...document.querySelectorAll('.cursor')].every(c => c.hidden)")
    assert_quiet(browser)


def test_the_nearest_step_is_read(browser, edge):
    browser.open(edge)
    _, y = middle(browser)
    left, width = browser.value(
        "(() => { const r = document.querySelector('.hit').getBoundingClientRect(); return [r.left, r.width]; })()"
    )
    for step, burst in ((8, 0), (12, 20), (28, 20), (599, 580)):
        browser.point(left + min(0.999, step / 599) * width, y)
        assert f"at step {burst};" in readouts(browser)[0]
        assert readouts(browser)[1].endswith(f"at step {burst}")


def test_numbers_read_alike_by_the_script_and_by_the_page(browser, tmp_path):
    numbers = [0.0, 1.0, 999.9, 1000.0, 12345.678, 0.01, 0.00999, 1e-30, -2.5e7, 100.0, 0.1 + 0.2, 6.02e23]
    run = Run(rows=[Row(step=i, values={"train/loss": v}) for i, v in enumerate(numbers)])
    page = run_page(run)
    browser.open(write(page, tmp_path / "page.html"))
    browser.value("document.querySelector('.hit').focus()")
    browser.press("Home")
    for step, cells in enumerate(page.charts[0].rows):
        assert readouts(browser) == [f"{cells[1]} at step {step}"]
        browser.press("ArrowRight")
    assert_quiet(browser)


def test_the_keyboard_reaches_and_moves_through_the_charts(browser, edge):
    browser.open(edge)
    for _ in range(10):
        browser.press("Tab")
        if browser.value("document.activeElement.getAttribute('role')") == "slider":
            break
    assert browser.value("document.activeElement.getAttribute('aria-label')") == "Stability ratio: step to read"
    browser.press("Home")
    assert browser.value("document.activeElement.getAttribute('aria-valuenow')") == "0"
    browser.press("ArrowRight")
    assert browser.value("document.activeElement.getAttribute('aria-valuenow')") == "20"
    browser.press("End")
    assert "step 580" in browser.value("document.activeElement.getAttribute('aria-valuetext')")
    browser.press("Escape")
    assert browser.value("document.activeElement === document.body")
    assert_quiet(browser)


def test_flags_in_the_charts_lead_to_their_alerts(browser, diverging):
    browser.open(diverging)
    x, y = browser.value(
        "(() => { const r = document.querySelector('.flag span').getBoundingClientRect();"
        " return [r.left + r.width / 2, r.top + r.height / 2]; })()"
    )
    assert browser.value(f"document.elementFromPoint({x}, {y}).closest('a').getAttribute('href')") == "#alert-1"
    browser.value("document.querySelector('.flag').click()")
    assert browser.value("location.hash") == "#alert-1"
    assert_quiet(browser)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 700, 1600])
def test_the_page_fits_and_its_text_can_be_read(browser, tmp_path, width, dark):
    run = monitored("diverging", steps=200, names=("n" * 300, *NAMES), words="w" * 3000)
    browser.open(write(run_page(run), tmp_path / "page.html"), width=width, dark=dark)
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb({}, {}, {})".format(*bytes.fromhex((DARK[PAPER] if dark else PAPER)[1:]))
    # WCAG 2.2, success criterion 1.4.3: 4.5 for text, whatever its size.
    assert browser.value(CONTRAST) >= 4.5
    assert_quiet(browser)


@pytest.mark.parametrize("width", [320, 390])
def test_no_table_is_wider_than_a_phone(browser, tmp_path, width):
    layers = ("attention/entropy/blocks.0", "units/dead/mlp.1", "activation/log_rms/head")
    plain = monitored("diverging", steps=100)
    more = [Row(step=i, values=dict.fromkeys((*layers, "logits/log_z"), 1 / (1 + i))) for i in range(9)]
    run = Run(rows=[*plain.rows, *more], events=plain.events, provenance=plain.provenance)
    browser.open(write(run_page(run), tmp_path / "page.html"), width=width)
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true })")
    tables = browser.value(
        "[...document.querySelectorAll('table')].map(t => [t.caption.textContent, t.getBoundingClientRect().right])"
    )
    assert "Columns that are not drawn" in [caption for caption, _ in tables]
    assert "Relative entropy of attention by layer or head" in [caption for caption, _ in tables]
    assert [caption for caption, right in tables if right > width] == []
    cell = "document.querySelector('.wide td:nth-child(4)')"
    assert browser.value(f"getComputedStyle({cell}, '::before').content") == '"lowest"'
    assert_quiet(browser)


# The least contrast between any text and the page behind it (WCAG 2.2, relative luminance).
CONTRAST = """(() => {
  const luminance = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255);
    const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = 21;
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || ["SCRIPT", "CAPTION"].includes(e.tagName) || e.matches(".sign")) continue;
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(behind(e))].sort();
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least;
})()"""


def test_series_differ_without_their_colours(browser, edge):
    browser.open(edge)
    dashes = browser.value(
        "[...document.querySelectorAll('figure')[0].querySelectorAll('.box .line')]"
        ".map(p => getComputedStyle(p).strokeDasharray)"
    )
    assert len(dashes) == len(set(dashes)) == 3


def test_lines_are_drawn_within_their_charts_and_reach_across(browser, edge):
    browser.open(edge)
    boxes = browser.value(
        "[...document.querySelectorAll('.box')].map(box => [box, ...box.querySelectorAll('path.line')].map(e => {"
        " const r = e.getBoundingClientRect(); return [r.left, r.right, r.top, r.bottom]; }))"
    )
    assert len(boxes) == 4
    for (left, right, top, bottom), *lines in boxes:
        assert lines
        for a, b, c, d in lines:
            assert left - 2 <= a < b <= right + 2  # pixels: half a line's width, and its rounding
            assert top - 2 <= c < d <= bottom + 2
            assert b - a > 0.9 * (right - left)
    blue = "rgb({}, {}, {})".format(*bytes.fromhex(BLUE[1:]))
    assert browser.value("getComputedStyle(document.querySelector('.line')).stroke") == blue


def test_it_prints_on_white_whatever_the_screen(browser, edge):
    browser.open(edge, dark=True)
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    closed = "[...document.querySelectorAll('details:not([open]), .hit')].map(e => getComputedStyle(e).display)"
    assert set(browser.value(closed)) == {"none"}
    browser.call("Emulation.setEmulatedMedia", media="")
    assert_quiet(browser)


def test_it_can_be_read_without_its_script(browser, edge):
    browser.open(edge, script=False)
    assert browser.value("document.querySelector('[role=slider]')") is None
    shown = browser.value("document.body.innerText")
    assert "At the edge of stability" in shown
    assert "at step 580" in shown
    assert browser.value("document.querySelectorAll('.box path.line').length") == 6


def test_a_run_of_nothing_is_quiet_too(browser, tmp_path):
    browser.open(write(run_page(Run(rows=())), tmp_path / "page.html"))
    assert "Undetermined" in browser.value("document.querySelector('h2').textContent")
    assert_quiet(browser)
