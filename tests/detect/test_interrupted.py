"""Gradients that are zero at one step."""

from __future__ import annotations

import math

import pytest

from dyntune.detect.interrupted import MANY, SPARSE, USUAL, Interrupted
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row
from tests.detect.series import hostile, run_of_rows, told_of

NAMES = ("a", "b", "c")
SOUND = (-3.0, -4.0, -2.0)


def gone(count: int = len(NAMES)) -> tuple[float, ...]:
    return tuple(-math.inf if i < count else x for i, x in enumerate(SOUND))


def told(*looks: tuple[float, ...], dead: float = 0.0, first: int = 0) -> list[Alert]:
    """A look every twenty steps."""
    extra = [Row(step=first + 5, values={"units/dead_max": dead, "units/dead/0": dead})] if dead else []
    for i, logs in enumerate(looks):
        values = {f"grad/log_rms/{name}": x for name, x in zip(NAMES, logs, strict=True)}
        extra.append(Row(step=first + 20 * i, values=values | {"monitor/overhead": 0.01}))
    return told_of(Interrupted, run_of_rows(20 * len(looks) + 64, extra=extra, first=first))


@pytest.mark.parametrize("first", [0, 5000])
def test_gradients_that_are_zero_once_are_said_when_they_are_back(first: int) -> None:
    (alert,) = told(*[SOUND] * USUAL, gone(), *[SOUND] * 3, first=first)
    assert (alert.kind, alert.severity, alert.cause) == ("interrupted", "critical", Cause.NON_FINITE)
    assert alert.where == NAMES
    assert alert.step == first + 20 * (USUAL + 1)


def test_three_sound_looks_come_before_and_several_tensors_are_at_fault() -> None:
    assert told(*[SOUND] * (USUAL - 1), gone(), *[SOUND] * 3) == []
    assert told(*[SOUND] * USUAL, gone(MANY - 1), *[SOUND] * 3) == []
    (alert,) = told(*[SOUND] * USUAL, gone(MANY), *[SOUND] * 3)
    assert alert.where == NAMES[:MANY]


def test_what_stays_silent_has_died_even_if_it_comes_back_much_later() -> None:
    assert told(*[SOUND] * USUAL, *[gone()] * 6) == []
    assert told(*[SOUND] * USUAL, *[gone()] * 2, *[SOUND] * 3) == []
    assert told(*[SOUND] * USUAL, *[gone()] * 6, *[SOUND] * 3) == []


def test_it_is_said_again_when_it_comes_again() -> None:
    assert len(told(*[SOUND] * USUAL, gone(), SOUND, SOUND, gone(), SOUND, SOUND)) == 2


@pytest.mark.parametrize(("dead", "alarm"), [(0.99 * SPARSE, True), (1.01 * SPARSE, False)])
def test_layers_with_silent_units_may_all_be_silent_on_a_batch(dead: float, alarm: bool) -> None:
    assert bool(told(*[SOUND] * USUAL, gone(), *[SOUND] * 3, dead=dead)) == alarm


@pytest.mark.parametrize("between", [(math.nan,) * 3, (math.inf,) * 3])
def test_gradients_that_are_not_finite_are_no_zeros(between: tuple[float, ...]) -> None:
    assert told(*[SOUND] * USUAL, between, *[SOUND] * 3) == []


@pytest.mark.parametrize("name", hostile(()))
def test_numbers_that_make_no_sense_raise_nothing(name: str) -> None:
    columns = ("grad/log_rms/a", "grad/log_rms/b", "units/dead_max", "units/dead/0", "monitor/overhead")
    assert told_of(Interrupted, hostile(columns)[name]) == []
