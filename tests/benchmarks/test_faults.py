"""The benchmark of faults: every generator does what it says, the split is fixed, runs are stored and come back."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")

from benchmarks.faults import record as recording
from benchmarks.faults.calibrate import RESULT, SEEDS, Calibration
from benchmarks.faults.cases import Case, cases, severities, twin_name
from benchmarks.faults.fault import Fault
from benchmarks.faults.faults import FAMILIES
from benchmarks.faults.harm import BANDS, LEVELS, Curve, harm, level_of, onset_of
from benchmarks.faults.healthy import HEALTHY, KINDS, is_healthy
from benchmarks.faults.split import CELLS, number_within_cause
from benchmarks.faults.training import AFTER_NON_FINITE, Training
from benchmarks.faults.workloads import ARCHITECTURES, HALVES, WORKLOADS, workload_for
from dyntune.monitor.alerts import Cause

ONSET = 3
STEPS = 6
STRONG = {family: fault.sizes[-1] if fault.judged == "size" else fault.strongest for family, fault in FAMILIES.items()}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _fault(name: str, seed: int = 1) -> Fault:
    cell = CELLS[name]
    return cell.fault(STRONG[cell.family], onset=ONSET if cell.fault.mid_run else 0, seed=seed)


def _trained(workload, changes=(), *, seed: int = 1, until: int = STEPS) -> Training:
    training = Training(workload, seed, changes)
    training.loop(until=until)
    return training


def _state(training: Training) -> list[torch.Tensor]:
    return [p.detach().clone() for p in training.model.parameters()]


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- split ------------------------------------------------------------------------------------------------------------


def test_no_pair_of_architecture_and_data_is_in_both_halves():
    pairs = {half: set() for half in HALVES}
    for workload in WORKLOADS.values():
        pairs[workload.half].add((workload.architecture, workload.scenario.data_name))
    assert not pairs["tune"] & pairs["test"]


def test_every_cell_trains_the_workloads_of_its_half():
    for cell in CELLS.values():
        assert cell.workload.half == cell.half
        assert cell.workload.architecture == cell.architecture


def test_every_cause_is_in_both_halves():
    for cause in Cause:
        assert {cell.half for cell in CELLS.values() if cell.fault.cause == cause} == set(HALVES), cause


def test_neighbours_on_the_board_are_in_different_halves():
    for cell in CELLS.values():
        for other in CELLS.values():
            if cell.fault.cause == other.fault.cause:
                steps = number_within_cause(cell.fault) - number_within_cause(other.fault)
                steps += ARCHITECTURES.index(cell.architecture) - ARCHITECTURES.index(other.architecture)
                assert (cell.half == other.half) == (steps % 2 == 0)


def test_there_are_enough_generators_and_healthy_steps():
    assert len(FAMILIES) >= 16
    assert {cell.architecture for cell in CELLS.values()} == set(ARCHITECTURES)
    steps = {half: sum(run.steps for run in HEALTHY.values() if run.half == half) for half in HALVES}
    assert steps["test"] >= 1_000_000
    assert sum(run.half == "test" for run in HEALTHY.values()) >= 100


def test_every_kind_of_healthy_run_is_in_both_halves():
    for kind in KINDS:
        assert {run.half for run in HEALTHY.values() if run.kind == kind} == set(HALVES), kind


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_changes_training_from_its_onset_on_and_not_before(family):
    # One cell a generator: all cells are run by the slow test below.
    cell = next(cell for cell in CELLS.values() if cell.family == family)
    _differs_from_onset_on(cell)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_every_cell_does(name):
    _differs_from_onset_on(CELLS[name])


def _differs_from_onset_on(cell):
    # A schedule at step 0 of a warm-up, a frozen layer with a zero first update: a few steps show every fault. Cleared
    # gradients, sorted rows and cycles show only where there was something to keep, so these get as many steps.
    steps = STEPS + ONSET
    healthy, faulty = Training(cell.workload, 1), Training(cell.workload, 1, [_fault(cell.name)])
    if cell.fault.mid_run:
        # Some faults fit the optimizer or the hooks at construction: a factor on a layer's gradient, another beta2.
        healthy.loop(until=ONSET)
        faulty.loop(until=ONSET)
        if cell.family not in ("stale-moment", "stale-layer"):
            assert healthy.losses == faulty.losses
            assert _same(_state(healthy), _state(faulty))
    healthy, faulty = _trained(cell.workload, until=steps), _trained(cell.workload, [_fault(cell.name)], until=steps)
    assert not _same(_state(healthy), _state(faulty))


@pytest.mark.parametrize("family", ["lr-jump", "dead-onset", "misaligned", "nan-log", "half-overflow"])
def test_the_same_seed_gives_the_same_bits(family):
    name = next(name for name, cell in CELLS.items() if cell.family == family)
    runs = [_trained(CELLS[name].workload, [_fault(name)], until=8) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].losses, runs[1].losses)  # NaN equals NaN here
    np.testing.assert_array_equal(runs[0].norms, runs[1].norms)


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    _trained(HEALTHY["dropout/mlp/0"].training().workload)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "name", [name for name, cell in CELLS.items() if cell.family in ("frozen", "not-in-optimizer")]
)
def test_what_is_frozen_stays_and_what_is_not_moves(name):
    fault = CELLS[name].fault(1 / 3, onset=0, seed=1)
    training = Training(CELLS[name].workload, 1, [fault])
    before = {key: p.detach().clone() for key, p in training.model.named_parameters()}
    training.loop(until=STEPS)
    moved = {key for key, p in training.model.named_parameters() if not torch.equal(p, before[key])}
    assert fault.where
    assert not moved & set(fault.where)
    assert moved


@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if cell.family == "detached"])
def test_what_is_below_a_detach_has_no_gradient_and_the_rest_has(name):
    for strength in FAMILIES["detached"].sizes:
        fault = CELLS[name].fault(strength, onset=0, seed=1)
        training = Training(CELLS[name].workload, 1, [fault])
        x, y = next(iter(training))
        training.criterion(training.model(x), y).backward()
        without = {key for key, p in training.model.named_parameters() if p.grad is None}
        assert without == set(fault.where)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", ["nan-log", "half-overflow"])
def test_a_value_that_is_not_finite_appears_at_the_onset(family, architecture):
    training = _trained(CELLS[f"{family}/{architecture}"].workload, [_fault(f"{family}/{architecture}")])
    assert np.isfinite(training.losses[:ONSET]).all()
    assert not math.isfinite(training.losses[ONSET])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_of_a_bad_derivative_the_loss_at_the_onset_is_finite_and_the_gradient_is_not(architecture):
    training = _trained(CELLS[f"nan-backward/{architecture}"].workload, [_fault(f"nan-backward/{architecture}")])
    assert math.isfinite(training.losses[ONSET])
    assert not math.isfinite(training.norms[ONSET])


def test_a_loop_that_sanitises_keeps_its_weights():
    cell = CELLS["nan-log/mlp"]
    training = _trained(cell.workload, [cell.fault(0.5, onset=1, seed=1)], until=8)
    assert sum(not math.isfinite(loss) for loss in training.losses) == 4  # steps 1, 3, 5, 7
    assert all(bool(p.isfinite().all()) for p in training.model.parameters())


def test_a_run_ends_when_its_loss_is_not_finite_for_long():
    cell = CELLS["nan-log/mlp"]
    training = Training(cell.workload, 1, [cell.fault(1.0, onset=2, seed=1)])
    training.loop()
    assert training.step == 2 + AFTER_NON_FINITE
    assert training.diverged


@pytest.mark.parametrize("family", ["group-lr", "group-lr-low", "weight-decay"])
def test_only_the_second_group_is_at_fault(family):
    name = next(name for name, cell in CELLS.items() if cell.family == family)
    fault = _fault(name)
    training = Training(CELLS[name].workload, 1, [fault])
    first, second = training.optimizer.param_groups
    names = {id(p): key for key, p in training.model.named_parameters()}
    assert {names[id(p)] for p in second["params"]} == set(fault.where)
    assert len(first["params"]) + len(second["params"]) == len(names)
    key = "weight_decay" if family == "weight-decay" else "lr"
    training.loop(until=1)
    assert first[key] != second[key]


def test_gradients_add_up_between_clearings():
    workload = workload_for("mlp", "tune", "sgd").changed(lr=0.0)
    fault = FAMILIES["zero-grad"](4.0, onset=0, seed=0)
    training = Training(workload, 0, [fault])
    training.x, training.y = training.x[:32], training.y[:32]  # one batch: the same gradient at every step
    training.loop(until=8)
    first = training.norms[0]
    # The same 32 rows are summed in another order each time: float32 rounding of sums of a few hundred terms.
    assert training.norms == pytest.approx([first * k for k in (1, 2, 3, 4, 1, 2, 3, 4)], rel=1e-4)


def test_sorted_rows_are_sorted_and_a_cycle_comes_back():
    cell = CELLS["sorted-data/mlp"]
    training = Training(cell.workload, 1, [cell.fault(1.0, onset=0, seed=1)])
    labels = training.y[training.order()]
    assert (labels.diff() >= 0).all()
    cell = CELLS["short-cycle/mlp"]
    fault = cell.fault(0.5, onset=1, seed=1)
    training = Training(cell.workload, 1, [fault])
    dealt = []
    for x, _ in training:
        dealt.append(x)
        training.step += 1
        if training.step == 7:
            break
    assert torch.equal(dealt[1], dealt[3])
    assert torch.equal(dealt[2], dealt[6])
    assert not torch.equal(dealt[1], dealt[2])
    assert not torch.equal(dealt[0], dealt[2])


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_shuffled_labels_are_the_same_labels_of_other_rows(strength):
    cell = CELLS["shuffled-labels/mlp"]
    clean = Training(cell.workload, 1)
    training = Training(cell.workload, 1, [cell.fault(strength, onset=0, seed=1)])
    assert torch.equal(training.y.bincount(), clean.y.bincount())
    # Of ten classes a tenth of the rows keeps its label by chance: of 1,400 rows, six standard deviations are 0.05.
    assert float((training.y != clean.y).double().mean()) == pytest.approx(0.9 * strength, abs=0.06)


# -- harm -------------------------------------------------------------------------------------------------------------


def test_harm_is_the_share_of_progress_that_is_lost():
    stays, passes = CELLS["lr-high/mlp"], CELLS["label-burst/mlp"]
    twin = Curve(2.5, (1.5, 1.0), 0.5)
    assert harm(stays, Curve(2.5, (9.0, 9.0), 1.5), twin) == 0.5  # 1.0 of 2.0
    assert harm(passes, Curve(2.5, (2.0, 1.5), 0.5), twin) == 0.25  # 0.5 on the mean, of 2.0
    assert harm(stays, Curve(2.5, (), math.nan), twin) == 2.0
    assert [level_of(x) for x in (0.0, 0.02, 0.1, 0.5, 2.0)] == [None, "mild", "medium", "severe", "severe"]


def test_onsets_lie_in_the_middle_and_differ_by_the_seed():
    jump, high = CELLS["lr-jump/mlp"], CELLS["lr-high/mlp"]
    onsets = [onset_of(jump, seed, 1000) for seed in range(5)]
    assert len(set(onsets)) == 5
    assert all(350 <= onset <= 550 for onset in onsets)
    assert onset_of(high, 3, 1000) == 0


def test_the_search_finds_strengths_in_the_bands(monkeypatch):
    """Harm that is a known function of strength, harm = strength / 1000 plus 0.001 for the second seed."""

    def measure(self, strength, seed):
        self.runs += 1
        self.harms.setdefault(strength, {})[seed] = strength / 1000 + 0.001 * (seed == SEEDS[1])

    monkeypatch.setattr(Calibration, "measure", measure)
    calibration = Calibration(CELLS["lr-high/mlp"])
    calibration.search()
    chosen = calibration.chosen()
    assert set(chosen) == set(LEVELS)
    for level, strength in chosen.items():
        assert BANDS[level][0] <= strength / 1000 < BANDS[level][1]
        assert calibration.is_confirmed(level, strength)


def test_a_cliff_has_no_medium_severity(monkeypatch):
    def measure(self, strength, seed):
        self.runs += 1
        self.harms.setdefault(strength, {})[seed] = 1.0 if strength > 100 else 0.0

    monkeypatch.setattr(Calibration, "measure", measure)
    calibration = Calibration(CELLS["lr-high/mlp"])
    calibration.search()
    assert set(calibration.chosen()) == {"severe"}


def test_severities_on_file_are_measured_in_their_bands():
    rows = json.loads(RESULT.read_text())
    assert set(rows) <= set(CELLS)
    for name, row in rows.items():
        cell = CELLS[name]
        assert (row["half"], row["cause"], row["workload"]) == (cell.half, cell.fault.cause.value, cell.workload.name)
        for level, found in row["levels"].items():
            if cell.fault.judged != "size":
                mean = sum(found["harm"]) / len(found["harm"])
                assert len(found["harm"]) == len(SEEDS)
                # Harms on file are rounded to four digits after the point.
                assert BANDS[level][0] - 1e-4 <= mean <= BANDS[level][1] + 1e-4, (name, level)


# -- healthy runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, run in HEALTHY.items() if run.seed == 0 and run.architecture == "mlp"])
def test_healthy_recipes_run(name):
    _healthy_recipe_runs(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, run in HEALTHY.items() if run.seed < 2 and run.architecture != "mlp"])
def test_the_other_healthy_recipes_run(name):
    _healthy_recipe_runs(name)


def _healthy_recipe_runs(name):
    training = next(case for case in cases("healthy") if case.name == name).training(steps=10)
    training.loop()
    assert training.step == 10
    assert np.isfinite(training.losses).all()


def test_a_sparse_embedding_has_few_rows_with_a_gradient():
    training = HEALTHY["sparse-embedding/transformer/0"].training()
    x, y = next(iter(training))
    training.criterion(training.model(x), y).backward()
    gradient = training.model.get_parameter("embed.weight").grad
    touched = int((gradient.abs().sum(1) > 0).sum())
    assert 0 < touched <= x.numel() < len(gradient) / 10
    trained = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in training.model.parameters()} == trained


def test_schedules_step_and_restart():
    dropped = HEALTHY["step-decay/mlp/0"].training()
    assert [round(dropped.factor(step), 6) for step in (0, 2399, 2400, 4800, 7999)] == [1, 1, 0.2, 0.04, 0.008]
    restarted = HEALTHY["restarts/mlp/0"].training()
    assert [round(restarted.factor(step), 3) for step in (0, 800, 1599, 1600)] == [1.0, 0.5, 0.0, 1.0]


def test_a_batch_ramp_ends_at_the_workloads_batch_and_tells_when_it_changes():
    case = next(case for case in cases("healthy") if case.name == "batch-ramp/mlp/0")
    training = case.training(steps=8)
    sizes = []
    for x, _ in training:
        sizes.append(len(x))
        training.step += 1
    assert sizes == [4, 4, 8, 8, 16, 16, 32, 32]
    assert case.truth(training)["events"] == {"batch size": [2, 4, 6]}


def test_what_counts_as_healthy():
    assert is_healthy([2.0] * 10 + [1.0] * 90, 2.0)
    assert not is_healthy([2.0] * 100, 2.0)
    assert not is_healthy([1.0] * 99 + [math.nan], 2.0)


# -- records ----------------------------------------------------------------------------------------------------------


def _case(name: str = "lr-jump/mlp", level: str = "severe", strength: float = 50.0) -> Case:
    cell = CELLS[name]
    return Case("faults", f"{name}/{level}/0", cell.half, cell.architecture, cell.workload, 0, cell, level, strength)


def test_a_run_is_stored_and_comes_back(tmp_path):
    case = _case()
    assert not recording.is_stored(case, tmp_path)
    recording.record(case, root=tmp_path, steps=40)
    assert recording.is_stored(case, tmp_path)
    run, arrays, truth = recording.load(recording.folder_of(case, tmp_path))
    assert truth["cause"] == "lr too high"
    assert truth["twin"] == twin_name(case.workload, 0)
    assert (truth["onset"], truth["steps"]) == (14, 40)
    assert {name: len(values) for name, values in arrays.items()} == {"loss": 40, "norm": 40, "lr": 40}
    steps, losses = run.series("train/loss")
    assert len(steps)
    # The monitor's losses are those of the loop, where it wrote them down; float32, whatever the log's decimals.
    np.testing.assert_allclose(losses, arrays["loss"][steps], rtol=1e-6)
    # Nothing of training depends on the monitor.
    plain = case.training(steps=40)
    plain.loop()
    np.testing.assert_array_equal(arrays["loss"], plain.losses)
    np.testing.assert_array_equal(arrays["norm"], plain.norms)


def test_another_strength_is_another_run(tmp_path):
    case = _case()
    recording.record(case, root=tmp_path, steps=5)
    assert not recording.is_stored(_case(strength=60.0), tmp_path)


@pytest.mark.parametrize("name", ["nan-log/gru", "detached/cnn", "not-in-optimizer/transformer", "stale-layer/mlp"])
def test_the_monitor_survives_what_it_is_to_find(tmp_path, name):
    cell = CELLS[name]
    truth = recording.record(_case(name, "severe", STRONG[cell.family]), root=tmp_path, steps=12)
    assert truth["steps"] == 12
    assert truth["where"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_the_monitor_survives_every_cell(tmp_path, name):
    truth = recording.record(_case(name, "severe", STRONG[CELLS[name].family]), root=tmp_path, steps=60)
    assert truth["steps"] == 60


def test_cases_have_names_of_their_own_and_twins():
    faults, twins = cases("faults"), {case.name for case in cases("twins")}
    assert len({case.name for case in faults}) == len(faults)
    assert len(faults) == 5 * sum(len(levels) for levels in severities().values())
    assert {twin_name(case.workload, case.seed) for case in faults} == twins
    with pytest.raises(ValueError, match="choose from"):
        cases("fault")


def test_faults_are_not_shared_between_runs():
    case = _case()
    first, second = case.training(steps=10), case.training(steps=10)
    first.loop()
    second.loop()
    assert first.losses == second.losses
    assert first.lrs == second.lrs
