"""The loss against its start and its best."""

from __future__ import annotations

import numpy as np
import pytest

from dyntune.detect import LossLevel
from dyntune.monitor.alerts import Alert, Cause
from tests.detect.series import Array, alarms, falling, rows_of


def told(loss: Array, lr: Array | float = 0.1, norm: Array | None = None, *, pieces: int | None = None) -> list[Alert]:
    columns = {"train/loss": loss, "train/lr": np.broadcast_to(lr, loss.shape)}
    if norm is not None:
        columns["grad/norm"] = norm
    return alarms([LossLevel()], rows_of(columns, pieces=pieces))


@pytest.fixture
def healthy() -> Array:
    return falling(4000, np.random.default_rng(0))


def test_a_healthy_run_is_silent(healthy: Array) -> None:
    assert told(healthy) == []


@pytest.mark.parametrize("seed", range(20))
def test_scatter_of_single_rows_is_no_lost_progress(seed: int) -> None:
    """Batches of one: a factor of e up or down from step to step, and half of the loss to win."""
    assert told(falling(6000, np.random.default_rng(seed), start=2.3, end=1.1, noise=1.0)) == []


@pytest.mark.parametrize(("share", "severity"), [(0.1, None), (0.22, "warning"), (0.5, "critical"), (0.9, "critical")])
def test_lost_progress_is_said_once_with_its_onset(healthy: Array, share: float, severity: str | None) -> None:
    healthy[2000:] += share * 2.1
    found = told(healthy)
    assert [alert.severity for alert in found] == ([] if severity is None else [severity])
    for alert in found:
        assert alert.kind == "loss-rose"
        assert 2000 - 32 < (alert.since or 0) <= 2000
        assert 2000 + 96 < alert.step < 2000 + 160 + 32


def test_a_spike_of_sixty_steps_is_no_lost_progress(healthy: Array) -> None:
    healthy[2000:2060] = 2.2
    assert told(healthy) == []


@pytest.mark.parametrize(("factor", "alarm"), [(1.45, False), (1.6, True)])
def test_one_block_is_enough_half_above_the_start(healthy: Array, factor: float, alarm: bool) -> None:
    """A block of 32 steps, 2016 to 2047, at 1.5 times the start and what the scatter of the start adds."""
    healthy[2016:2048] = factor * min(healthy[0], float(np.median(healthy[:10])))
    found = told(healthy)
    assert [(alert.kind, alert.severity, alert.step, alert.since) for alert in found] == (
        [("diverged", "critical", 2047, 2016)] if alarm else []
    )


def test_new_data_that_is_being_learnt_is_no_critical_alarm(healthy: Array) -> None:
    """A curriculum switch: the loss jumps, and falls from there on."""
    switched = np.arange(4000) >= 2000
    healthy[switched] += 2.0 * np.exp(-np.arange(2000) / 100.0)
    assert [alert.severity for alert in told(healthy)] == ["warning"]
    healthy[switched] += 1.9 * (1.0 - np.exp(-np.arange(2000) / 100.0))
    assert [alert.severity for alert in told(healthy)] == ["critical"]


def test_after_recovery_it_is_said_again(healthy: Array) -> None:
    healthy[1500:2000] += 1.5
    healthy[3000:3500] += 1.5
    assert len(told(healthy)) == 2


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("rise", [0.0, 0.5, 2.0, 20.0])
def test_alarms_do_not_depend_on_the_unit_of_the_loss(healthy: Array, factor: float, rise: float) -> None:
    healthy[2000:] += rise
    plain, scaled = told(healthy), told(factor * healthy)
    assert [(a.kind, a.step, a.since, a.severity, a.causes) for a in scaled] == [
        (a.kind, a.step, a.since, a.severity, a.causes) for a in plain
    ]
    assert bool(plain) == (rise > 0.0)


@pytest.mark.parametrize("pieces", [1, 7, 32, 64, 1000])
def test_alarms_do_not_depend_on_how_rows_are_cut(healthy: Array, pieces: int) -> None:
    healthy[2000:2500] += 0.5
    healthy[3000:] = 9.0
    norm = np.exp(0.2 * np.random.default_rng(1).standard_normal(4000))
    assert told(healthy, norm=norm, pieces=pieces) == told(healthy, norm=norm)
    assert told(healthy, norm=norm)


def test_a_raised_learning_rate_is_the_cause_and_one_that_returns_is_not(healthy: Array) -> None:
    healthy[2000:] += 1.5
    raised = np.where(np.arange(4000) >= 2000, 1.0, 0.1)
    (alert,) = told(healthy, raised)
    assert alert.cause is Cause.LR_TOO_HIGH
    assert alert.recommender == "dyntune.suggest_lr"
    assert alert.evidence["raised"] == pytest.approx(10.0)
    restarted = np.where((np.arange(4000) >= 1000) & (np.arange(4000) < 2000), 0.001, 0.1)
    (alert,) = told(healthy, restarted)
    assert "raised" not in alert.evidence


def test_above_the_start_is_critical_even_without_progress_before() -> None:
    rng = np.random.default_rng(2)
    loss = 2.3 * np.exp(np.maximum(0.0, np.arange(1000) - 200) / 200) * np.exp(0.05 * rng.standard_normal(1000))
    (alert,) = told(loss)
    assert (alert.kind, alert.severity) == ("diverged", "critical")
    assert alert.step < 500


def test_no_progress_is_a_warning_without_a_mechanism() -> None:
    loss = 2.3 + 0.02 * np.random.default_rng(3).standard_normal(2000)
    (alert,) = told(loss)
    assert (alert.kind, alert.severity, alert.step) == ("no-progress", "warning", 511)


def test_no_progress_is_critical_where_a_rate_that_has_decayed_explains_it() -> None:
    loss = 2.3 + 0.02 * np.random.default_rng(3).standard_normal(2000)
    found = told(loss, np.exp(-np.arange(2000) / 100.0))
    assert [(alert.kind, alert.severity, alert.cause) for alert in found] == [
        ("no-progress", "critical", Cause.LR_TOO_LOW)
    ]


def test_no_progress_waits_for_the_end_of_warm_up() -> None:
    loss = 2.3 + 0.02 * np.random.default_rng(3).standard_normal(2000)
    (alert,) = told(loss, np.minimum(np.arange(1, 2001) / 1000, 1.0))
    assert 990 + 480 <= alert.step < 1000 + 600  # within 1% of its end it has settled


def test_slow_but_steady_progress_is_none() -> None:
    rng = np.random.default_rng(4)
    loss = 2.3 * (1.0 - 1.5e-4 * np.arange(4000)).clip(0.3) + 0.02 * rng.standard_normal(4000)
    assert told(loss) == []


def test_a_loss_that_may_be_negative() -> None:
    rng = np.random.default_rng(5)
    loss = -3.0 * (1.0 - np.exp(-np.arange(3000) / 200.0)) + 0.1 * rng.standard_normal(3000)
    assert told(loss) == []
    loss[1500:] += 2.0
    assert [alert.severity for alert in told(loss)] == ["critical"]
