"""Spectral densities of known spectra."""

import json

import numpy as np
import pytest
import torch

from dyntune import spectral_density
from dyntune.errors import InvalidArgumentError, NonFiniteError
from dyntune.numerics.operator import CallableOperator
from tests.operators import FLOOR, diagonal


def total(found) -> float:
    return float(np.trapezoid(found.density, found.grid))


# The grid reaches 4 standard deviations beyond the outermost nodes, where a Gaussian has left 6e-5 of its mass.
TAIL = 1e-4


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, 500),
        np.repeat([-1.0, 1.0], 100),
        np.concatenate([np.zeros(900), np.linspace(5, 10, 10)]),
        np.ones(300),
        np.zeros(300),
        np.array([2.0]),
        np.array([-1.0, 4.0]),
    ],
    ids=["uniform", "two", "zeros and outliers", "identity", "zero", "n=1", "n=2"],
)
def test_it_integrates_to_one_and_its_band_holds_it(values):
    found = spectral_density(diagonal(values))
    assert total(found) == pytest.approx(1, abs=TAIL)
    assert (found.low <= found.density).all()
    assert (found.density <= found.high).all()
    assert (found.low >= 0).all()
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, atol=1e-6)
    floor = FLOOR * np.abs(values).max()
    assert values.min() - floor <= found.nodes.min()
    assert found.nodes.max() <= values.max() + floor


def test_two_clusters():
    values = np.repeat([100.0, 101.0], [300, 100])
    found = spectral_density(diagonal(values, torch.float64), num_probes=40)
    assert found.grid[0] > 99  # and not from 0 on, where nothing is
    assert found.mass(99.5, 100.5) == pytest.approx(0.75, abs=5 * np.sqrt(0.75 * 0.25 * 2 / 400 / 40))
    assert found.mass(100.5, 101.5) == pytest.approx(1 - found.mass(99.5, 100.5), abs=1e-12)
    between = found.density[np.abs(found.grid - 100.5) < 0.1]
    assert between.max() < 1e-3 * found.density.max()


def test_the_shape_of_a_known_density():
    """Semicircle, n = 2000: the density smoothed with the bandwidth, within the noise of 30 probes and 32 nodes."""
    n = 2000
    from scipy.stats import norm, semicircular

    values = semicircular.ppf((np.arange(n) + 0.5) / n)
    found = spectral_density(diagonal(values), num_probes=30, bandwidth=0.1)
    x = np.linspace(-0.8, 0.8, 50)
    expected = np.array([np.mean(norm.pdf(at, values, 0.1)) for at in x])
    np.testing.assert_allclose(np.interp(x, found.grid, found.density), expected, rtol=0.05)


def test_a_uniform_density_is_flat():
    found = spectral_density(diagonal(np.linspace(0, 1, 2000)), num_probes=30, bandwidth=0.05)
    inside = (found.grid > 0.2) & (found.grid < 0.8)
    np.testing.assert_allclose(found.density[inside], 1, atol=0.06)
    assert found.mass(0, 0.5) == pytest.approx(0.5, abs=0.05)  # one of 32 nodes more or less


@pytest.mark.parametrize("factor", [1.0, -0.3, 1e-8])
def test_a_multiple_of_the_identity_is_one_narrow_peak(factor):
    found = spectral_density(diagonal(np.full(1000, factor)))
    assert found.num_products == 8  # one product shows it
    assert found.bandwidth == pytest.approx(0.01 * abs(factor), rel=1e-6)
    peak = found.grid[found.density.argmax()]
    assert peak == pytest.approx(factor, rel=1e-3)  # half a grid step
    assert found.mass(factor - 1e-6 * abs(factor), factor + 1e-6 * abs(factor)) == pytest.approx(1, abs=1e-6)
    assert 1000 * factor in found.trace


