"""A squashed Gaussian: derivatives against automatic differentiation, the entropy's shape, edges at the optimum."""

from __future__ import annotations

import math

import pytest
import torch

from dyntune.errors import InvalidArgumentError
from dyntune.rl import SquashedBandit, tanh_gaussian_entropy

ALPHAS = [0.02, 0.05, 0.08, 0.13, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_derivatives_are_those_of_the_value(alpha: float) -> None:
    g = torch.Generator().manual_seed(0)
    bandit = SquashedBandit(2.0, 0.4)
    for _ in range(10):
        x = torch.randn(2, generator=g, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(bandit.value(leaf, alpha), leaf)
        assert torch.allclose(bandit.gradient(x, alpha), slope, atol=1e-10)
        wanted = torch.autograd.functional.hessian(lambda y: bandit.value(y, alpha), x)
        assert torch.allclose(bandit.hessian(x, alpha), wanted, atol=1e-10)
        of_entropy = torch.autograd.functional.hessian(lambda y: tanh_gaussian_entropy(y[0], y[1]), x)
        assert torch.allclose(bandit.entropy_hessian(x), of_entropy, atol=1e-10)


def test_the_entropy_is_concave_and_its_slope_in_the_width_is_stein_s() -> None:
    """dH/dl = 1 - 2 E[s eps tanh u], which by Stein's lemma is 1 - 2 s^2 E sech^2 u."""
    bandit = SquashedBandit(0.0)
    points, weights = bandit._rule
    for mu in torch.linspace(-3, 3, 13).tolist():
        for log_std in torch.linspace(-4, 1, 11).tolist():
            x = torch.tensor([mu, log_std], dtype=torch.float64)
            assert float(torch.linalg.eigvalsh(bandit.entropy_hessian(x))[-1]) <= 1e-9
            s = math.exp(log_std)
            stein = 1 - 2 * s**2 * float((1 - torch.tanh(mu + s * points) ** 2) @ weights)
            # The sum is exact for polynomials only: what two forms of one expectation differ by is its own error.
            assert float(bandit.gradient(x, 1.0)[1]) == pytest.approx(stein, abs=1e-7 if log_std <= 0 else 2e-3)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("target", [0.0, 0.6])
def test_the_edge_at_the_optimum(alpha: float, target: float) -> None:
    bandit = SquashedBandit(4.0, target)
    optimum, edge = bandit.optimum(alpha), bandit.critical_lr(alpha)
    hessian = -bandit.hessian(optimum, alpha)
    assert float(bandit.gradient(optimum, alpha).norm()) < 1e-10
    values, vectors = torch.linalg.eigh(hessian)
    assert float(values[0]) > 0
    push = 1e-6 * vectors[:, -1]
    for share, comes_back in ((0.98, True), (0.99, True), (1.01, False), (1.02, False)):
        x = optimum + push
        for _ in range(60):
            x = x + share * edge * bandit.gradient(x, alpha)
        assert (float((x - optimum).norm()) < float(push.norm())) is comes_back


def test_a_large_bonus_leaves_the_entropy_alone() -> None:
    free, weighted = SquashedBandit(0.0).optimum(1.0), SquashedBandit(1.0, 0.5).optimum(1e6)
    assert torch.allclose(free, weighted, atol=1e-5)
    assert 1e6 * SquashedBandit(1.0).critical_lr(1e6) == pytest.approx(SquashedBandit(0.0).critical_lr(1.0), rel=1e-5)


def test_bad_input() -> None:
    for call in (
        lambda: SquashedBandit(-1.0),
        lambda: SquashedBandit(1.0, 1.0),
        lambda: SquashedBandit(1.0, nodes=1),
        lambda: SquashedBandit(1.0).optimum(0.0),
    ):
        with pytest.raises(InvalidArgumentError):
            call()
