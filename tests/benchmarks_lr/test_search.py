"""The searches over learning rates, on a trainer whose answer is known; killed, resumed, never trained twice."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.lr import search
from benchmarks.lr.judge import Run
from benchmarks.lr.metrics import OK, PEAK
from benchmarks.lr.scenario import Scenario

SCENARIO = Scenario("searched", "digits/mlp-relu", "tune", "sgd")


class Parabola:
    """A loss that is a parabola in log2 lr (its best shifted for validation), and fails above an edge."""

    def __init__(self, best: float, edge: float, val_shift: float = 0.0) -> None:
        self.best, self.edge, self.val_shift = best, edge, val_shift
        self.calls: list[tuple[int, int]] = []
        self.dies_after: int | None = None

    def __call__(self, scenario: Scenario, lr: float, seed: int) -> Run:
        if self.dies_after is not None and len(self.calls) == self.dies_after:
            raise KeyboardInterrupt
        x = math.log2(lr)
        self.calls.append((round(4 * x), seed))
        if x >= self.edge + 0.01 * seed:
            return Run(2.0, math.inf, math.inf, math.inf, PEAK, 2.0)
        train, val = (min(1.9, 0.5 + 0.05 * (x - b) ** 2) for b in (self.best, self.best + self.val_shift))
        return Run(2.0, train, val, 2.0, OK, 2.0)


def searched(tmp_path, trainer: Parabola) -> search.Runs:
    runs = search.Runs(SCENARIO, search.Store(tmp_path / "runs.jsonl"), train=trainer)
    search.grid(runs)
    return runs


@pytest.mark.parametrize("best", [-13.2, -7.0, -3.1, 0.4, 9.9])
def test_grid_finds_the_best_from_far_away(tmp_path, best):
    runs = searched(tmp_path, Parabola(best, best + 3.3))
    assert abs(runs.found["best"] / 4 - best) <= 0.25  # the nearest point of a grid of half octaves
    for k in range(runs.found["best"] - 6, runs.found["best"] + 7, 2):
        assert all((k, seed) in runs.known for seed in search.SEEDS)


def test_validation_has_its_own_best(tmp_path):
    runs = searched(tmp_path, Parabola(-3.0, 2.0, val_shift=-2.5))
    assert runs.found["best"] == -12
    assert runs.found["best_val"] == -22
    search.rerun(runs)
    assert all((k, seed) in runs.known for k in (-12, -22) for seed in search.FRESH_SEEDS)


@pytest.mark.parametrize("edge", [-2.8, -2.0, -0.9, 1.3, 4.2])
def test_onset_is_found_to_a_quarter_octave(tmp_path, edge):
    runs = searched(tmp_path, Parabola(-3.0, edge))
    search.failure_onset(runs)
    # Seeds fail from edge + 0.01 seed on: three of five do from edge + 0.02 on.
    worse_than_midpoint = -3.0 + math.sqrt((1.25 - 0.5) / 0.05)
    assert runs.found["onset"] == math.ceil(4 * min(edge + 0.02, worse_than_midpoint))


def test_a_kill_costs_one_run(tmp_path):
    whole = searched(tmp_path / "whole", Parabola(-3.0, 0.0))
    trainer, died = Parabola(-3.0, 0.0), 0
    for _ in range(100):
        trainer.dies_after = len(trainer.calls) + 3
        try:
            runs = searched(tmp_path, trainer)
            break
        except KeyboardInterrupt:
            died += 1
            path = tmp_path / "runs.jsonl"
            path.write_bytes(path.read_bytes()[:-20])  # the last line was not written to its end
    assert died > 3
    assert runs.found == whole.found
    assert runs.known.keys() == whole.known.keys()
    assert len(trainer.calls) == len(whole.known) + died  # the cut lines again, nothing else


def test_a_finished_search_trains_nothing(tmp_path):
    trainer = Parabola(-3.0, 0.0)
    first = searched(tmp_path, trainer)
    search.failure_onset(first)
    count = len(trainer.calls)
    again = searched(tmp_path, trainer)
    search.failure_onset(again)
    assert len(trainer.calls) == count
    assert again.found == first.found


def test_another_definition_does_not_see_the_runs(tmp_path):
    runs = searched(tmp_path, Parabola(-3.0, 0.0))
    other = Scenario("searched", "digits/mlp-relu", "tune", "sgd", width=33)
    assert runs.known
    assert not search.Runs(other, search.Store(runs.store.path)).known


def test_rows_survive_a_cut_line(tmp_path):
    store = search.Store(tmp_path / "runs.jsonl")
    store.add({"digest": "a", "found": {"best": 1}})
    with store.path.open("a") as file:
        file.write('{"digest": "a", "fo')
    store.add({"digest": "a", "found": {"onset": 4}})
    assert search.Store(store.path).found == {"a": {"best": 1, "onset": 4}}
    assert json.loads(store.path.read_text().splitlines()[-1])["found"] == {"onset": 4}
