"""The comparison itself: what a tool that breaks counts as, and what the summary says."""

from __future__ import annotations

import pytest

from benchmarks.lr import baselines
from benchmarks.lr.scenario import Scenario
from benchmarks.lr.search import Store

SCENARIO = Scenario("compared", "digits/mlp-relu", "tune", "sgd")


def test_a_tool_is_asked_once_and_its_error_is_no_suggestion(monkeypatch, tmp_path):
    asked = []

    def breaks(scenario, seed):
        asked.append(seed)
        raise ZeroDivisionError("in the tool")

    monkeypatch.setattr(baselines, "_methods", lambda: {"works": lambda scenario, seed: 0.25, "breaks": breaks})
    for _ in range(2):
        store = Store(tmp_path / "suggested.jsonl")
        assert baselines._suggestion(SCENARIO, "works", store, "digest") == 0.25
        assert baselines._suggestion(SCENARIO, "breaks", store, "digest") is None
    assert asked == [baselines.FRESH_SEEDS[0]]
    assert Store(store.path).found["digest"]["breaks error"] == "ZeroDivisionError: in the tool"


def test_no_suggestion_is_no_training():
    assert (baselines.NOTHING.regret, baselines.NOTHING.regret_val, baselines.NOTHING.failed) == (1.0, 1.0, 1.0)


def test_summary():
    rows = [(0.1, 0.0, 0.0), (0.3, -0.2, 0.2), (1.0, 1.0, 0.6)]
    table = {
        str(i): {"tool": {"lr": lr, "regret": regret, "regret_val": val, "failed": failed}}
        for i, ((regret, val, failed), lr) in enumerate(zip(rows, (0.1, 0.2, None), strict=True))
    }
    found = baselines._summary(table, "tool")
    assert found["regret"]["mean"] == pytest.approx(1.4 / 3)
    assert found["regret"]["low"] >= 0.1
    assert found["regret"]["high"] <= 1.0
    assert found["regret_val"]["mean"] == pytest.approx(0.8 / 3)
    assert found["p95"] == pytest.approx(0.93)  # 0.3 + 0.9 * 0.7, by linear interpolation
    assert (found["worst"], found["failed"], found["no_suggestion"]) == (1.0, 1, 1)


def test_costs_are_what_the_rules_and_tools_take():
    table = {"0": {key: {**vars(baselines.NOTHING)} for key in ("naive-sweep", "lightning", "best-constant")}}
    costs = {name: baselines._summary(table, name)["gradients"] for name in table["0"]}
    assert costs == {"naive-sweep": 135, "lightning": 100, "best-constant": 0}
