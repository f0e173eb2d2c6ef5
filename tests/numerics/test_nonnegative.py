"""The cone's nearest point: against SLSQP, at condition 1e12, scale by scale, block by block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from dyntune.errors import InvalidArgumentError, NonFiniteError
from dyntune.numerics.nonnegative import BLOCK, cone_projection, triangular_factor


def problem(seed: int) -> np.ndarray:
    """Directions as columns: 2 to 6 of them, scales over six decades, up to condition 1e12."""
    rng = np.random.default_rng(seed)
    count, size = int(rng.integers(2, 7)), int(rng.integers(7, 40))
    a = rng.standard_normal((size, count))
    if seed % 3 == 0:  # all nearly along one direction
        a = a[:, :1] * rng.choice([-1, 1], count) + a * 10.0 ** -rng.uniform(2, 12)
    return a * 10 ** rng.uniform(-3, 3, count)


def test_never_above_slsqp_and_never_opposed_on_500_problems() -> None:
    for seed in range(500):
        a = problem(seed)
        found = cone_projection(a)
        unit = a / np.linalg.norm(a, axis=0)
        theirs = minimize(
            lambda v, u=unit: 0.5 * np.sum((u[:, 0] + u[:, 1:] @ v) ** 2),
            np.zeros(a.shape[1] - 1),
            jac=lambda v, u=unit: u[:, 1:].T @ (u[:, 0] + u[:, 1:] @ v),
            bounds=[(0, None)] * (a.shape[1] - 1),
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        ours = 0.5 * (found.length / np.linalg.norm(a[:, 0])) ** 2
        # Where SLSQP stops early it is the worse one; ours is never above it.
        assert ours <= theirs.fun + 1e-8, seed
        if seed % 3:
            assert ours == pytest.approx(theirs.fun, abs=1e-8), seed
        assert found.cosines.min() >= -1e-6 or found.length == 0, seed
        assert (found.multipliers >= 0).all()


def test_the_published_pair() -> None:
    """J = [[-4, 1, 1], [6, 1, 1]]: the projection of the first row is (-.5263, 1.5789, 1.5789)."""
    a = np.array([[-4.0, 1, 1], [6, 1, 1]]).T
    found = cone_projection(a)
    assert a @ [1.0, found.multipliers[0]] == pytest.approx([-4 + 6 * 22 / 38, 1 + 22 / 38, 1 + 22 / 38])
    assert found.cosines[1] == pytest.approx(0, abs=1e-12)


def test_without_conflict_nothing_changes_and_opposites_leave_nothing() -> None:
    agreeing = cone_projection(np.array([[1.0, 1.0], [0.0, 1.0]]))
    assert agreeing.multipliers.tolist() == [0.0]
    opposed = cone_projection(np.array([[1.0, -2.0], [1.0, -2.0]]))
    assert opposed.length == 0.0
    zero = cone_projection(np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert zero.multipliers.tolist() == [0.0]


def test_scales_do_not_matter() -> None:
    a = problem(1)
    factors = 10.0 ** np.arange(a.shape[1])
    plain, scaled = cone_projection(a), cone_projection(a * factors)
    assert scaled.multipliers * factors[1:] / factors[0] == pytest.approx(plain.multipliers, rel=1e-9)
    assert scaled.cosines == pytest.approx(plain.cosines, abs=1e-12)


def test_the_factor_has_the_inner_products_over_blocks() -> None:
    g = torch.Generator().manual_seed(0)
    directions = [[torch.randn(BLOCK + 5, generator=g), torch.randn(3, 2, generator=g)] for _ in range(3)]
    r = triangular_factor(directions)
    flat = torch.stack([torch.cat([t.reshape(-1) for t in d]).double() for d in directions])
    assert r.shape == (3, 3)
    assert np.allclose(r.T @ r, (flat @ flat.T).numpy(), rtol=1e-10, atol=1e-6)  # sums of a million float64 products


def test_bad_input() -> None:
    with pytest.raises(InvalidArgumentError):
        triangular_factor([])
    with pytest.raises(NonFiniteError):
        triangular_factor([[torch.tensor([1.0, float("nan")])]])
    with pytest.raises(InvalidArgumentError):
        cone_projection(np.zeros(3))
