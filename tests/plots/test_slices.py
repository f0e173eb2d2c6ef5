"""What the figure of a loss along a line shows."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from dyntune import LossSlice
from dyntune.plots import plot_slice
from dyntune.plots.slices import slice_data
from dyntune.plots.svg import to_svg
from tests.plots.records import HOSTILE


def parabola(**changed: object) -> LossSlice:
    """1 + t^2 / 2, measured and predicted, but for a bump at the right."""
    t = np.linspace(-1, 1, 9)
    losses = 1 + t**2 / 2
    losses[-1] = 3.0
    fields = {
        "kind": "direction",
        "direction": "somewhere",
        "distances": t,
        "losses": losses,
        "loss": 1.0,
        "slope": 0.0,
        "curvature": 1.0,
        "length": 1.0,
        "unit": "distance in the parameters",
        "rounding": 1e-15,
        "num_products": 1,
        "record": {},
    }
    return LossSlice(**(fields | changed))


def path(**changed: object) -> LossSlice:
    t = np.linspace(0, 1, 5)
    return parabola(kind="path", distances=t, losses=1 + t * (1 - t), slope=None, curvature=None, **changed)


def words(axes) -> str:
    axes.get_figure(root=True).draw_without_rendering()
    return " ".join(text.get_text() for text in axes.texts)


def test_the_prediction_and_how_far_it_holds_are_shown():
    data = slice_data(parabola())
    np.testing.assert_allclose(data.predicted, 1 + data.fine**2 / 2, rtol=1e-15)
    assert data.reach == 0.75
    assert "up to |t| = 0.75" in data.title
    assert "somewhere" in data.xlabel
    assert "quadratic" in words(plot_slice(parabola()))


def test_the_title_says_where_the_model_holds_everywhere_or_nowhere():
    t = np.linspace(-1, 1, 9)
    assert "everywhere" in slice_data(parabola(losses=1 + t**2 / 2)).title
    assert "does not reach" in slice_data(parabola(losses=1 + 3 * t**2 * (t != 0))).title


def test_losses_that_are_not_finite_are_crosses_and_do_not_stretch_the_axis():
    t = np.linspace(-1, 1, 9)
    losses = 1 + t**2 / 2
    losses[0], losses[1] = math.nan, math.inf
    data = slice_data(parabola(losses=losses))
    assert data.spoiled.tolist() == [-1.0, -0.75]
    assert np.isnan(data.losses).sum() == 2
    assert data.y_range[1] < 2.0
    assert "not finite" in words(plot_slice(parabola(losses=losses)))


def test_every_finite_loss_lies_within_the_range_and_a_steep_prediction_is_cut():
    data = slice_data(parabola(curvature=1e6))
    assert data.y_range[0] < 1.0
    assert 3.0 < data.y_range[1] < 5.0
    assert "quadratic" in words(plot_slice(parabola(curvature=1e6)))


def test_a_path_names_its_ends_and_its_barrier():
    data = slice_data(path())
    assert data.ends == ((0.0, "start"), (1.0, "end"))
    assert data.title == "Between the two: a barrier of 0.25"
    assert data.fine.size == 0
    shown = words(plot_slice(path()))
    assert "start" in shown
    assert "quadratic" not in shown
    assert "no barrier" in slice_data(dataclasses.replace(path(), losses=np.ones(5))).title
    spoiled = np.array([1, math.nan, 1, 1, 1])
    assert "not finite" in slice_data(dataclasses.replace(path(), losses=spoiled)).title


@pytest.mark.parametrize("losses", [np.full(9, 2.0), np.full(9, math.nan), np.zeros(9)], ids=["flat", "nan", "zero"])
def test_flat_and_empty_slices_are_drawn(losses):
    axes = Figure().add_subplot()
    found = parabola(losses=losses, loss=float(losses[0]), curvature=0.0)
    assert found.plot(ax=axes) is axes
    words(axes)


def test_hostile_names_stay_text():
    axes = plot_slice(parabola(direction=HOSTILE, unit=HOSTILE))
    assert "<script" not in to_svg(axes.get_figure(root=True), name="slice", description=HOSTILE)
