"""Detectors on recorded runs: blocks as they were written, rules as published, and nothing of the future."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")

from benchmarks.faults import judge as judging
from benchmarks.faults.alarm import Alarm, Monitored, at_level, blocks_of, look, read_blocks
from benchmarks.faults.baselines import (
    BASELINES,
    FIXED_RULE,
    PLACEBO,
    AutoTrainer,
    ClippedNorm,
    GradTracer,
    LargestOfFirst,
    NeuralDbg,
    PersistentLoss,
    Placebo,
    RelativeSpike,
    SpikeOfSigmas,
)
from benchmarks.faults.cases import Case, cases
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.lines import encode


def _arrays(loss, norm=None, lr=None):
    loss = np.asarray(loss, dtype=float)
    norm = np.ones_like(loss) if norm is None else np.asarray(norm, dtype=float)
    return {"loss": loss, "norm": norm, "lr": np.full_like(loss, 0.1) if lr is None else lr}


def _lines(arrays, sizes, *, extra=()):
    """A log in records of the sizes, over and over; `extra`: (before which step, step, values)."""
    records = [{"kind": "header", "schema": 1}]
    steps, first, turn = len(arrays["loss"]), 0, 0
    while first < steps:
        count = min(sizes[turn % len(sizes)], steps - first)
        records += [
            {"kind": "row", "step": at, "values": v} for before, at, v in extra if first <= before < first + count
        ]
        values = {"train/loss": arrays["loss"][first : first + count].tolist()}
        records.append({"kind": "rows", "step": first, "count": count, "values": values})
        first, turn = first + count, turn + 1
    return [encode(record | {"seq": i}) for i, record in enumerate(records)]


def _blocks(arrays, sizes=(7,), extra=()):
    return list(blocks_of(_lines(arrays, sizes, extra=extra), arrays))


def _times(looker, arrays, *, level=None, extra=(), sizes=(7,)):
    raised = look(looker, _blocks(arrays, sizes, extra))
    level = looker.levels[0] if level is None else level
    return [(alarm.time, alarm.kind) for alarm in at_level(raised, level, at_least=looker.at_least)]


def _noise(steps, *, seed=0, mean=1.0, sd=0.01):
    return mean + sd * np.random.default_rng(seed).standard_normal(steps)


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_are_the_records_and_cover_every_step_once():
    blocks = _blocks(_arrays(np.arange(20.0)), sizes=(1, 8, 3))
    assert [block.time for block in blocks] == [0, 8, 11, 12, 19]
    assert np.concatenate([block.loss for block in blocks]).tolist() == list(range(20))
    for block in blocks:
        assert block.rows.column("train/loss").tolist() == block.loss.tolist()
        assert block.rows.steps.tolist() == list(range(block.first, block.time + 1))


def test_a_measurement_written_ahead_of_the_losses_moves_the_clock():
    blocks = _blocks(_arrays(np.arange(10.0)), sizes=(5,), extra=[(5, 6, {"units/dead_max": 0.5})])
    assert [(block.time, len(block.loss)) for block in blocks] == [(4, 5), (6, 2), (9, 3)]
    assert blocks[1].rows.column("units/dead_max").tolist() == [0.5]


def test_steps_without_a_record_come_last():
    arrays = _arrays(np.arange(10.0))
    blocks = list(blocks_of(_lines(_arrays(np.arange(6.0)), (6,)), arrays))
    assert [(block.time, len(block.rows)) for block in blocks] == [(5, 6), (9, 0)]


def test_a_monitors_detector_is_given_each_record_and_speaks_at_its_end():
    class Fifth:
        def __init__(self):
            self.given = []

        def update(self, rows):
            self.given.append(rows.steps.tolist())
            if 5 in self.given[-1]:
                yield Alert(kind="five", severity="warning", step=5, text="", advice="", causes=(Cause.BAD_BATCH,))

    detector = Fifth()
    found = look(Monitored([detector]), _blocks(_arrays(np.zeros(10)), sizes=(4,)))
    assert detector.given == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert found == [Alarm(7, "five", "warning", ("bad batches",))]


# -- rules ------------------------------------------------------------------------------------------------------------


def test_six_sigmas_of_128_needs_a_full_window_and_forgets_nothing():
    # Alternating 0 and 2: mean 1, population sd 1. 7 is at 6 sd, which is not above.
    base = np.tile([0.0, 2.0], 100)
    for at, value, alarm in ((127, 99.0, False), (128, 7.0, False), (128, 7.001, True)):
        loss = base.copy()
        loss[at] = value
        times = [time for time, _ in _times(SpikeOfSigmas((6.0,), ["loss"]), _arrays(loss))]
        assert times == ([at] if alarm else [])
    # A spike enters the window: with 20 in it, mean + 6 sd is 1.15 + 6 * 1.95 = 12.8, and 12 is no spike any more.
    for earlier, expected in ((20.0, [130]), (2.0, [132])):
        loss = base.copy()
        loss[[130, 132]] = earlier, 12.0
        assert [time for time, _ in _times(SpikeOfSigmas((6.0,), ["loss"]), _arrays(loss))] == expected


def test_sigmas_of_the_gradient_norm_and_of_a_flat_series():
    norm = np.tile([0.0, 2.0], 100)
    norm[150] = 30.0
    assert _times(SpikeOfSigmas((6.0,), ["loss", "norm"], least_sd=1e-10), _arrays(np.ones(200), norm)) == [
        (150, "norm spike")
    ]
    rising = np.r_[np.ones(150), 2.0]
    assert _times(SpikeOfSigmas((6.0,), ["loss"], least_sd=1e-10), _arrays(rising)) == []
    assert _times(SpikeOfSigmas((6.0,), ["loss"]), _arrays(rising)) == [(150, "loss spike")]  # infinitely many sd


@pytest.mark.parametrize(("count", "times"), [(4, []), (5, [154]), (7, [154, 155, 156])])
def test_llm_foundry_waits_for_five_in_a_row(count, times):
    loss = np.ones(300)
    loss[150 : 150 + count] = 4.0
    assert [time for time, _ in _times(PersistentLoss((2.0,)), _arrays(loss))] == times


def test_llm_foundry_half_of_the_window_above_ten():
    loss = np.where(np.arange(400) % 2, 11.0, 9.0)  # half of any hundred
    assert [time for time, _ in _times(PersistentLoss((2.0,)), _arrays(loss))] == list(range(200, 400))
    assert _times(PersistentLoss((2.0,)), _arrays(np.full(400, 10.0))) == []


def test_lightning_flags_at_three_times_the_mean_and_keeps_it_out():
    loss = np.ones(40)
    loss[20:23] = 3.0  # |3 - 1| >= 2 * 1
    assert [time for time, _ in _times(RelativeSpike(2.0), _arrays(loss))] == [20, 21, 22]
    loss[20:23] = 2.99
    assert _times(RelativeSpike(2.0), _arrays(loss)) == []
    loss[0], loss[30] = math.nan, math.inf
    assert [time for time, _ in _times(RelativeSpike(2.0), _arrays(loss))][-1] == 30


def test_zclip_by_hand():
    norm = np.r_[np.tile([0.0, 2.0], 13)[:25], 1.0, 50.0, 8.0]  # 8 is flagged only if 50 was taken in clipped
    mean, variance = norm[:25].mean(), norm[:25].var()
    flagged = []
    for step in range(25, 28):
        x, sd = norm[step], math.sqrt(variance)
        z = (x - mean) / (sd + 1e-6)
        if z > 2.5:
            flagged.append(step)
            x = mean + 2.5 * sd / (z / 2.5)
        mean = 0.97 * mean + 0.03 * x
        variance = 0.97 * variance + 0.03 * (x - mean) ** 2
    assert flagged == [26, 27]
    assert [time for time, _ in _times(ClippedNorm(2.5), _arrays(np.ones(28), norm))] == flagged


def test_megatron_compares_with_the_first_hundred():
    loss = np.ones(150)
    loss[50], loss[120], loss[121] = 2.0, 20.0, 20.5
    assert [time for time, _ in _times(LargestOfFirst((10.0,)), _arrays(loss))] == [121]


def _log_rms(first, last):
    return {
        "grad/log_rms/0.weight": math.log(first),
        "grad/log_rms/0.bias": 0.0,
        "grad/log_rms/4.weight": math.log(last),
    }


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (_log_rms(0.9e-4, 1.0), "vanishing"),
        (_log_rms(1.1e-4, 1.0), None),  # the ratio alone is not enough
        (_log_rms(0.9e-4, 0.08), None),
        (_log_rms(71.0, 1.0), "exploding"),
        (_log_rms(69.0, 1.0), None),
        ({"units/dead_max": 0.7}, "dying ReLU"),
        ({"units/dead_max": 0.69}, None),
    ],
)
def test_autotrainer_on_what_is_recorded(values, kind):
    found = _times(AutoTrainer(), _arrays(np.ones(10)), extra=[(7, 7, values)])
    assert found == ([] if kind is None else [(7, kind)])


def test_autotrainer_on_losses():
    assert _times(AutoTrainer(), _arrays([1.0, 2e5, 1.0, math.nan])) == [(1, "not finite"), (3, "not finite")]


def test_neuraldbg_speaks_of_changes():
    loss = np.linspace(2.0, 1.0, 30)
    loss[10] = 30.0
    loss[20:] = loss[19]
    norm = np.ones(30)
    norm[3], norm[5] = 1e4, 1e-7
    expected = [(3, "exploding"), (5, "vanishing"), (10, "loss spike"), (23, "plateau")]
    assert _times(NeuralDbg(), _arrays(loss, norm)) == expected
    assert _times(NeuralDbg(), _arrays([1.0, 1.1, 1.2, math.nan, math.nan])) == [(3, "diverging")]


def test_gradtracer_by_absolute_limits():
    norm = np.ones(40)
    norm[4] = 101.0
    still = [(at, at, {"update/ratio/a": 1e-8, "update/ratio/b": 1e-3}) for at in range(10, 36, 5)]
    found = _times(GradTracer(), _arrays(np.ones(40), norm), extra=still, sizes=(5,))
    assert found == [(4, "gradient explosion"), (30, "stagnation"), (35, "stagnation")]


def test_the_placebo_raises_as_many_alarms_as_it_is_told_to():
    looker = Placebo((10.0, 100.0), "a run")
    raised = look(looker, _blocks(_arrays(np.zeros(20_000)), sizes=(500,)))
    for level in looker.levels:
        count = len(at_level(raised, level, at_least=False))
        assert abs(count - 20_000 / level) < 5 * math.sqrt(20_000 / level)  # 5 sd of a Poisson count
    again = look(Placebo((10.0, 100.0), "a run"), _blocks(_arrays(np.zeros(20_000)), sizes=(77,)))
    assert again == raised
    assert look(Placebo((10.0, 100.0), "another"), _blocks(_arrays(np.zeros(20_000)))) != raised


def test_every_rule_tries_its_own_default():
    for name, baseline in BASELINES.items():
        levels = [level for looker in baseline.make("x") for level in looker.levels]
        assert sorted(levels) == sorted(baseline.levels)
        assert baseline.default in levels or name == PLACEBO
    assert (FIXED_RULE, BASELINES[FIXED_RULE].default) == judging.RULE


# -- causality --------------------------------------------------------------------------------------------------------


def _eventful(steps=400):
    rng = np.random.default_rng(3)
    loss, norm = np.exp(0.1 * rng.standard_normal(steps)), np.exp(0.5 * rng.standard_normal(steps))
    for burst in (200, 330):
        loss[burst : burst + 8], norm[burst] = 1e4, 1e6
    dead = [
        (at, at, _log_rms(10.0 ** rng.uniform(-6, 3), 1.0) | {"units/dead_max": rng.uniform()})
        for at in range(9, steps, 25)
    ]
    still = [(at, at, {"update/ratio/a": 1e-8}) for at in range(12, steps, 25)]
    return _arrays(loss, norm), dead + still


@pytest.mark.parametrize("name", BASELINES)
def test_no_rule_sees_later_blocks(name):
    arrays, extra = _eventful()
    cut = 250
    changed = {key: values.copy() for key, values in arrays.items()}
    for values in changed.values():
        values[cut:] = 1e6
    other = [(before, at, v if at < cut else {"units/dead_max": 1.0}) for before, at, v in extra]

    def before(arrays, extra):
        lookers = BASELINES[name].make("run")
        blocks = _blocks(arrays, (5,), extra)
        return [alarm for looker in lookers for alarm in look(looker, blocks) if alarm.time < cut]

    assert before(arrays, extra) == before(changed, other)
    assert before(arrays, extra), "no alarm that could have changed"


@pytest.mark.parametrize("name", [n for n in BASELINES if n not in ("AutoTrainer", "neuraldbg", "gradtracer")])
def test_rules_that_look_at_every_step_do_not_care_for_blocks(name):
    arrays, _ = _eventful()

    def all_with(sizes):
        return [alarm for looker in BASELINES[name].make("run") for alarm in look(looker, _blocks(arrays, sizes))]

    one, other = (sorted(all_with(sizes), key=lambda a: (a.time, a.kind)) for sizes in ((1,), (64, 3)))
    assert [(a.time, a.kind) for a in one] == [(a.time, a.kind) for a in other]
    # Means over windows of other alignment in memory are summed in another order.
    assert [a.strength for a in one] == pytest.approx([a.strength for a in other], rel=1e-9)


# -- the runner -------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    """A fault of the tune half and a healthy run, as if recorded."""
    fault = next(case for case in cases("faults", half="tune") if case.severity == "severe")
    healthy = cases("healthy", half="tune")[0]
    for case in (fault, healthy):
        folder = judging.folder_of(case, tmp_path)
        folder.mkdir(parents=True)
        loss = _noise(600)
        if case is fault:
            loss[300:] = 50.0
        arrays = _arrays(loss)
        np.savez_compressed(folder / "steps.npz", **arrays)
        with gzip.open(folder / "run.jsonl.gz", "wb") as out:
            out.writelines(_lines(arrays, (20,)))
        _write_truth(case, folder, onset=290 if case is fault else None)
    return tmp_path, fault, healthy


def _write_truth(case: Case, folder, onset):
    truth = {"digest": case.digest, "onset": onset, "steps": 600, "severity": case.severity}
    truth |= {"cause": None if case.cell is None else case.cell.fault.cause.value}
    truth |= {} if case.kind == "faults" else {"healthy": True}
    (folder / "truth.json").write_text(json.dumps(truth))


def test_blocks_of_a_stored_run(place):
    root, fault, _ = place
    blocks = read_blocks(judging.folder_of(fault, root))
    assert [block.time for block in blocks] == list(range(19, 600, 20))


def test_runs_are_judged_once_until_something_changes(place):
    root, fault, _ = place
    folder, answers = judging.folder_of(fault, root), judging.place_of(fault, root / "judged")
    code = judging.codes()
    assert judging.update(folder, answers, fault.name, code) == list(code)
    assert judging.update(folder, answers, fault.name, code) == []
    code["Lightning"] = "edited"
    assert judging.update(folder, answers, fault.name, code) == ["Lightning"]
    _write_truth(fault, folder, onset=10)
    assert judging.update(folder, answers, fault.name, code) == list(code)


def test_from_runs_to_a_summary(place, monkeypatch):
    root, fault, healthy = place

    class Oracle:
        def update(self, rows):
            if rows.column("train/loss")[-1] > 20:
                yield Alert(
                    kind="right", severity="critical", step=0, text="", advice="", causes=(fault.cell.fault.cause,)
                )

    monkeypatch.setattr(judging, "default_detectors", lambda: (Oracle(),))
    code = judging.codes()
    for case in (fault, healthy):
        judging.update(judging.folder_of(case, root), judging.place_of(case, root / "judged"), case.name, code)
    result = judging.packed("tune", root, root / "judged")
    assert json.loads(judging.written(result)) == json.loads(json.dumps(result))
    assert result["complete"]["faults"] == {
        "defined": len(cases("faults", half="tune")),
        "recorded": 1,
        "judged": 1,
        "steps": 600,
    }
    assert result["complete"]["healthy"]["steps"] == 600
    ours = next(row for row in result["points"] if row["detector"] == "dyntune" and row["severity"] == "critical")
    assert (ours["detection"]["severe"]["rate"], ours["top_1"]["severe"]["rate"]) == (1, 1)
    assert ours["detection"]["mild"] is None
    assert (ours["healthy"]["count"], ours["before_onset"]) == (0, 0)
    assert ours["lead"]["severe"]["median"] == 300 - 319  # the rule at the step, a monitor at the end of its block
    rule = next(row for row in result["points"] if row["detector"] == FIXED_RULE and row["level"] == 6)
    assert rule["lead"]["severe"]["median"] == 0
    megatron = next(row for row in result["points"] if row["detector"] == "Megatron" and row["default"])
    assert megatron["detection"]["severe"]["rate"] == 1
    assert result["ours"]["critical"]["budget"] == 2  # the fault lasts for 300 steps: the alarm counts twice
    assert result["ours"]["critical"]["ahead"]["Megatron"]["severe"]["gain"] == 0


def test_stale_answers_do_not_count(place):
    root, fault, _ = place
    folder, answers, code = judging.folder_of(fault, root), judging.place_of(fault, root / "judged"), judging.codes()
    assert judging.judged_run(fault, folder, answers, code) is None
    judging.update(folder, answers, fault.name, code)
    assert judging.judged_run(fault, folder, answers, code) is not None
    assert judging.judged_run(fault, folder, answers, code | {"dyntune": "edited"}) is None
    _write_truth(fault, folder, onset=10)
    assert judging.judged_run(fault, folder, answers, code) is None


def test_a_healthy_run_that_was_none_is_left_out(place):
    root, fault, healthy = place
    folder, answers, code = judging.folder_of(healthy, root), judging.place_of(healthy, root / "j"), judging.codes()
    truth = json.loads((folder / "truth.json").read_text())
    (folder / "truth.json").write_text(json.dumps(truth | {"healthy": False}))
    judging.update(folder, answers, healthy.name, code)
    assert judging.judged_run(healthy, folder, answers, code) is None
    with pytest.raises(SystemExit, match="nothing is judged"):
        judging.packed("tune", root, root / "j")
    judging.update(judging.folder_of(fault, root), judging.place_of(fault, root / "j"), fault.name, code)
    result = judging.packed("tune", root, root / "j")
    assert result["not_healthy"] == [healthy.name]
    assert all(row["healthy"] is None for row in result["points"])


@pytest.mark.parametrize(("arguments", "said"), [([], False), (["--half", "test"], True)])
def test_the_test_half_is_read_only_when_asked_for_and_says_so(arguments, said, monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(judging, "cases", lambda kind, *, half: asked.append(half) or [])
    monkeypatch.setattr("sys.argv", ["judge.py", "--status", "--runs", str(tmp_path), *arguments])
    judging.main()
    assert set(asked) == {"test" if said else "tune"}
    assert ("LOOKED AT" in capsys.readouterr().out) == said
