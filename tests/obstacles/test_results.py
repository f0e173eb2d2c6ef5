"""The published table speaks of these rows, and says of dyntune what the tests assert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.obstacles.rows import ROWS

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "obstacles.json"


@pytest.fixture(scope="module")
def published() -> dict[str, dict]:
    if not RESULT.exists():
        pytest.skip("benchmarks/ is not part of a source distribution")
    return {row["name"]: row for row in json.loads(RESULT.read_text())["rows"]}


def test_the_rows_are_the_tested_ones(published):
    assert list(published) == list(ROWS)
    for name, row in ROWS.items():
        assert published[name]["method"] == (row.engine if row.error is None else row.error.__name__)
        assert published[name]["tolerance"] == row.tolerance


def test_no_row_is_silently_wrong_and_nothing_moved(published):
    ours = {name: row["results"]["dyntune"] for name, row in published.items()}
    assert {name for name, found in ours.items() if found["moved"]} == set()
    for name, row in ROWS.items():
        assert ours[name]["verdict"] == ("right" if row.error is None else "refused"), name


def test_the_comparison_is_one(published):
    """Peers are right where nothing stands in the way: a broken adapter would make them wrong everywhere."""
    for name in ("frozen parameters", "tied weights", "BatchNorm, evaluation", "label smoothing"):
        assert {found["verdict"] for found in published[name]["results"].values()} == {"right"}, name
