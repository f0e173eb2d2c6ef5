"""What the figure of eigenvalues shows."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from dyntune.plots import plot_eigenvalues
from dyntune.plots.eigenvalues import eigenvalues_data
from tests.plots.records import found


def test_shows_values_and_brackets_as_they_are():
    result = found(k=3)
    data = eigenvalues_data(result)
    assert data.values == tuple(result.values.tolist())
    assert data.low == tuple(result.low.tolist())
    assert data.high == tuple(result.high.tolist())
    assert data.names == ("largest", "2nd largest", "3rd largest")
    assert data.certified == (True,) * 3
    assert "certified to 1 %" in data.title
    assert not data.zero


def test_both_ends_are_named_from_the_outside_in_and_zero_is_between():
    data = eigenvalues_data(found(k=2, which="both"))
    assert data.names == ("largest", "2nd largest", "smallest", "2nd smallest")
    assert data.zero


@pytest.mark.parametrize(("which", "first"), [("smallest", "smallest"), ("magnitude", "largest |λ|")])
def test_names_say_what_was_asked_for(which, first):
    assert eigenvalues_data(found(which=which)).names == (first,)


def test_what_is_not_certified_is_said_and_drawn():
    result = found(k=3, max_products=6)
    data = eigenvalues_data(result)
    assert not all(data.certified)
    assert "NOT certified" in data.title
    axes = plot_eigenvalues(result)
    axes.get_figure(root=True).draw_without_rendering()
    assert sum("not certified" in text.get_text() for text in axes.texts) == data.certified.count(False)


def test_twelfth_is_not_twelfnd():
    names = eigenvalues_data(found(k=23)).names
    assert [names[i] for i in (10, 11, 12, 20, 21)] == [
        f"{n} largest" for n in ("11th", "12th", "13th", "21st", "22nd")
    ]


def test_draws_on_given_axes_with_the_first_on_top():
    axes = Figure().add_subplot()
    assert found(k=2).plot(ax=axes) is axes
    bottom, top = axes.get_ylim()
    assert bottom > top
    assert [text.get_text() for text in axes.get_yticklabels()] == ["largest", "2nd largest"]
