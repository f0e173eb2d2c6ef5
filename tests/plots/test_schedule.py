"""What the figure of a schedule shows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from dyntune import Schedule, Status
from dyntune.plots import plot_schedule
from dyntune.plots.schedule import schedule_data
from dyntune.plots.svg import to_svg
from tests.plots.records import HOSTILE, recommendation


def schedule(**options: object) -> Schedule:
    changed = options.pop("changed", {})
    return Schedule.of(recommendation(**changed), **({"num_steps": 1000} | options))


def refused(reason: str = "all of them blew up") -> Schedule:
    changed = {
        "value": None,
        "low": 0.0,
        "high": math.inf,
        "status": Status.REFUSED,
        "reason": reason,
        "max_stable": None,
    }
    return schedule(changed=changed)


def words(axes) -> list[str]:
    axes.get_figure(root=True).draw_without_rendering()
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("num_steps", [1, 2, 30, 1000, 1_000_003])
def test_the_curve_is_the_schedules_rates_with_its_corners(shape, num_steps):
    found = schedule(schedule=shape, num_steps=num_steps)
    data = schedule_data(found)
    assert data.rates == tuple(found.rate(t) for t in data.steps)
    assert (data.steps[0], data.steps[-1]) == (0, num_steps - 1)
    assert found.warmup_steps in data.steps
    assert max(data.rates) == found.peak
    assert len(data.steps) <= 304
    if shape != "cosine":  # straight in between: nothing is lost
        every = np.arange(0, num_steps, max(1, num_steps // 997))
        drawn = np.interp(every, data.steps, data.rates)
        # Interpolating between numbers below the peak: a few roundings of it.
        np.testing.assert_allclose(drawn, [found.rate(int(t)) for t in every], rtol=0, atol=4 * 2.0**-52 * found.peak)


def test_phases_are_named_where_there_is_room():
    assert schedule_data(schedule(schedule="wsd")).phases == (
        (0, 20, "warm-up"),
        (20, 800, "stable"),
        (800, 999, "decay"),
    )
    assert schedule_data(schedule()).phases == ((0, 20, "warm-up"), (20, 999, "decay"))
    assert words(plot_schedule(schedule(schedule="wsd"))) == ["stable", "decay"]
    assert words(plot_schedule(schedule(num_steps=60))) == ["warm-up", "decay"]
    assert words(plot_schedule(schedule(schedule="constant", warmup_steps=0))) == ["constant"]


def test_the_title_says_the_schedule_and_its_doubt():
    assert (
        schedule_data(schedule()).title
        == "Learning rate up to 3e-3 after 20 steps of warm-up, cosine to 0 over 1000 steps"
    )
    doubtful = schedule(changed={"status": Status.ONE_BATCH, "reason": "one"})
    assert schedule_data(doubtful).title.endswith(": one batch")


def test_refused_shows_the_reason_and_no_rates():
    data = schedule_data(refused())
    assert (data.steps, data.rates, data.phases) == ((), (), ())
    axes = plot_schedule(refused())
    assert words(axes) == []
    assert "all of them blew up" in axes.get_title(loc="left")
    assert axes.lines[:] == []
    assert list(axes.get_yticks()) == []


def test_the_axes_hold_every_step_and_rate():
    axes = Figure().add_subplot()
    assert schedule().plot(ax=axes) is axes
    assert axes.get_xlim() == (0.0, 1000.0)
    assert axes.get_ylim()[0] == 0.0
    assert axes.get_ylim()[1] > 3e-3
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "learning rate")


def test_hostile_reasons_stay_text():
    figure = plot_schedule(refused(HOSTILE)).get_figure(root=True)
    assert "<script" not in to_svg(figure, name="schedule", description=HOSTILE)
