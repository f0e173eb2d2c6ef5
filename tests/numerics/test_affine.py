"""The joint spectrum of A + alpha B: against dense eigenvalues, brackets, convexity, products, and hostile input."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

import dyntune
from dyntune.curvature.algebra import affine
from dyntune.errors import InvalidArgumentError, NonFiniteError, ShapeMismatchError
from dyntune.numerics.affine import OperatorPair, affine_spectrum
from dyntune.numerics.operator import CallableOperator, DenseOperator

ALPHAS = np.geomspace(1e-4, 1, 41)


def symmetric(n: int, seed: int, *, spread: float = 1.0) -> torch.Tensor:
    """Random, with a few directions that stand out as those of a loss do."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    values = torch.randn(n, generator=g, dtype=torch.float64) * 0.05
    values[:4] += spread * torch.tensor([1.0, 0.7, -0.6, 0.4], dtype=torch.float64)
    return q @ torch.diag(values) @ q.T


def dense(a: torch.Tensor, b: torch.Tensor, alpha: float) -> np.ndarray:
    return np.asarray(torch.linalg.eigvalsh(a + alpha * b))


def bulk(n: int, seed: int) -> torch.Tensor:
    """Random, with no gap anywhere."""
    m = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (m + m.T) / 2


@pytest.mark.parametrize("make", [symmetric, bulk])
@pytest.mark.parametrize("seed", range(2))
def test_both_ends_for_every_alpha_from_one_space(seed: int, make: Callable[[int, int], torch.Tensor]) -> None:
    """40 values and more within 0.5% and 2%, brackets that hold, an eighth of the products of independent solves."""
    a, b = make(200, seed), 2 * make(200, 100 + seed)
    found = affine_spectrum(OperatorPair(DenseOperator(a), DenseOperator(b)), alphas=(0.0, 1.0), seed=seed)
    independent = 0
    for alpha in ALPHAS:
        truth = dense(a, b, float(alpha))
        top, bottom = found.at(float(alpha)), found.at(float(alpha), "smallest")
        assert top.value == pytest.approx(truth[-1], rel=5e-3)
        assert bottom.value == pytest.approx(truth[0], rel=2e-2)
        assert top.low <= truth[-1] * (1 + 1e-9) <= top.high * (1 + 2e-9)
        assert bottom.low <= truth[0] + 1e-9 * abs(truth[0])
        assert truth[0] <= bottom.high + 1e-9
        solved = dyntune.eigenvalues(
            affine(DenseOperator(a), DenseOperator(b), alpha=float(alpha)), 1, which="both", rtol=5e-3, seed=seed
        )
        independent += solved.num_products
    assert 2 * found.num_products <= independent / 8  # one of A and one of B each; of the sum it is one
    # A product of the sum is one of each for the independent solves, too.
    assert found.num_products <= independent / 8


@pytest.mark.parametrize("seed", [515, 518, 528, 538])
def test_a_first_eigenvalue_hidden_behind_the_second_is_found(seed: int) -> None:
    """No gap: residuals of 0.004 to 0.02 at a value that is the second's, 1% off."""
    a, b = bulk(200, seed), 2 * bulk(200, 1000 + seed)
    found = affine_spectrum(OperatorPair(DenseOperator(a), DenseOperator(b)), seed=seed)
    for alpha in ALPHAS[::5]:
        truth = dense(a, b, float(alpha))
        assert found.at(float(alpha)).value == pytest.approx(truth[-1], rel=5e-3)
        assert found.at(float(alpha), "smallest").value == pytest.approx(truth[0], rel=2e-2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_smaller_end_is_measured_relative_to_itself(seed: int, sign: float) -> None:
    """As in policies that have learned a little: one end stands out, the other is the edge of a bulk beside zero."""
    g = torch.Generator().manual_seed(seed)

    def make(spread: float) -> torch.Tensor:
        q = torch.linalg.qr(torch.randn(300, 300, generator=g, dtype=torch.float64))[0]
        values = spread * 0.03 * torch.randn(300, generator=g, dtype=torch.float64)
        values[:3] = spread * torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)
        return sign * q @ torch.diag(values) @ q.T

    a, b = make(1.0), make(0.5)
    found = affine_spectrum(OperatorPair(DenseOperator(a), DenseOperator(b)), seed=seed)
    for alpha in ALPHAS[::5]:
        truth = dense(a, b, float(alpha))
        # The tolerances are the ends' own, whichever of the two is the larger.
        assert found.at(float(alpha)).value == pytest.approx(truth[-1], rel=5e-3)
        assert found.at(float(alpha), "smallest").value == pytest.approx(truth[0], rel=2e-2)


