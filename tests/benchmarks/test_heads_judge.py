"""The judge of heads: effects, equality, concordance with censoring, and what a packed sweep keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.heads import sweep
from benchmarks.heads.judge import Judged, concordance, flags, rates, summary, verdicts
from benchmarks.heads.training import Run
from benchmarks.heads.workloads import Cell, groups
from benchmarks.lr.search import Store

GROUP = groups()[0]


def judged(observed: Any, predicted: Any = (0.0, 0.0, 0.0), *, verdict: str = "equivalent", **told: Any) -> Judged:
    return Judged(
        GROUP, np.array(observed), np.array(predicted), {"verdict": verdict, "margin": 1.25, "table": []} | told
    )


def test_effects_need_two_seeds_that_agree() -> None:
    apart = np.array([[-1.0], [0.0], [1.0]])
    assert judged(apart).effect is None
    assert judged(apart + np.array([0.0, 2.0])).effect is True  # what seeds share is no noise
    noisy = np.array([[0.0, 1.0, -1.0], [1.0, -1.0, 0.0], [-1.0, 0.0, 1.0]])
    assert judged(noisy).effect is False
    # One step of the bisection apart, in one seed of two.
    assert judged([[0.0, 0.0], [0.0, 0.125], [0.0, 0.0]]).effect is False


def test_equal_is_within_the_margin_and_what_is_resolved() -> None:
    assert judged([[-0.3], [0.0], [0.3]]).equal
    assert not judged([[-0.5], [0.0], [0.5]]).equal


def test_concordance_counts_ties_and_censoring() -> None:
    assert concordance(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])) == (3.0, 3)
    assert concordance(np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0])) == (0.0, 3)
    assert concordance(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == (0.5, 1)
    assert concordance(np.array([1.0, 2.0]), np.array([1.0, math.nan])) == (1.0, 1)  # beyond the grid is above
    assert concordance(np.array([1.0, 2.0]), np.array([math.nan, math.nan])) == (0.0, 0)


def test_errors_against_the_mean_of_what_was_observed() -> None:
    perfect = judged([[-1.0], [0.0], [1.0]], (-1.0, 0.0, 1.0))
    level = judged([[-1.0], [0.0], [1.0]], (2.0, 2.0, 2.0))
    found = rates([perfect, level])
    assert found["cells"] == 6
    assert found["within a factor 2"] == 4  # the last one is off by 1, 2, 3
    assert found["log2 error"] == pytest.approx(1.0)
    gap = found["against the group mean"]["all"]
    assert gap["error"]["mean"] == pytest.approx((-2 / 3 + (2 - 2 / 3)) / 2)
    assert gap["of the heads' part alone"]["mean"] == pytest.approx(-1 / 3)
    assert found["against the group mean"]["with an effect"]["error"] == {"groups": 0}
    assert found["concordance"] == pytest.approx((3 + 1.5) / 6)


def test_verdicts_and_flags() -> None:
    found = verdicts([judged([[0.0], [0.1], [0.0]]), judged([[-1.0], [0.0], [1.0]])])
    assert found["said"] == {"equivalent": 2, "different": 0, "undecided": 0}
    assert found["right"] == {"equivalent": 1, "different": 0}
    rows = [{"flags": ["logits of 40 before training"]}, {"flags": []}]
    assert flags([judged([[0.0], [0.0]], table=rows)])["others flagged"] == 1
    assert summary([1.0]) == {"groups": 1, "mean": 1.0, "interval": None, "worst": 1.0}


def test_a_packed_sweep_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and failing rates come back, unfinished seeds as unfinished."""
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "cache" / "runs.jsonl")
    monkeypatch.setattr(sweep, "RESULT", tmp_path / "results" / "sweeps.json")
    store = Store(sweep.RUNS, Run)
    runs = sweep.runs_of(Cell(GROUP, 2), store)
    for k, seed, run in ((-8, 0, Run(4.0, 2.0, 2.1, 150, 9.0)), (0, 0, Run(4.0, math.inf, math.inf, 3, math.inf))):
        store.add({"digest": runs.digest, "k": k, "seed": seed, "run": list(vars(run).values()), "seconds": 1.0})
    store.add({"digest": runs.digest, "k": -8, "seed": 1, "run": [4.0, 2.5, 2.5, 150, 9.0], "seconds": 1.0})
    runs.conclude(**{"failing 0": -4.5})
    sweep.pack(Store(sweep.RUNS, Run))
    entry = json.loads(sweep.RESULT.read_text())["groups"][GROUP.name]["heads"]["2"]
    assert "failing" not in entry["1"]
    before = sweep.runs_of(Cell(GROUP, 2), Store(sweep.RUNS, Run))
    sweep.RUNS.unlink()
    sweep.unpack()
    after = sweep.runs_of(Cell(GROUP, 2), Store(sweep.RUNS, Run))
    assert after.found == {"failing 0": -4.5}
    assert after.known == before.known
    marked = sweep.RUNS.read_text()
    sweep.unpack()  # what is there is not touched
    assert sweep.RUNS.read_text() == marked
