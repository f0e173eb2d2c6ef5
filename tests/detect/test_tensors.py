"""Detectors of single tensors and layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from dyntune.detect import default_detectors
from dyntune.detect.experimental import experimental_detectors
from dyntune.detect.inside import AttentionLogits, OutputLogits, Staleness
from dyntune.detect.steps import BLOCK
from dyntune.detect.tensors import (
    DeadUnits,
    EpsTooLarge,
    Explosion,
    Frozen,
    GroupRate,
    OnLooks,
    Vanishing,
)
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row
from tests.detect.series import hostile, run_of_rows, told_of

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")
MARK = {"monitor/overhead": 0.01}  # every look has it


def looks(prefix: str, *values: Sequence[float | None], extra: Sequence[Row] = ()) -> list[Row]:
    """A look every ten steps, with a number for each tensor, None for none, and steps until all of them count."""
    found = [
        Row(
            step=10 * i,
            values=MARK | {f"{prefix}{name}": x for name, x in zip(NAMES, row, strict=True) if x is not None},
        )
        for i, row in enumerate(values)
    ]
    return run_of_rows(10 * len(values) + 2 * BLOCK, extra=[*found, *extra])


def told(kind: type[OnLooks], rows: Sequence[Row]) -> list[Alert]:
    return told_of(kind, rows)


SOUND: dict[str, list[float]] = {
    "update/ratio/": [1e-3, 5e-3, 1e-3, 5e-3, 2e-3, 2e-2],
    "grad/log_rms/": [-7.0, -6.0, -7.0, -5.0, -4.0, -3.0],
    "adam/below_eps/": [0.3, 0.3, 0.0, 0.0, 0.0, 0.0],
    "adam/staleness/": [1.0, 1.1, 0.9, 1.0, 1.5, 0.7],
    "units/dead/": [0.0, 0.1, 0.5, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("prefix", SOUND)
def test_sound_tensors_are_silent(prefix: str) -> None:
    rows = looks(prefix, *[SOUND[prefix]] * 5)
    assert told_of(experimental_detectors, rows) == []
    assert told_of(default_detectors, rows) == []


CRITICAL = (Vanishing, DeadUnits)
FAULTS: dict[type[OnLooks], tuple[str, list[float | None], Cause]] = {
    Frozen: ("update/ratio/", [0.0, 0.0, 1e-3, 5e-3, 2e-3, 2e-2], Cause.FROZEN),
    Vanishing: ("grad/log_rms/", [-17.0, -6.0, -15.0, -5.0, -4.0, -3.0], Cause.VANISHING),
    Explosion: ("grad/log_rms/", [1.0, 2.0, -7.0, -5.0, -4.0, -3.0], Cause.EXPLODING),
    DeadUnits: ("units/dead/", [0.95, 1.0, 0.5, 0.0, 0.0, 0.0], Cause.LR_TOO_HIGH),
    Staleness: ("adam/staleness/", [3.0, 9.0, 1.0, 1.0, 1.0, 1.0], Cause.STALE_SECOND_MOMENT),
    GroupRate: ("update/ratio/", [0.5, 0.9, 1e-3, 5e-3, 2e-3, 2e-3], Cause.GROUP_LR),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_two_tensors_is_one_alarm_that_names_them(kind: type[OnLooks]) -> None:
    prefix, bad, cause = FAULTS[kind]
    (alert,) = told(kind, looks(prefix, *[SOUND[prefix]] * 3, *[bad] * 6))
    assert alert.cause is cause
    where = ("0.weight", "2.weight") if kind is Vanishing else ("0.weight", "0.bias")  # of biases it says nothing
    assert alert.where == where
    assert alert.step == 10 * (3 + kind.looks - 1)
    assert alert.severity == ("critical" if kind in CRITICAL else "warning")
    assert ", ".join(where) in alert.text


@pytest.mark.parametrize("kind", FAULTS)
def test_one_look_is_no_alarm(kind: type[OnLooks]) -> None:
    prefix, bad, _ = FAULTS[kind]
    assert told(kind, looks(prefix, *[SOUND[prefix]] * 3, bad, *[SOUND[prefix]] * 3, bad)) == []


@pytest.mark.parametrize("kind", FAULTS)
def test_it_is_said_again_after_a_sound_look(kind: type[OnLooks]) -> None:
    prefix, bad, _ = FAULTS[kind]
    sound, spell = [SOUND[prefix]] * 3, [bad] * 3
    assert len(told(kind, looks(prefix, *sound, *spell, *sound, *spell))) == 2


def test_lowest_tensors_that_lose_their_gradient_are_disconnected() -> None:
    sound = SOUND["update/ratio/"]
    (low,) = told(Frozen, looks("update/ratio/", sound, *[[None, None, *sound[2:]]] * 2))
    assert low.causes == (Cause.DISCONNECTED, Cause.FROZEN)
    (other,) = told(Frozen, looks("update/ratio/", sound, *[[*sound[:2], None, *sound[3:]]] * 2))
    assert other.causes == (Cause.FROZEN, Cause.DISCONNECTED)
    assert other.where == ("2.weight",)


def test_a_learning_rate_of_zero_freezes_nothing() -> None:
    assert told(Frozen, looks("update/ratio/", SOUND["update/ratio/"], *[[0.0] * 6] * 3)) == []


def test_eps_is_too_large_for_all_tensors_or_for_none() -> None:
    (alert,) = told(EpsTooLarge, looks("adam/below_eps/", *[[1.0, 0.9, 0.8, 1.0, 0.0, 0.7]] * 2))
    assert alert.cause is Cause.EPS_TOO_LARGE
    assert "4.weight" not in alert.where
    assert told(EpsTooLarge, looks("adam/below_eps/", *[[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]] * 2)) == []


def test_gradients_do_not_vanish_by_their_unit() -> None:
    small = [x - 40.0 for x in SOUND["grad/log_rms/"]]
    assert told(Vanishing, looks("grad/log_rms/", *[small] * 3)) == []


@pytest.mark.parametrize(
    ("kind", "column"), [(AttentionLogits, "attention/max_logit"), (OutputLogits, "logits/max_abs")]
)
def test_logits_have_to_be_large_and_to_have_grown(kind: type[OnLooks], column: str) -> None:
    (alert,) = told(kind, single(column, 1.0, 2.0, 150.0, 200.0, 300.0))
    assert (alert.step, alert.severity, alert.evidence[column]) == (20, "critical", 150.0)
    assert told(kind, single(column, 1e-3, 1.0, 50.0, 99.0)) == []
    assert told(kind, single(column, 34.0, 101.0)) == []  # not threefold
    assert len(told(kind, single(column, 33.0, 101.0))) == 1


def single(column: str, *values: float, every: int = 10) -> list[Row]:
    found = [Row(step=every * i, values=MARK | {column: x}) for i, x in enumerate(values)]
    return run_of_rows(every * len(values) + 2 * BLOCK, extra=found)


def test_attention_logits_that_are_large_from_the_start_are_no_alarm_and_output_logits_are() -> None:
    assert told(AttentionLogits, single("attention/max_logit", 150.0, 160.0, 170.0)) == []
    (alert,) = told(OutputLogits, single("logits/max_abs", 150.0, 160.0, 170.0))
    assert (alert.step, alert.cause) == (0, Cause.EXPLODING)
    assert told(OutputLogits, single("logits/max_abs", 99.0, 101.0)) == []


@pytest.mark.parametrize(
    ("kind", "column"), [(AttentionLogits, "attention/max_logit"), (OutputLogits, "logits/max_abs")]
)
def test_logits_that_grow_late_have_drifted(kind: type[OnLooks], column: str) -> None:
    (alert,) = told(kind, single(column, 1.0, 2.0, 3.0, 150.0, every=100))
    assert alert.cause is {AttentionLogits: Cause.ATTENTION_LOGITS, OutputLogits: Cause.OUTPUT_LOGITS}[kind]


def test_output_logits_that_take_their_time_are_none() -> None:
    """A factor of 1.4 in 100 steps: 2.7 in the 256 steps and more between compared looks."""
    assert told(OutputLogits, single("logits/max_abs", *(20.0 * 1.4**i for i in range(12)), every=100)) == []
    assert told(OutputLogits, single("logits/max_abs", *(20.0 * 1.5**i for i in range(12)), every=100)) != []


def test_a_gradient_that_never_was_has_vanished_and_one_that_went_has_died() -> None:
    gone = [-math.inf, -7.0, -7.0, -5.0, -4.0, -3.0]
    (alert,) = told(Vanishing, looks("grad/log_rms/", *[gone] * 3))
    assert (alert.where, alert.cause) == (("0.weight",), Cause.VANISHING)
    assert "infinitely many times" in alert.text
    assert told(Vanishing, looks("grad/log_rms/", SOUND["grad/log_rms/"], *[gone] * 3)) == []


@pytest.mark.parametrize(("nats", "alarm"), [(7.9, False), (8.1, True)])
def test_eight_nats_are_lost(nats: float, alarm: bool) -> None:
    assert bool(told(Vanishing, looks("grad/log_rms/", *[[-4.0 - nats, -7.0, -7.0, -5.0, -4.0, -3.0]] * 3))) == alarm


@pytest.mark.parametrize(("share", "alarm"), [(0.59, False), (0.61, True)])
def test_six_tenths_of_the_units_are_dead(share: float, alarm: bool) -> None:
    assert bool(told(DeadUnits, looks("units/dead/", *[[share, 0.1, 0.0, 0.0, 0.0, 0.0]] * 3))) == alarm


def test_units_that_are_dead_from_the_start_were_made_so() -> None:
    (alert,) = told(DeadUnits, looks("units/dead/", *[[0.95, 0.1, 0.0, 0.0, 0.0, 0.0]] * 3))
    assert (alert.cause, alert.recommender) == (Cause.DEAD_UNITS, "")


def test_units_that_died_at_a_learning_rate_of_the_first_steps_lack_a_warm_up() -> None:
    bad = [0.95, 0.1, 0.0, 0.0, 0.0, 0.0]
    rows = looks("units/dead/", SOUND["units/dead/"], *[bad] * 3)
    lr = [Row(step=row.step, values=row.values | {"train/lr": 1.0 if row.step < 10 else 0.3}) for row in rows]
    (alert,) = told(DeadUnits, lr)
    assert alert.cause is Cause.WARMUP_MISSING


def test_what_eps_hides_of_small_gradients_is_no_fault_of_a_small_eps() -> None:
    settings = [Row(step=0, values={"optimizer/eps": 1e-8})]
    (alert,) = told(EpsTooLarge, looks("adam/below_eps/", *[[1.0] * 6] * 2, extra=settings))
    assert alert.cause is Cause.VANISHING
    settings = [Row(step=0, values={"optimizer/eps": 1e-4})]
    (alert,) = told(EpsTooLarge, looks("adam/below_eps/", *[[1.0] * 6] * 2, extra=settings))
    assert alert.cause is Cause.EPS_TOO_LARGE


def test_nothing_is_said_of_eps_once_everything_is_learnt() -> None:
    def rows(end: float) -> list[Row]:
        found = looks("adam/below_eps/", *[[1.0] * 6] * 2)
        return [Row(step=r.step, values=r.values | {"train/loss": 1.0 if r.step == 0 else end}) for r in found]

    assert told(EpsTooLarge, rows(0.021)) != []
    assert told(EpsTooLarge, rows(0.019)) == []


COLUMNS = [f"{prefix}{name}" for prefix in SOUND for name in NAMES] + ["attention/max_logit", "logits/max_abs"]


@pytest.mark.parametrize("name", hostile(()))
def test_numbers_that_make_no_sense_raise_nothing(name: str) -> None:
    """But infinite logits, and gradients and updates that are zero now and then: those are what the alarms are for."""
    right = {"infinite": (OutputLogits,), "wild": (OutputLogits, AttentionLogits, Vanishing, Explosion, Frozen)}
    for kind in (*FAULTS, EpsTooLarge, AttentionLogits, OutputLogits):
        found = told_of(kind, hostile([*COLUMNS, "monitor/overhead"])[name][:200])
        assert found == [] or kind in right.get(name, ()), kind