def test_a_crossing_of_eigenvalues_is_seen() -> None:
    """Two straight lines: the largest has a kink where they cross, the slope jumps."""
    a, b = (
        torch.diag(torch.tensor([1.0, 0.0, 0.2, 0.1])).double(),
        torch.diag(torch.tensor([0.0, 4.0, 0.0, 0.1])).double(),
    )
    found = affine_spectrum(OperatorPair(DenseOperator(a), DenseOperator(b)))
    assert found.at(0.2).value == pytest.approx(1.0)
    assert found.at(0.2).slope == pytest.approx(0.0, abs=1e-9)
    assert found.at(0.3).value == pytest.approx(1.2)
    assert found.at(0.3).slope == pytest.approx(4.0)
    (direction,) = found.direction(0.3)
    assert torch.allclose(direction.abs(), torch.tensor([0.0, 1.0, 0.0, 0.0]).double(), atol=1e-6)


def test_values_are_convex_and_bracketed_in_float32_too() -> None:
    a, b = symmetric(60, 1).float(), symmetric(60, 2).float()
    found = affine_spectrum(OperatorPair(DenseOperator(a), DenseOperator(b)), alphas=(0.0, 2.0))
    grid = np.linspace(0, 2, 21)
    top = np.array([found.at(float(x)).value for x in grid])
    assert (np.diff(top, 2) >= -1e-5).all()
    for x in grid:
        truth = dense(a.double(), b.double(), float(x))
        value = found.at(float(x))
        assert value.low - 1e-5 <= truth[-1] <= value.high + 1e-5


def test_brackets_hold_as_often_as_they_say() -> None:
    """Bounds that are to fail in at most one of ten starts, on spectra without a gap."""
    wrong, asked = 0, 0
    a, b = (torch.randn(80, 80, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    a, b = a + a.T, b + b.T
    truth = {x: dense(a, b, x) for x in (0.0, 0.3, 1.0)}
    for seed in range(100):
        found = affine_spectrum(
            OperatorPair(DenseOperator(a), DenseOperator(b)), max_products=24, failure_probability=0.1, seed=seed
        )
        for x, values in truth.items():
            wrong += found.at(x).high < values[-1] - 1e-9
            asked += 1
    assert wrong / asked <= 0.1 + 3 * (0.1 * 0.9 / asked) ** 0.5


def test_no_b_and_tiny_problems() -> None:
    zero = affine_spectrum(OperatorPair(DenseOperator(symmetric(30, 3)), DenseOperator(torch.zeros(30, 30).double())))
    assert zero.at(0.0).value == pytest.approx(zero.at(1.0).value, rel=1e-6)
    assert zero.at(0.5).slope == pytest.approx(0.0, abs=1e-12)
    one = affine_spectrum(OperatorPair(DenseOperator(torch.tensor([[2.0]])), DenseOperator(torch.tensor([[-1.0]]))))
    for x, end in itertools.product((0.0, 0.5, 1.0), ("largest", "smallest")):
        assert one.at(x, end).value == pytest.approx(2 - x)  # type: ignore[arg-type]


def test_bad_input() -> None:
    pair = OperatorPair(DenseOperator(torch.eye(3)), DenseOperator(torch.eye(3)))
    for options in (
        {"alphas": (1.0, 0.0)},
        {"alphas": (0.0, float("inf"))},
        {"rtol": 0.0},
        {"smallest_rtol": 1.0},
        {"max_products": 3},
    ):
        with pytest.raises(InvalidArgumentError):
            affine_spectrum(pair, **options)
    with pytest.raises(InvalidArgumentError, match="between 0"):
        affine_spectrum(pair).at(2.0)
    with pytest.raises(ShapeMismatchError):
        OperatorPair(DenseOperator(torch.eye(3)), DenseOperator(torch.eye(2)))
    broken = CallableOperator(lambda v: v * float("nan"), 3)
    with pytest.raises(NonFiniteError):
        affine_spectrum(OperatorPair(broken, broken))
