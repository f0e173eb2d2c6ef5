"""Gauss quadrature from Lanczos."""

import numpy as np
import pytest
import torch

from dyntune.numerics.operator import CallableOperator
from dyntune.numerics.quadrature import gauss_quadrature, smoothed_density
from dyntune.numerics.vectors import Basis
from tests.operators import diagonal

N = 40


def quadrature(values: np.ndarray, steps: int, dtype: torch.dtype = torch.float64):
    """Nodes, weights, and the measure of the probe: weights of the eigenvalues themselves."""
    operator = CallableOperator(*diagonal(values, dtype), dtype=dtype)
    basis = Basis(operator.space, steps + 1)
    with operator.session() as product:
        nodes, weights = gauss_quadrature(product, basis, num_steps=steps, key=(1, 2))
    probe = operator.space.normal(1, 2)[0].double().numpy()
    return nodes, weights, probe**2 / (probe**2).sum()


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_exact_for_polynomials_of_degree_below_2m_and_no_further(steps):
    values = np.random.default_rng(0).uniform(-1, 1, N)
    nodes, weights, measure = quadrature(values, steps)
    for degree in range(2 * steps):
        # Monomials on [-1, 1] against unit total weight: rounding of a few dozen terms.
        assert weights @ nodes**degree == pytest.approx(measure @ values**degree, abs=1e-14)
    # The error at degree 2m is the squared norm of the next monic polynomial, at least about 4^-m / 4 here.
    assert abs(weights @ nodes ** (2 * steps) - measure @ values ** (2 * steps)) > 4.0 ** -(steps + 2)


def test_weights_are_a_measure():
    nodes, weights, _ = quadrature(np.random.default_rng(1).uniform(-1, 1, N), 12)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    assert nodes.min() >= -1
    assert nodes.max() <= 1


def test_full_order_recovers_the_measure():
    values = np.sort(np.random.default_rng(2).uniform(-1, 1, 8))
    nodes, weights, measure = quadrature(values, 8)
    np.testing.assert_allclose(nodes, values, atol=1e-13)
    np.testing.assert_allclose(weights, measure, atol=1e-12)


def test_an_invariant_space_is_padded_with_weightless_copies():
    values = np.repeat([5.0, 6.0], 20)
    nodes, weights, measure = quadrature(values, 7)
    np.testing.assert_allclose(nodes, [5, 6, 6, 6, 6, 6, 6], atol=1e-14)  # not 0, which lies outside of the spectrum
    np.testing.assert_allclose(weights, [measure[:20].sum(), measure[20:].sum(), 0, 0, 0, 0, 0], atol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_neither_vanish_nor_overflow(scale):
    values = np.linspace(0.5, 1, N)
    plain, weights, _ = quadrature(values, 6, torch.float32)
    scaled, same_weights, _ = quadrature(scale * values, 6, torch.float32)
    # Products differ by the rounding of scale * values to float32.
    np.testing.assert_allclose(scaled / scale, plain, rtol=1e-5)
    np.testing.assert_allclose(same_weights, weights, atol=1e-4)


def test_smoothed_density_is_a_sum_of_normal_densities():
    import scipy.stats

    nodes, weights = np.array([[0.0, 2.0], [1.0, 1.0]]), np.array([[0.25, 0.75], [1.0, 0.0]])
    grid = np.linspace(-3, 5, 9)
    found = smoothed_density(nodes, weights, grid, 0.5)
    expected = 0.25 * scipy.stats.norm.pdf(grid, 0, 0.5) + 0.75 * scipy.stats.norm.pdf(grid, 2, 0.5)
    np.testing.assert_allclose(found[0], expected, rtol=1e-13)
    np.testing.assert_allclose(found[1], scipy.stats.norm.pdf(grid, 1, 0.5), rtol=1e-13)
