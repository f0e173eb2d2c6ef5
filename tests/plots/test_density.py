"""What the figure of a spectral density shows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

import dyntune
from dyntune.plots import plot_density
from dyntune.plots.density import density_data
from tests.plots.records import density, matrix


def test_extremes_are_those_of_the_matrix():
    data = density_data(density())
    assert data.largest == pytest.approx(8.0, rel=1e-3)
    assert data.smallest == pytest.approx(-1.0, rel=1e-2)
    assert data.numel == 400


def test_the_bulk_holds_its_share_of_the_eigenvalues():
    # 396 of 400 lie within 0.1; the estimate comes from random probes and Ritz values.
    data = density_data(density())
    eigenvalues = np.abs(matrix().diagonal().numpy())
    assert 0.96 <= (eigenvalues <= 1.05 * data.bulk).mean() <= 1.0
    assert data.bulk < 3.0


def test_one_eigenvalue_is_as_high_as_its_smoothed_peak():
    result = density()
    data = density_data(result)
    assert data.one == pytest.approx(1 / (400 * result.bandwidth * np.sqrt(2 * np.pi)))
    assert data.floor == pytest.approx(data.one / 10)


def test_nothing_lies_below_the_floor_and_the_band_holds_the_curve():
    data = density_data(density())
    assert (data.low >= data.floor).all()
    assert (data.low <= data.density).all()
    assert (data.density <= data.high).all()


def test_draws_on_given_axes_and_names_the_extremes():
    axes = Figure().add_subplot()
    assert density().plot(ax=axes) is axes
    axes.get_figure(root=True).draw_without_rendering()
    words = " ".join(text.get_text() for text in axes.texts)
    assert "largest 8" in words
    assert "one" in words


def test_draws_a_multiple_of_the_identity():
    import torch

    axes = plot_density(dyntune.spectral_density(2 * torch.eye(30), num_probes=2, num_steps=4))
    axes.get_figure(root=True).draw_without_rendering()


def test_the_bulk_is_measured_in_magnitude():
    nodes, weights = np.array([[-5.0, 0.1, 1.0]]), np.array([[0.02, 0.97, 0.01]])
    result = dataclasses.replace(density(), nodes=nodes, weights=weights)
    assert density_data(result).bulk == 5.0
