"""What the figure of a run's column shows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from dyntune.errors import InvalidArgumentError
from dyntune.monitor.run import Column, Row, Run
from dyntune.plots import plot_run
from dyntune.plots.run import run_data
from dyntune.plots.svg import to_svg
from tests.plots.records import HOSTILE


def row(step: int, value: float | None, *, half: float = 0.5, limit: float | None = None, **more: object) -> Row:
    values = {"loss": 1.0, "lambda_max": value}
    if value is not None:
        values |= {"lambda_max.low": value - half, "lambda_max.high": value + half}
    if limit is not None:
        values["lambda_max.limit"] = limit
    return Row(step=step, values=values, **more)


def run(*rows: Row) -> Run:
    return Run(rows=rows, columns={"lambda_max": Column(name="lambda_max", unit="loss / parameter^2")})


def words(axes) -> str:
    axes.get_figure(root=True).draw_without_rendering()
    return " ".join(text.get_text() for text in axes.texts)


def test_the_first_measured_column_is_shown_over_ascending_steps():
    data = run_data(run(row(20, 3.0), row(10, 2.0)))
    assert data.name == "lambda_max"
    assert data.steps.tolist() == [10, 20]
    assert data.values.tolist() == [2.0, 3.0]
    assert data.low.tolist() == [1.5, 2.5]
    assert data.high.tolist() == [2.5, 3.5]
    assert data.ylabel == "λ max (loss / parameter²)"
    assert data.title == "λ max 3 at step 20"
    assert run_data(run(row(20, 3.0)), "loss").ylabel == "loss"


def test_the_stability_ratio_of_a_monitored_run_is_shown_first():
    values = {"train/loss": 1.0, "grad/norm": 3.0, "stability/lr_ratio": 0.5}
    data = run_data(Run(rows=(Row(step=0, values=values),)))
    assert data.title == "stability ratio (deterministic) 0.5 at step 0"
    only = {"train/loss": 1.0}
    assert run_data(Run(rows=(Row(step=0, values=only),))).name == "train/loss"


def test_steps_without_a_value_are_crosses_and_break_the_line():
    found = run(row(0, 1.0), row(1, None), row(2, math.inf), row(3, 2.0))
    data = run_data(found)
    assert data.missing.tolist() == [1, 2]
    axes = plot_run(found)
    assert "not established" in words(axes)
    line = axes.lines[0]
    assert np.isnan(np.asarray(line.get_ydata(), dtype=float)).tolist() == [False, True, True, False]


def test_uncertain_values_are_open_circles():
    found = run(row(0, 1.0), row(1, 2.0, status={"lambda_max": ("NOT_CONVERGED", "budget")}))
    assert run_data(found).uncertain.tolist() == [False, True]
    assert [len(line.get_xdata()) for line in plot_run(found).lines[1:3]] == [1, 1]


def test_the_limit_is_a_line_with_the_share_in_the_title():
    found = run(row(0, 1.0, limit=2.0), row(1, 1.5, limit=2.0))
    data = run_data(found)
    assert data.limit.tolist() == [2.0, 2.0]
    assert data.title == "λ max 1.5 at step 1, 0.75 of its limit"
    assert data.y_range[1] > 2.0
    assert "stability" in words(plot_run(found))


@pytest.mark.parametrize(("limit", "where"), [(1e6, "above"), (-1e6, "below")])
def test_a_limit_far_off_is_said_and_does_not_stretch_the_axis(limit, where):
    found = run(row(0, 1.0, limit=limit), row(1, 2.0, limit=limit))
    assert run_data(found).y_range[1] < 10
    assert where in words(plot_run(found))


def test_an_unbounded_interval_does_not_stretch_the_axis():
    found = run(row(0, 1.0, half=math.inf), row(1, 2.0))
    data = run_data(found)
    assert data.high[0] == math.inf
    assert data.y_range[1] < 4
    words(plot_run(found))


@pytest.mark.parametrize("rows", [[row(3, 2.0)], [row(3, None)], [row(3, 0.0, half=0.0), row(4, 0.0, half=0.0)]])
def test_little_to_show_is_drawn(rows):
    axes = Figure().add_subplot()
    assert run(*rows).plot(ax=axes) is axes
    words(axes)


def test_what_is_not_there_is_refused():
    with pytest.raises(InvalidArgumentError, match="'sharpness'"):
        plot_run(run(row(0, 1.0)), "sharpness")
    with pytest.raises(InvalidArgumentError, match="no columns"):
        plot_run(Run(rows=()))


def test_hostile_names_stay_text():
    found = Run(rows=(Row(step=0, values={HOSTILE: 1.0}),), columns={HOSTILE: Column(name=HOSTILE, unit=HOSTILE)})
    assert "<script" not in to_svg(plot_run(found).get_figure(root=True), name="run", description=HOSTILE)
