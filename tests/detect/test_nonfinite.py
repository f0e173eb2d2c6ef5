"""Numbers that are not finite, and where they came from."""

from __future__ import annotations

import math

import pytest

from dyntune.detect import Diverging, NonFinite
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row, Rows

NAN = math.nan


def told(*rows: Row) -> list[Alert]:
    return list(NonFinite().update(Rows.of(rows)))


def step(number: int, **values: float | None) -> Row:
    names = {"loss": "train/loss", "norm": "grad/norm"}
    return Row(step=number, values={names[name]: value for name, value in values.items()})


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_it_is_said_once_and_again_after_recovery(value: float) -> None:
    losses = [1.0, value, value, 1.0, value]
    found = told(*(step(i, loss=x) for i, x in enumerate(losses)))
    assert [alert.step for alert in found] == [1, 4]
    assert all(alert.cause is Cause.NON_FINITE and alert.severity == "critical" for alert in found)


def test_a_refused_value_is_none() -> None:
    assert told(step(0, loss=None, norm=None), step(1, loss=1.0)) == []


def test_a_finite_loss_with_a_gradient_that_is_not_points_backwards() -> None:
    (alert,) = told(step(0, loss=0.5, norm=NAN))
    assert alert.text == "the length of the gradient is nan while the loss is 0.5."
    assert "derivative" in alert.advice


def test_the_first_layer_is_named_when_a_look_shows_it() -> None:
    look = {"activation/log_rms/0": 0.1, "activation/log_rms/1": NAN, "activation/log_rms/2": NAN}
    gradients = {"grad/log_rms/0.weight": NAN, "grad/log_rms/2.weight": NAN}
    found = told(step(3, loss=NAN), Row(step=9, values=look | gradients), Row(step=12, values=look))
    assert [(alert.step, alert.where, alert.since) for alert in found] == [(3, (), None), (9, ("1",), 3)]
    (_, named) = told(step(3, norm=NAN), Row(step=3, values=gradients | {"grad/log_rms/3.bias": 0.0}))
    assert named.where == ("2.weight",)


def test_a_gradient_of_zero_has_a_logarithm_of_minus_infinity_and_is_finite() -> None:
    found = told(step(3, loss=NAN), Row(step=4, values={"grad/log_rms/0.weight": -math.inf}))
    assert len(found) == 1


@pytest.mark.parametrize("pieces", [1, 2, 3, 100])
def test_growth_before_it_is_seen_however_rows_are_cut(pieces: int) -> None:
    """Rows without a loss, such as those of measurements, come first and in between."""
    rows = [Row(step=0, values={"grad/norm": 1.0}), step(0, loss=1.0), step(1, loss=3.5)]
    rows += [Row(step=1, values={"grad/norm": 1.0}), step(2, loss=NAN)]
    detector = NonFinite()
    found = [a for at in range(0, len(rows), pieces) for a in detector.update(Rows.of(rows[at : at + pieces]))]
    assert [(alert.step, alert.cause) for alert in found] == [(2, Cause.LR_TOO_HIGH)]


def test_diverging_is_said_for_as_long_as_it_lasts() -> None:
    regimes = ["edge", "diverging", "diverging", "stationary", "diverging"]
    rows = Rows.of(
        Row(step=i, values={"grad/amplitude": 1.2}, labels={"regime": name, "regime_reason": "it grows"})
        for i, name in enumerate(regimes)
    )
    found = list(Diverging().update(rows))
    assert [alert.step for alert in found] == [1, 4]
    assert found[0].cause is Cause.LR_TOO_HIGH
    assert found[0].evidence == {"grad/amplitude": 1.2}