def test_the_zero_operator():
    found = spectral_density(diagonal(np.zeros(100)))
    assert found.trace.value == 0
    assert 0.0 in found.trace
    assert found.mass(0, 0) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_no_absolute_tolerances(scale):
    """A scaled operator has the scaled grid; a power of two apart, so has a float32 computation."""
    values = np.concatenate([[3.0], np.linspace(-1, 1, 300)])
    plain, scaled = spectral_density(diagonal(values)), spectral_density(diagonal(scale * values))
    np.testing.assert_allclose(scaled.grid, scale * plain.grid, rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_allclose(scaled.density * scale, plain.density, rtol=0.01, atol=1e-3)
    assert scaled.trace.value == pytest.approx(scale * plain.trace.value, rel=1e-4)
    assert scaled.bandwidth == pytest.approx(scale * plain.bandwidth, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "level", "probes"),
    [
        ("uniform", 0.8, 8),
        ("uniform", 0.95, 2),
        ("outliers", 0.95, 8),
        pytest.param("uniform", 0.95, 8, marks=pytest.mark.slow),
        pytest.param("both signs", 0.95, 8, marks=pytest.mark.slow),
    ],
)
def test_the_interval_of_the_trace_covers_as_often_as_it_says(kind, level, probes):
    """400 fixed seeds, 99.9% of the binomial distribution on both sides: a wide interval would fail, too."""
    from scipy.stats import binom

    rng = np.random.default_rng(0)
    values = {
        "uniform": rng.uniform(0, 1, 300),
        "both signs": rng.uniform(-1, 1, 300),
        "outliers": np.concatenate([np.linspace(10, 100, 20), rng.uniform(0, 0.1, 980)]),
    }[kind]
    operator = CallableOperator(*diagonal(values, torch.float64), dtype=torch.float64)
    options = {"num_probes": probes, "num_steps": 2, "num_points": 2, "level": level}
    hits = sum(values.sum() in spectral_density(operator, **options, seed=s).trace for s in range(400))
    assert binom.ppf(0.0005, 400, level) <= hits <= binom.ppf(0.9995, 400, level)


def test_the_trace_where_one_eigenvalue_is_all_of_it():
    """Where Student's interval is too short (chi-square with one degree of freedom): 87%, as documented."""
    values = np.concatenate([[100.0], np.full(999, 0.01)])
    operator = CallableOperator(*diagonal(values, torch.float64), dtype=torch.float64)
    found = [spectral_density(operator, num_steps=2, num_points=2, seed=s).trace for s in range(400)]
    assert 0.8 <= np.mean([values.sum() in t for t in found]) <= 0.92


def test_same_seed_same_bits_and_untouched_generators():
    before = torch.get_rng_state()
    first, second, other = (spectral_density(diagonal(np.linspace(0, 1, 200)), seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.density, second.density)
    assert not np.array_equal(first.density, other.density)
    assert torch.equal(before, torch.get_rng_state())


def test_record():
    seen = []
    found = spectral_density(
        diagonal(np.linspace(0, 1, 50)), num_probes=3, num_steps=4, progress=lambda *a: seen.append(a)
    )
    assert (found.num_products, found.numel, found.nodes.shape) == (12, 50, (3, 4))
    assert [n for n, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == found.nodes.max()
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["density"] == found.density.tolist()
    assert data["trace"]["method"] == "Hutchinson, 3 probes"


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"num_probes": 1}, "num_probes=1: a band needs at least two"),
        ({"num_steps": 1}, "num_steps=1"),
        ({"num_points": 1}, "num_points=1"),
        ({"level": 1.0}, r"level=1.0: choose a level in \(0, 1\)"),
        ({"level": 0.0}, "level=0.0"),
        ({"bandwidth": 0.0}, "bandwidth=0.0: the width of a Gaussian is positive"),
        ({"bandwidth": float("nan")}, "bandwidth=nan"),
    ],
)
def test_arguments_out_of_range(options, fragment):
    with pytest.raises(InvalidArgumentError, match=fragment):
        spectral_density(torch.eye(3), **options)


def test_products_that_are_not_finite():
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        spectral_density((lambda v: v * float("nan"), 5))
