"""The curve of detection against false alarms, and the tables of the page."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")

from benchmarks import tables
from benchmarks.faults import curve
from benchmarks.faults import judge as judging
from benchmarks.faults.alarm import Alarm
from benchmarks.faults.baselines import BASELINES, FIXED_RULE, PLACEBO
from benchmarks.faults.score import Judged
from dyntune.monitor.alerts import Cause

ONSET, STEPS = 500, 1200
LOUD, QUIET = ("OLMo-core", 3.0), ("OLMo-core", 6.0)


def _said(times, severity="critical", causes=()):
    return tuple(Alarm(time, "k", severity, tuple(map(str, causes))) for time in times)


def _runs():
    """Four severe faults and 100,000 healthy steps.

    dyntune finds two, one only by a warning, and warns once where nothing is; OLMo-core at 3 sd finds all with three
    false alarms, at 6 one with one; the others are silent.
    """
    silent = {(name, level): () for name, b in BASELINES.items() for level in b.levels}
    high = [Cause.LR_TOO_HIGH]
    ours = [_said([600], causes=high), _said([600], "warning", high), (), ()]
    runs = [
        Judged(str(i), "faults", f"lr-high/{i}", STEPS, high[0].value, "severe", ONSET, silent | {("dyntune", 0.0): a})
        for i, a in enumerate(ours)
    ]
    for i, run in enumerate(runs):
        run.alarms[LOUD], run.alarms[QUIET] = _said([700]), _said([700] if i == 3 else [])
    healthy = silent | {("dyntune", 0.0): _said([9], "warning"), LOUD: _said([1, 500, 900]), QUIET: _said([1])}
    for level in BASELINES[PLACEBO].levels:  # rarer and rarer: 24, 12, ...
        healthy[PLACEBO, level] = _said(range(0, int(240 / level)))
    return [*runs, Judged("h", "healthy", "plain/mlp", 100_000, None, None, None, healthy)]


@pytest.fixture(scope="module")
def result():
    complete = {
        name: {"defined": 9, "recorded": 4, "judged": 4, "steps": 4800} for name in ("faults", "twins", "healthy")
    }
    origin = {"versions": {"python": "3"}, "commit": "0" * 40, "uncommitted_changes": False}
    origin |= {"date": "2026-11-23T00:00:00", "cpu": "a CPU", "threads": 1}
    about = {"half": "test", "complete": complete, "not_healthy": ["edge/mlp/0"], "provenance": origin}
    about |= {"sources": {name: [b.source, b.missing] for name, b in BASELINES.items()}}
    return json.loads(json.dumps(judging._plain(about | judging.summary(_runs()))))


def test_the_curve_by_hand(result):
    assert curve.curve(result, "dyntune", "severe") == [(0.0, 0.25, True), (1.0, 0.5, True)]
    points = curve.curve(result, "OLMo-core", "severe")
    assert points == [(0.0, 0.0, False), (1.0, 0.25, True), (3.0, 1.0, False)]
    assert curve.curve(result, "dyntune", "medium") == []


def test_ahead_compares_at_no_more_false_alarms(result):
    ahead = {severity: result["ours"][severity]["ahead"]["OLMo-core"]["severe"] for severity in ("critical", "warning")}
    # Without any false alarm OLMo-core is silent, at one it finds a fault that dyntune does not.
    assert (ahead["critical"]["detection"], ahead["critical"]["gain"]) == (0, 0.25)
    assert (ahead["warning"]["level"], ahead["warning"]["detection"], ahead["warning"]["gain"]) == (6, 0.25, 0.25)
    assert ahead["warning"]["cell_low"] < 0 < ahead["warning"]["cell_high"]


def test_the_placebo_has_the_budget(result):
    marked = {s: [row for row in result["points"] if row.get(f"budget_of_{s}")] for s in ("critical", "warning")}
    for severity, wanted in (("critical", 1), ("warning", 3)):
        (row,) = marked[severity]
        assert result["ours"][severity]["budget"] == wanted
        assert row["healthy"]["count"] == min(c for b in BASELINES[PLACEBO].levels if (c := int(240 / b)) >= wanted)


def test_false_alarms_are_listed_to_be_looked_at(result):
    assert result["ours"]["critical"]["false"] == []
    assert result["ours"]["warning"]["false"] == [["healthy", "h", 9, "k", "warning"]]


def test_causes_outside_the_vocabulary_are_told():
    runs = _runs()
    runs[0].alarms[LOUD] = _said([600], causes=["bad luck"])
    assert judging.summary(runs)["unknown_causes"] == ["bad luck"]


def test_figures_are_the_same_bytes_and_name_every_detector(result, tmp_path, monkeypatch):
    (tmp_path / "alarms.json").write_text(json.dumps(result))
    monkeypatch.setattr(curve, "LEVELS", ("severe",))
    drawn = []
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["curve.py", "--of", str(tmp_path / "alarms.json"), "--out", str(tmp_path)])
        assert curve.main() == 0
        drawn.append((tmp_path / "alarms-severe.svg").read_text())
    assert drawn[0] == drawn[1]
    for name in BASELINES:
        assert name.replace(">", "&gt;") in drawn[0]
    assert "dyntune, critical" in drawn[0]


def test_tables(result):
    text = tables.alarms(result)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert text.startswith("The test half: 4 of 9 faults (4,800 steps);")
    assert "Left out, since they were not healthy: edge/mlp/0." in text
    assert "| **dyntune**, critical | 1/4, 25% (0 to 75) |  |  |" in text
    # 100,000 steps: exact 95% limits of one alarm are 0.0253 and 5.57, one-sided 4.74; of none 3.69 and 3.
    assert "| 0; 0 (0 to 3.69) | 3 | no; 0 |" in text
    assert "| 1; 1 (0.0253 to 5.57) | 4.74 | no; 0 |" in text
    assert text.count("\n| OLMo-core | 25% | +25 (") == 1
    assert "\n| OLMo-core | 0% | +25 (+0 to +75) |\n" in text
    assert rows["lr-high"] == "| lr-high | 2/4; 2, 2 |  |  |"
    assert "../_static/alarms-severe.svg" in text
    assert FIXED_RULE in rows


def test_the_page_has_a_place_for_the_table():
    page = tables.DOCUMENTS / "alarms.md"
    assert page in tables.PAGES
    assert "alarms" in tables.RENDERERS
    assert tables.replaced(page.read_text(encoding="utf-8"), "alarms", "| x |") is not None
