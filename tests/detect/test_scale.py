"""A loss of the wrong size."""

from __future__ import annotations

import math

import pytest

from dyntune.detect.scale import EARLY, FACTOR, SAFE, LossScale
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row
from tests.detect.series import hostile, run_of_rows, told_of

ENTROPY = 2.3


def told(loss: float, entropy: float = ENTROPY, *, step: int = 40, first: int = 0, adam: bool = False) -> list[Alert]:
    looks = [
        Row(step=first + at, values={"logits/max_abs": 1.0, "logits/entropy": entropy}) for at in (step, step + 90)
    ]
    settings = Row(step=first + 2, values={"optimizer/beta2": 0.99} if adam else {"optimizer/momentum": 0.9})
    return told_of(LossScale, run_of_rows(320, {"train/loss": loss}, [settings, *looks], first=first))


@pytest.mark.parametrize(
    ("factor", "alarm"),
    [(0.99 * FACTOR, False), (1.01 * FACTOR, True), (1.01 / FACTOR, False), (0.99 / FACTOR, True)],
)
@pytest.mark.parametrize("first", [0, 5000])
def test_the_loss_is_about_the_entropy_of_the_answers(factor: float, alarm: bool, first: int) -> None:
    found = told(factor * ENTROPY, first=first)
    assert [(alert.kind, alert.severity, alert.step) for alert in found] == (
        [("loss-scale", "critical", first + 63)] if alarm else []
    )
    for alert in found:
        assert alert.cause is Cause.LOSS_SCALE
        assert alert.where == ()


def test_adam_does_not_notice_so_it_is_a_warning() -> None:
    (alert,) = told(10.0 * ENTROPY, adam=True)
    assert alert.severity == "warning"


def test_a_late_look_says_nothing() -> None:
    assert len(told(10.0 * ENTROPY, step=EARLY)) == 1
    assert told(10.0 * ENTROPY, step=EARLY + 1) == []


def test_sure_answers_say_nothing() -> None:
    assert len(told(10.0, 1.01 * SAFE)) == 1
    assert told(10.0, 0.99 * SAFE) == []


@pytest.mark.parametrize("entropy", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("loss", [-5.0, 0.0, 1e9])
def test_an_entropy_that_is_none_says_nothing(entropy: float, loss: float) -> None:
    assert told(loss, entropy) == []


def test_a_negative_loss_is_no_cross_entropy() -> None:
    assert told(-10.0) == []


@pytest.mark.parametrize("name", hostile(()))
def test_numbers_that_make_no_sense_raise_nothing(name: str) -> None:
    assert told_of(LossScale, hostile(("logits/entropy", "logits/max_abs", "monitor/overhead"))[name]) == []
