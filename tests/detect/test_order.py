"""Batches that come again, or resemble their neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from dyntune.detect.order import ALIKE, LONGEST, SHORTEST, WILD, WINDOW, DataOrder, repetition
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row
from tests.detect.series import Array, hostile, run_of_rows, told_of

N = 640


def told(loss: Array, extra: tuple[Row, ...] = (), *, first: int = 0) -> list[Alert]:
    return told_of(DataOrder, run_of_rows(loss.size, {"train/loss": loss, "train/lr": 0.1}, extra, first=first))


def periodic(period: int, *, noise: float = 0.01, count: int = N, scale: float = 0.2, seed: int = 0) -> Array:
    """The same batches again and again, each with a loss of its own, and noise."""
    rng = np.random.default_rng(seed)
    own = np.resize(rng.standard_normal(period), count)
    return np.asarray(np.exp(scale * own + noise * rng.standard_normal(count)))


def independent(seed: int = 0, *, scale: float = 0.2) -> Array:
    return np.asarray(np.exp(scale * np.random.default_rng(seed).standard_normal(N)))


@pytest.mark.parametrize("period", [5, 13, 40, LONGEST])
def test_repetition_is_the_period(period: int) -> None:
    found, correlation, _, next_one = repetition(np.log(periodic(period)[:WINDOW]))
    assert found == period
    assert correlation > 0.95  # noise is a twentieth of the scatter: 1 - 1/400, and batches that begin the window
    assert next_one < 0.0


def test_correlations_are_those_of_their_definition() -> None:
    """No change is beyond the clipping."""
    logs = 0.01 * np.sin(np.arange(WINDOW)) + 0.001 * np.random.default_rng(0).random(WINDOW)
    changes = np.diff(logs)
    changes -= changes.mean()
    direct = [
        changes[lag:] @ changes[:-lag] / (changes.size - lag) / (changes @ changes / changes.size)
        for lag in range(1, LONGEST + 1)
    ]
    period, correlation, elsewhere, next_one = repetition(logs)
    # Sums of 192 rounded products.
    assert next_one == pytest.approx(direct[0], abs=1e-12)
    assert correlation == pytest.approx(direct[period - 1], abs=1e-12)
    assert elsewhere == pytest.approx(np.sort(np.abs(direct[SHORTEST - 1 :]))[(LONGEST - SHORTEST + 1) // 2], abs=1e-12)


def test_a_constant_series_repeats_nothing() -> None:
    assert repetition(np.zeros(WINDOW)) == (0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("first", [0, 5000])
@pytest.mark.parametrize("period", [5, 13, LONGEST])
def test_a_loader_that_deals_the_same_batches_is_said_once(period: int, first: int) -> None:
    (alert,) = told(periodic(period), first=first)
    assert (alert.kind, alert.severity, alert.cause) == ("data-repeats", "critical", Cause.DATA_ORDER)
    assert alert.evidence["period"] == period
    assert (alert.since, alert.step) == (first, first + WINDOW + 4 * 32 - 1)


def test_three_windows_are_needed() -> None:
    assert told(periodic(13, count=WINDOW + 4 * 32 - 1)) == []
    assert len(told(periodic(13, count=WINDOW + 4 * 32))) == 1


@pytest.mark.parametrize(("noise", "alarm"), [(0.05, True), (0.3, False)])
def test_noise_hides_the_period(noise: float, alarm: bool) -> None:
    """The correlation is 1 / (1 + (noise / scale)^2): 0.94, and 0.31."""
    assert bool(told(periodic(13, noise=noise))) == alarm


@pytest.mark.parametrize("period", [2, LONGEST + 6])
def test_other_periods_are_not_asked_about(period: int) -> None:
    assert [alert for alert in told(periodic(period)) if alert.evidence.get("period") == period] == []


@pytest.mark.parametrize("seed", range(10))
def test_independent_batches_are_silent(seed: int) -> None:
    assert told(independent(seed)) == []


def test_a_new_learning_rate_begins_anew() -> None:
    loss = periodic(13, count=N)
    lr = np.where(np.arange(N) // 256 % 2 == 0, 0.1, 0.3)
    assert told_of(DataOrder, run_of_rows(N, {"train/loss": loss, "train/lr": lr})) == []


def burst(correlation: float, low: float, step: int = 300) -> Row:
    return Row(step=step, values={"grad/autocorr_raw_lag1": correlation, "grad/autocorr_raw_lag1.low": low})


@pytest.mark.parametrize(("low", "alarm"), [(0.99 * ALIKE, False), (1.01 * ALIKE, True)])
def test_gradients_of_neighbours_that_are_alike_are_said_once(low: float, alarm: bool) -> None:
    found = told(independent(), (burst(0.8, low), burst(0.8, low, 400)))
    assert [(alert.kind, alert.step, alert.cause) for alert in found] == (
        [("data-alike", 300, Cause.DATA_ORDER)] if alarm else []
    )


def test_gradients_that_are_the_one_before_add_up() -> None:
    (alert,) = told(independent(), (burst(0.97, 0.9),))
    assert alert.cause is Cause.ACCUMULATED_GRADIENTS


def test_a_smooth_loss_has_correlated_gradients_by_right() -> None:
    """The median of the absolute difference of two normal numbers is 0.954 standard deviations."""
    calm, wild = 0.8 * WILD / 0.954, 1.25 * WILD / 0.954
    assert told(independent(scale=calm), (burst(0.8, 0.7),)) == []
    assert len(told(independent(scale=wild), (burst(0.8, 0.7),))) == 1


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9, 0.99])
def test_losses_that_follow_from_the_ones_before_are_no_alarm(alike: float) -> None:
    """AR(1), as losses of a stream are by right."""
    rng = np.random.default_rng(0)
    logs = np.zeros(2 * N)
    for i in range(1, logs.size):
        logs[i] = alike * logs[i - 1] + 0.2 * rng.standard_normal()
    assert told(np.exp(logs)) == []


@pytest.mark.parametrize("name", hostile(()))
def test_numbers_that_make_no_sense_raise_nothing(name: str) -> None:
    columns = ("grad/autocorr_raw_lag1", "grad/autocorr_raw_lag1.low", "train/lr", "monitor/overhead")
    assert told_of(DataOrder, hostile(columns)[name]) == []
