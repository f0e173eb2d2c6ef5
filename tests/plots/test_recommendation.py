"""What the figure of a recommendation shows."""

from __future__ import annotations

import dataclasses
import math

import pytest
from matplotlib.figure import Figure

from dyntune import Status
from dyntune.plots import plot_recommendation
from dyntune.plots.recommendation import recommendation_data
from tests.plots.records import HOSTILE, SWEEP, recommendation


def test_rows_are_the_choice_the_limit_and_what_has_its_unit_in_ascending_order():
    data = recommendation_data(recommendation())
    assert [(mark.name, mark.role) for mark in data.marks] == [
        ("suggested", "value"),
        ("stable up to", "limit"),
        ("early limit", "evidence"),
        ("stochastic threshold", "evidence"),
    ]
    assert [mark.value for mark in data.marks] == [3e-3, 2e-2, 2e-3, 6e-3]


def test_curves_are_sorted_and_hold_what_blew_up_as_nan():
    record = recommendation()
    data = recommendation_data(dataclasses.replace(record, series=dict(record.series) | SWEEP))
    curves = {curve.kind: curve for curve in data.curves}
    assert list(curves) == ["ramp", "run", "sweep"]
    assert curves["run"].x == (1e-4, 1e-3, 1e-2, 5e-2)
    assert math.isnan(curves["run"].y[-1])
    assert curves["sweep"].x == (1e-4, 1e-3, 1e-2)
    assert curves["sweep"].y[:2] == (1.9, 0.8)


def test_ranges_hold_every_value_and_every_finite_loss_up_to_the_start():
    data = recommendation_data(recommendation())
    low, high = data.x_range
    assert low < 1e-5
    assert high > 1e-1
    assert data.y_range is not None
    assert data.y_range[0] < 1.1
    assert 2.3 < data.y_range[1] < 3.0


def test_a_blown_up_loss_does_not_stretch_the_axis():
    series = {"ramp_lr": (1e-3, 1e-2, 1e-1), "ramp_loss": (2.0, 1.0, 1e9)}
    data = recommendation_data(recommendation(series=series))
    assert data.y_range is not None
    assert data.y_range[1] < 3.0


def test_the_title_says_value_range_and_doubt():
    assert recommendation_data(recommendation()).title == "Learning rate 3e-3 (1e-3 .. 9e-3)"
    doubtful = recommendation(status=Status.ONE_BATCH, reason="one")
    assert recommendation_data(doubtful).title.endswith(": one batch")


def test_refused_shows_the_reason_and_what_evidence_there_is():
    refused = recommendation(
        value=None, low=0.0, high=math.inf, status=Status.REFUSED, reason="all of them blew up", max_stable=None
    )
    data = recommendation_data(refused)
    assert "all of them blew up" in data.title
    assert {mark.role for mark in data.marks} == {"evidence"}
    plot_recommendation(refused).get_figure(root=True).draw_without_rendering()


@pytest.mark.parametrize(
    "changed",
    [
        {"series": {}},
        {"series": {}, "evidence": {}, "max_stable": None},
        {"series": {}, "evidence": {}, "max_stable": None, "value": None, "low": -math.inf, "high": math.inf},
        {"series": {"ramp_lr": (1e-3,), "ramp_loss": (2.0,)}},
        {"series": {"ramp_lr": (1e-3, 1e-2), "ramp_loss": (math.nan, math.inf)}},
        {"series": {"run_lr": (), "run_loss": (), "failed_lr": (0.1,)}},
        {"series": {"sweep_lr": (1e-3, 1e-2), "sweep_loss": (2.0, 2.0)}},
        {"series": {"ramp_lr": (1e-3, 1e-2), "ramp_loss": (-2.0, -3.0)}},
        {"series": {"ramp_lr": (1e-3, 1e-2), "ramp_loss": (math.nan, 3.0)}},
        {"low": 0.0, "high": math.inf},
    ],
    ids=str,
)
def test_draws_whatever_is_missing(changed):
    plot_recommendation(recommendation(**changed)).get_figure(root=True).draw_without_rendering()


def test_names_that_are_no_mathematics_are_drawn_as_they_are():
    record = recommendation(evidence={HOSTILE: recommendation().max_stable})
    axes = plot_recommendation(dataclasses.replace(record, max_stable=None))
    axes.get_figure(root=True).draw_without_rendering()
    assert any("<script>" in text.get_text() for text in axes.get_yticklabels())


def test_draws_on_given_axes():
    axes = Figure().add_subplot()
    assert recommendation().plot(ax=axes) is axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "learning rate"


def test_names_every_row_beside_it():
    axes = plot_recommendation(recommendation())
    ticks = {text.get_text() for text in axes.get_yticklabels()}
    assert {"suggested 3e-3", "stable up to 0.02", "early limit 2e-3", "stochastic threshold 6e-3"} <= ticks
