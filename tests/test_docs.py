"""Every block of code in the concept pages runs, prints what the page says, and every link leads somewhere."""

from __future__ import annotations

import re

import matplotlib as mpl
import pytest
import torch

from tests.documents import ROOT, blocks, numbers, readers_names, run, without_numbers

CONCEPTS = ROOT / "docs" / "concepts"
PAGES = [ROOT / "docs" / "index.md", *sorted(CONCEPTS.glob("*.md"))]
# The pages that explain a number also show how to get it.
WITH_CODE = (
    "batch-sharpness",
    "gauss-newton",
    "gradient-signals",
    "inside-the-network",
    "loss-slices",
    "preconditioned",
    "thresholds",
    "trace-density-blocks",
)


def by_name(path) -> str:
    return path.stem


@pytest.mark.parametrize("path", [p for p in PAGES if any(lang == "python" for lang, _ in blocks(p))], ids=by_name)
def test_the_code_runs_and_prints_what_the_page_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mpl, "rcParams", mpl.rcParams.copy())
    with torch.random.fork_rng():
        pairs = run(path, readers_names())
    for said, printed in pairs:
        assert without_numbers(said) == without_numbers(printed)
        # Two or three digits are said, of numbers that other kernels add up in another order: one unit of the last of
        # two, or two percent.
        assert numbers(printed) == pytest.approx(numbers(said), rel=0.02, abs=0.011)


@pytest.mark.parametrize("name", WITH_CODE)
def test_pages_have_code_that_shows_its_output(name):
    languages = [language for language, _ in blocks(CONCEPTS / f"{name}.md")]
    assert "python" in languages
    assert "text" in languages


def test_every_page_is_listed():
    listed = (CONCEPTS / "index.md").read_text(encoding="utf-8").split()
    assert [path.stem for path in sorted(CONCEPTS.glob("*.md")) if path.stem not in listed] == ["index"]


@pytest.mark.parametrize("path", PAGES, ids=by_name)
def test_links_and_figures_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    pages = [f"{target}.md" for target in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", text)]
    # the build copies notebooks into the documentation
    notebooks = [page for page in pages if page.startswith("notebooks/")]
    assert [n for n in notebooks if not (ROOT / n).with_suffix(".ipynb").exists()] == []
    targets += [page for page in pages if page not in notebooks]
    assert [t for t in targets if t and not (path.parent / t).exists()] == []


def test_numbers_are_read_from_texts():
    assert numbers("a1 = -2.5 (1e-3 .. 7), 3") == [-2.5, 1e-3, 7.0, 3.0]
    assert without_numbers("x  = -2.5\n(1e-3)") == "x = # (#)"
