"""Verdicts on learning rates, against sweeps whose answer is known and against the committed ones."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from benchmarks.lr import metrics, search, sweep, verdict
from benchmarks.lr.judge import PEAK, VERSION, Run
from benchmarks.lr.scenario import Scenario
from benchmarks.lr.scenarios import SCENARIOS
from tests.benchmarks_lr.test_search import Parabola

SCENARIO = Scenario("judged", "digits/mlp-relu", "tune", "sgd")


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """A finished sweep of a parabola with its best at 1/8 and its edge at 1, packed; the judge; the trainer."""
    trainer = Parabola(-3.0, 0.0, val_shift=-1.0)
    monkeypatch.setattr(verdict, "train", trainer)
    runs = search.Runs(SCENARIO, search.Store(tmp_path / "runs.jsonl"), train=trainer)
    for step in (search.grid, search.rerun, search.failure_onset):
        step(runs)
    packed = json.dumps({"scenarios": {SCENARIO.name: sweep._row(runs)}}, allow_nan=False)
    (tmp_path / "sweeps.json").write_text(packed)
    return verdict.Judge(tmp_path / "sweeps.json", tmp_path / "judged.jsonl"), trainer


def test_the_grids_best_has_no_regret(judged):
    judge, _ = judged
    found = judge.verdict(SCENARIO, 0.125)
    assert found == verdict.Verdict(0.125, 0.0, pytest.approx(0.05 / 1.5), 0.0, 0.0)
    assert judge.verdict(SCENARIO, 0.0625).regret_val == 0  # validation is best an octave below


def test_regret_is_that_of_the_curve(judged):
    judge, _ = judged
    found = judge.verdict(SCENARIO, 0.125 / 4)  # two octaves off: 0.05 * 2^2 of 2 - 0.5
    assert found.regret == pytest.approx(0.2 / 1.5)
    assert found.octaves == pytest.approx(2)


def test_failing_is_losing_everything(judged):
    judge, _ = judged
    found = judge.verdict(SCENARIO, 4.0)
    assert (found.regret, found.regret_val, found.failed) == (1.0, 1.0, 1.0)


def test_runs_above_the_midpoint_count_as_failed(judged):
    judge, _ = judged
    # The parabola passes the midpoint of 2 and 0.5 at sqrt(0.75 / 0.05) = 3.9 octaves.
    assert judge.verdict(SCENARIO, 0.125 / 2**3.8).failed == 0
    assert judge.verdict(SCENARIO, 0.125 / 2**3.95).failed == 1


def test_the_same_question_is_trained_once(judged):
    judge, trainer = judged
    first = judge.verdict(SCENARIO, 0.1)
    count = len(trainer.calls)
    again = verdict.Judge(judge.store.path.with_name("sweeps.json"), judge.store.path)
    assert again.verdict(SCENARIO, 0.1) == first
    assert len(trainer.calls) == count


def test_another_definition_is_refused(judged):
    judge, _ = judged
    with pytest.raises(verdict.StaleSweepError, match=r"sweep\.py"):
        judge.verdict(dataclasses.replace(SCENARIO, steps=301), 0.1)
    with pytest.raises(verdict.StaleSweepError, match="another"):
        judge.verdict(dataclasses.replace(SCENARIO, name="another"), 0.1)


def test_packing_keeps_the_curve_and_what_failed(judged):
    judge, _ = judged
    found = verdict.sweep_of(SCENARIO, judge.sweeps)
    assert (found.best, found.best_val, found.onset) == (0.125, 0.0625, pytest.approx(2**0.25))
    curve = found.curve()
    assert metrics.best_lr(curve) == 0.125
    assert curve[0.125] == [0.5, 0.5]
    failed = found.at(found.onset, (0,))[0]
    assert failed == Run(2.0, math.inf, math.inf, math.inf, PEAK, 2.0)
    assert isinstance(failed.failed, int)


COMMITTED = verdict.load_sweeps()


def test_committed_sweeps_are_small_and_of_the_present_scenarios():
    assert verdict.SWEEPS.stat().st_size < 2e6
    assert COMMITTED.keys() == SCENARIOS.keys()
    for name, scenario in SCENARIOS.items():
        assert (name, COMMITTED[name]["scenario"], COMMITTED[name]["judge"]) == (name, scenario.settings(), VERSION)


@pytest.mark.parametrize("name", SCENARIOS)
def test_committed_sweep_is_complete_and_its_best_is_inside(name):
    row = COMMITTED[name]
    runs = {int(k): {int(seed): values for seed, values in found.items()} for k, found in row["runs"].items()}
    best = row["best"]
    for k in range(best - search.REACH, best + search.REACH + 1, search.FINE):
        assert set(search.SEEDS) <= runs[k].keys()
    for k in (best, row["best_val"]):
        assert set(search.FRESH_SEEDS) <= runs[k].keys()
    assert min(runs) < best < max(runs)
    assert row["onset"] is None or row["onset"] > best
