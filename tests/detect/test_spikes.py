"""Single steps that stand out."""

from __future__ import annotations

import numpy as np
import pytest

from dyntune.detect import LossSpike, Watch
from dyntune.detect.course import Course
from dyntune.detect.experimental import GradientSpike
from dyntune.monitor.alerts import Alert, Cause
from tests.detect.series import Array, alarms, falling, rows_of

N = 4000


@pytest.fixture
def run() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "train/loss": falling(N, rng),
        "grad/norm": np.exp(0.2 * rng.standard_normal(N)),
        "train/lr": np.full(N, 0.1),
    }


def told(run: dict[str, Array], *, pieces: int | None = None) -> list[Alert]:
    course = Course()
    return alarms([LossSpike(course), GradientSpike(course)], rows_of(run, pieces=pieces))


def test_a_healthy_run_is_silent(run: dict[str, Array]) -> None:
    assert told(run) == []


def test_a_spike_of_loss_and_gradient_points_to_the_batch(run: dict[str, Array]) -> None:
    run["train/loss"][3000] *= 10.0
    run["grad/norm"][3000] *= 100.0
    loss, gradient = told(run)
    assert (loss.kind, gradient.kind, loss.step, gradient.step) == ("loss-spike", "gradient-spike", 3000, 3000)
    assert loss.severity == gradient.severity == "warning"
    assert loss.cause is Cause.BAD_BATCH
    assert "set by this run's healthy steps" in loss.text


def test_a_gradient_that_jumps_some_steps_before_points_to_the_step(run: dict[str, Array]) -> None:
    run["train/loss"][3000:3003] *= 10.0
    run["grad/norm"][2995] *= 100.0
    (loss,) = (alert for alert in told(run) if alert.kind == "loss-spike")
    assert loss.cause is Cause.STALE_SECOND_MOMENT


def test_early_on_the_threshold_is_said_to_be_the_prior(run: dict[str, Array]) -> None:
    run["grad/norm"][500] *= 1e3
    (alert,) = told(run)
    assert "too few healthy steps" in alert.text


def test_a_large_factor_of_a_tiny_loss_is_no_spike(run: dict[str, Array]) -> None:
    run["train/loss"] = (
        2.3
        * np.exp(-np.minimum(np.arange(N) / 100.0, 15.0))
        * np.exp(0.1 * np.random.default_rng(1).standard_normal(N))
    )
    run["train/loss"][3000] *= 1e4
    assert told(run) == []


def test_several_spikes_of_one_trouble_are_one_alarm(run: dict[str, Array]) -> None:
    run["grad/norm"][3000:3200:10] *= 100.0
    run["grad/norm"][3700] *= 100.0
    assert [alert.step for alert in told(run)] == [3000, 3700]


def test_spikes_do_not_raise_the_threshold_of_those_to_come(run: dict[str, Array]) -> None:
    run["grad/norm"][1500::300] *= 30.0
    assert len(told(run)) == len(range(1500, N - N % 32, 300))


def test_a_cluster_of_spikes_does_not_move_the_level(run: dict[str, Array]) -> None:
    """Fourteen points of each of three blocks in a row, at other places: 42 of the 64 that the level is over."""
    for block in (94, 95, 96):
        run["grad/norm"][32 * block : 32 * block + 14] *= 100.0
    levels = [seen.norm.level for rows in rows_of(run) for seen in Watch().take(rows)]
    # A median of 64 numbers that scatter by 0.2 has a standard deviation of 0.03: four of them.
    assert levels[97] == pytest.approx(1.0, abs=0.13)


@pytest.mark.parametrize("factor", [1e-6, 1e3])
def test_alarms_do_not_depend_on_units(run: dict[str, Array], factor: float) -> None:
    run["train/loss"][[1000, 3000]] *= 12.0
    run["grad/norm"][2000] *= 50.0
    plain = [(alert.kind, alert.step) for alert in told(run)]
    assert len(plain) == 3
    scaled = {"train/loss": factor * run["train/loss"], "grad/norm": factor * run["grad/norm"]}
    assert [(alert.kind, alert.step) for alert in told(run | scaled)] == plain


@pytest.mark.parametrize("pieces", [1, 10, 64, 999])
def test_alarms_do_not_depend_on_how_rows_are_cut(run: dict[str, Array], pieces: int) -> None:
    run["train/loss"][[1000, 3000]] *= 12.0
    assert sorted(map(str, told(run, pieces=pieces))) == sorted(map(str, told(run)))


def test_a_step_of_the_schedule_is_no_spike(run: dict[str, Array]) -> None:
    """A restart: the learning rate goes up thirtyfold, and loss and gradient with it, for good."""
    late = np.arange(N) >= 2500
    run["train/lr"][late] *= 30.0
    run["train/loss"][late] *= 6.0
    run["grad/norm"][late] *= 20.0
    assert told(run) == []
    run["train/lr"][:] = 0.1
    assert {alert.kind for alert in told(run)} == {"loss-spike", "gradient-spike"}


def test_gradient_norms_of_every_sixth_step_are_enough(run: dict[str, Array]) -> None:
    run["grad/norm"][np.arange(N) % 6 > 0] = np.nan
    run["grad/norm"][3000] *= 100.0
    assert [(alert.kind, alert.step) for alert in told(run)] == [("gradient-spike", 3000)]
