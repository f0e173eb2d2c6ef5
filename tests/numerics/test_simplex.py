"""Quadratics over shares: the gap that certifies a minimum, SLSQP, singular matrices, and input that is none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.simplex import simplex_gap, simplex_quadratic


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**9), k=st.integers(1, 9), rank=st.integers(0, 9), decades=st.floats(0, 4))
def test_certified(seed: int, k: int, rank: int, decades: float) -> None:
    """The gap bounds what is lost; singular matrices and floors included. 1e-9 of the values' size."""
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((k, min(rank, k))) * 10 ** rng.uniform(-decades / 2, decades / 2, (k, 1))
    a, b = half @ half.T, rng.standard_normal(k)
    floors = rng.dirichlet(np.ones(k)) * rng.uniform(0, 0.9) * (seed % 2)
    r = simplex_quadratic(a, b, floors)
    assert (r >= floors).all()
    assert r.sum() == pytest.approx(1, abs=1e-12)
    size = float(np.abs(a).max()) + float(np.abs(b).max())
    assert simplex_gap(a @ r - b, r, floors) <= 1e-9 * size


def test_closed_forms() -> None:
    assert simplex_quadratic(np.zeros((3, 3)), np.array([0.0, 2.0, 1.0])).tolist() == [0, 1, 0]
    held = simplex_quadratic(np.eye(3), np.array([0.0, 9.0, 0.0]), np.array([0.2, 0.0, 0.3]))
    assert held == pytest.approx([0.2, 0.5, 0.3])
    # Smallest spread of independent errors: shares like one over the variances.
    variances = np.array([1.0, 2.0, 4.0])
    assert simplex_quadratic(np.diag(variances), np.zeros(3)) == pytest.approx((1 / variances) / (1 / variances).sum())
    assert simplex_quadratic(np.eye(2), np.zeros(2), np.array([0.5, 0.5])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("matrix", "linear"),
    [(np.zeros((2, 3)), np.zeros(2)), (np.zeros((0, 0)), np.zeros(0)), (np.full((1, 1), np.nan), np.zeros(1))],
)
def test_input_that_is_none(matrix: np.ndarray, linear: np.ndarray) -> None:
    with pytest.raises(InvalidArgumentError):
        simplex_quadratic(matrix, linear)
