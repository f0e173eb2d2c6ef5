"""Detectors of single tensors and layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from dyntune.detect.experimental import (
    AttentionLogits,
    DeadUnits,
    EpsTooLarge,
    Explosion,
    Frozen,
    GroupRate,
    OutputLogits,
    Staleness,
    Vanishing,
    experimental_detectors,
)
from dyntune.detect.tensors import OnLooks
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row, Rows

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")
MARK = {"monitor/overhead": 0.01}  # every look has it


def looks(prefix: str, *values: Sequence[float | None]) -> list[Row]:
    """One row per look, with a number for each tensor, None for none."""
    return [
        Row(
            step=10 * i,
            values=MARK | {f"{prefix}{name}": x for name, x in zip(NAMES, row, strict=True) if x is not None},
        )
        for i, row in enumerate(values)
    ]


def told(detector: OnLooks, rows: Sequence[Row]) -> list[Alert]:
    whole = list(detector.update(Rows.of(rows)))
    again = type(detector)()
    assert [alert for row in rows for alert in again.update(Rows.of([row]))] == whole  # however they are cut
    return whole


SOUND: dict[str, list[float]] = {
    "update/ratio/": [1e-3, 5e-3, 1e-3, 5e-3, 2e-3, 2e-2],
    "grad/log_rms/": [-7.0, -6.0, -7.0, -5.0, -4.0, -3.0],
    "adam/below_eps/": [0.3, 0.3, 0.0, 0.0, 0.0, 0.0],
    "adam/staleness/": [1.0, 1.1, 0.9, 1.0, 1.5, 0.7],
    "units/dead/": [0.0, 0.1, 0.5, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("prefix", SOUND)
def test_sound_tensors_are_silent(prefix: str) -> None:
    rows = Rows.of(looks(prefix, *[SOUND[prefix]] * 5))
    assert [alert for detector in experimental_detectors() for alert in detector.update(rows)] == []


FAULTS: dict[type[OnLooks], tuple[str, list[float | None], Cause]] = {
    Frozen: ("update/ratio/", [0.0, 0.0, 1e-3, 5e-3, 2e-3, 2e-2], Cause.FROZEN),
    Vanishing: ("grad/log_rms/", [-17.0, -math.inf, -7.0, -5.0, -4.0, -3.0], Cause.VANISHING),
    Explosion: ("grad/log_rms/", [1.0, 2.0, -7.0, -5.0, -4.0, -3.0], Cause.EXPLODING),
    DeadUnits: ("units/dead/", [0.95, 1.0, 0.5, 0.0, 0.0, 0.0], Cause.DEAD_UNITS),
    Staleness: ("adam/staleness/", [3.0, 9.0, 1.0, 1.0, 1.0, 1.0], Cause.STALE_SECOND_MOMENT),
    GroupRate: ("update/ratio/", [0.5, 0.9, 1e-3, 5e-3, 2e-3, 2e-3], Cause.GROUP_LR),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_two_tensors_is_one_alarm_that_names_them(kind: type[OnLooks]) -> None:
    prefix, bad, cause = FAULTS[kind]
    (alert,) = told(kind(), looks(prefix, *[SOUND[prefix]] * 3, *[bad] * 6))
    assert alert.cause is cause
    assert alert.where == ("0.weight", "0.bias")
    assert alert.step == 10 * (3 + kind.looks - 1)
    assert alert.severity == "warning"
    assert "0.weight, 0.bias" in alert.text


@pytest.mark.parametrize("kind", FAULTS)
def test_one_look_is_no_alarm(kind: type[OnLooks]) -> None:
    prefix, bad, _ = FAULTS[kind]
    assert told(kind(), looks(prefix, *[SOUND[prefix]] * 3, bad, *[SOUND[prefix]] * 3, bad)) == []


@pytest.mark.parametrize("kind", FAULTS)
def test_it_is_said_again_after_a_sound_look(kind: type[OnLooks]) -> None:
    prefix, bad, _ = FAULTS[kind]
    sound, spell = [SOUND[prefix]] * 3, [bad] * 3
    assert len(told(kind(), looks(prefix, *sound, *spell, *sound, *spell))) == 2


def test_lowest_tensors_that_lose_their_gradient_are_disconnected() -> None:
    sound = SOUND["update/ratio/"]
    (low,) = told(Frozen(), looks("update/ratio/", sound, *[[None, None, *sound[2:]]] * 2))
    assert low.causes == (Cause.DISCONNECTED, Cause.FROZEN)
    (other,) = told(Frozen(), looks("update/ratio/", sound, *[[*sound[:2], None, *sound[3:]]] * 2))
    assert other.causes == (Cause.FROZEN, Cause.DISCONNECTED)
    assert other.where == ("2.weight",)


def test_a_learning_rate_of_zero_freezes_nothing() -> None:
    assert told(Frozen(), looks("update/ratio/", SOUND["update/ratio/"], *[[0.0] * 6] * 3)) == []


def test_eps_is_too_large_for_all_tensors_or_for_none() -> None:
    (alert,) = told(EpsTooLarge(), looks("adam/below_eps/", *[[1.0, 0.9, 0.8, 1.0, 0.0, 0.7]] * 2))
    assert alert.cause is Cause.EPS_TOO_LARGE
    assert "4.weight" not in alert.where
    assert told(EpsTooLarge(), looks("adam/below_eps/", *[[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]] * 2)) == []


def test_gradients_do_not_vanish_by_their_unit() -> None:
    small = [x - 40.0 for x in SOUND["grad/log_rms/"]]
    assert told(Vanishing(), looks("grad/log_rms/", *[small] * 3)) == []


@pytest.mark.parametrize(
    ("kind", "column"), [(AttentionLogits, "attention/max_logit"), (OutputLogits, "logits/max_abs")]
)
def test_logits_have_to_be_large_and_to_have_grown(kind: type[OnLooks], column: str) -> None:
    def rows(*values: float) -> list[Row]:
        return [Row(step=i, values=MARK | {column: x}) for i, x in enumerate(values)]

    (alert,) = told(kind(), rows(1.0, 2.0, 150.0, 200.0, 300.0))
    assert (alert.step, alert.evidence[column]) == (3, 200.0)
    assert told(kind(), rows(150.0, 160.0, 170.0)) == []
    assert told(kind(), rows(1e-3, 1.0, 50.0, 99.0)) == []
