"""The judge of beta2: regrets on cells whose answer is known, spikes, workloads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.beta2.regret import Cell, cells, interval
from benchmarks.beta2.training import WINDOW, count_spikes, train
from benchmarks.beta2.workloads import BETAS, LONG, STEPS, WORKLOADS, select


def cell(losses: np.ndarray, *, initial: float = 2.0, betas: tuple[float, ...] = (0.9, 0.99, 0.999)) -> Cell:
    return Cell(
        workload="digits/mlp:8",
        lr="the best",
        betas=np.array(betas),
        losses=losses,
        initial=np.full(losses.shape[1], initial),
        failed=np.zeros(losses.shape, dtype=bool),
        spikes=np.zeros(losses.shape, dtype=int),
    )


def test_regret_is_the_share_of_what_there_is_to_learn() -> None:
    """No noise between seeds: the halves agree, and 1.0 lies half-way between the best and the start of 2.0 and 0.0."""
    found = cell(np.array([[1.0] * 4, [0.0] * 4, [2.0] * 4]))
    assert found.regret().tolist() == [0.5, 0.0, 1.0]
    assert found.floor() == 0.0
    assert found.error().tolist() == [0.0, 0.0, 0.0]


def test_the_best_of_one_half_is_scored_on_the_other() -> None:
    """Two values that are best on one half each: on the other half both ways lose what the other would have won."""
    found = cell(np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0], [2.0] * 4]))
    # Even seeds choose the first value, which is 1.0 on odd ones, where the second is 0.0; and the other way round.
    assert found.floor() == 1.0
    assert found.regret()[:2].tolist() == [-0.5, -0.5]  # means of 0 (own half's choice) and -1


def test_luck_alone_has_a_floor_and_no_regret_in_the_mean() -> None:
    """Values that differ by nothing: what the best costs on other seeds is luck, and nobody's regret is far from 0."""
    rng = np.random.default_rng(0)
    floors, regrets = [], []
    for _ in range(200):
        found = cell(0.5 + 0.05 * rng.standard_normal((3, 6)))
        floors.append(found.floor())
        regrets.append(found.regret()[1])
    assert np.mean(floors) > 0.01  # a third of the deviation of a mean over three, in shares of 1.5
    assert abs(np.mean(regrets)) < 0.005  # three standard errors of 200 means of three


@pytest.mark.parametrize(("beta2", "at"), [(0.5, 0), (0.93, 0), (0.98, 1), (0.9985, 2), (1.0, 2)])
def test_a_choice_counts_as_the_nearest_in_memory(beta2: float, at: int) -> None:
    assert cell(np.zeros((3, 4))).nearest(beta2) == at


def test_intervals_draw_whole_families() -> None:
    """One family of a hundred equal cells is one observation: its interval with another family spans both."""
    values, groups = np.array([1.0] * 100 + [0.0]), ["a"] * 100 + ["b"]
    mean, low, high = interval(values, groups)
    assert (mean, low, high) == (pytest.approx(100 / 101), 0.0, 1.0)


def test_spikes() -> None:
    losses = 1.0 + 0.01 * np.sin(np.arange(500.0))
    assert count_spikes(losses) == 0
    losses[300] = 1.5
    assert count_spikes(losses) == 1
    assert count_spikes(losses[:WINDOW]) == 0


def test_cells_need_all_values_at_enough_seeds() -> None:
    run = [2.0, 1.0, 1.1, 3.0, 0, 2.1, 4]
    row = {"runs": {str(b): {"the best": {str(s): run for s in range(5)}} for b in (0.9, 0.99)}}
    (found,) = cells({"digits/mlp:8": row})
    assert found.losses.tolist() == [[1.0] * 4] * 2  # an even number, for halves
    assert cells({"digits/mlp:8": row}, which="val")[0].losses[0, 0] == 1.1
    del row["runs"]["0.9"]["the best"]["1"], row["runs"]["0.9"]["the best"]["3"]
    assert cells({"digits/mlp:8": row}) == []


def test_a_stopped_run_counts_as_the_start() -> None:
    row = {"runs": {"0.9": {"the best": {str(s): [2.0, None, None, None, 1, 2.1, 0] for s in range(4)}}}}
    (found,) = cells({"digits/mlp:8": row})
    assert found.losses.tolist() == [[2.0] * 4]
    assert found.failed.all()


def test_halves_share_no_pair_of_data_and_architecture() -> None:
    families = {half: {w.family for w in select(half=half)} for half in ("tune", "test")}
    assert not families["tune"] & families["test"]
    assert min(len(found) for found in families.values()) >= 7


def test_runs_are_long_enough_for_the_longest_memory_that_is_compared() -> None:
    for workload in WORKLOADS.values():
        assert workload.steps >= round(3 / (1 - workload.betas2[-1]))
    assert {w.steps for w in WORKLOADS.values()} == {STEPS, LONG}
    assert next(w for w in WORKLOADS.values() if w.steps == LONG).betas2 == BETAS


def test_outliers_are_not_among_the_rows_that_are_judged() -> None:
    workload = WORKLOADS["digits/mlp-tanh:8"]
    plain, data = WORKLOADS["digits/mlp-relu:8"].data(), workload.data()
    larger = (data.x.abs().amax(1) > plain.x.abs().amax(1)).nonzero()[:, 0]
    assert larger.min() >= 512
    assert 3 <= len(larger) <= 30  # a hundredth of 888 rows


@pytest.mark.parametrize("name", ["mnist8/mlp-relu:128", "shakespeare/ngrams:2"])
def test_runs_are_paired_by_seed_and_repeat(name: str) -> None:
    import dataclasses

    workload = dataclasses.replace(WORKLOADS[name], steps=40)
    state = torch.random.get_rng_state()
    first, again, other = (
        train(workload.at(0.9), 1e-3, 0),
        train(workload.at(0.9), 1e-3, 0),
        train(workload.at(0.99), 1e-3, 0),
    )
    assert first == again
    assert torch.equal(state, torch.random.get_rng_state())
    assert other.initial == first.initial
    assert other.train != first.train
    assert first.train < first.initial
