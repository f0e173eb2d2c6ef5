"""Bandits: closed forms against automatic differentiation, and ascent that is stable at 0.98 and not at 1.02."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from dyntune.errors import InvalidArgumentError
from dyntune.rl import GaussianBandit, SoftmaxBandit, tanh_gaussian_entropy

ALPHAS = [0.05, 0.08, 0.13, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0, 5.0]
REWARDS = torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.float64)


def returns(step: object, optimum: torch.Tensor, lr: float, *, push: torch.Tensor, steps: int) -> bool:
    """Whether ascent comes nearer to the optimum from beside it, along the steepest direction."""
    x = optimum + push
    for _ in range(steps):
        x = x + lr * step(x)  # type: ignore[operator]
        x = x - x.mean() + optimum.mean() if len(x) > 2 else x  # logits that move together change nothing
    return float((x - optimum).norm()) < float(push.norm())


@pytest.mark.parametrize("arms", [2, 3, 8, 16])
def test_closed_forms_of_the_softmax(arms: int) -> None:
    g = torch.Generator().manual_seed(arms)
    for alpha in (0.0, 0.1, 2.0):

        def value(x: torch.Tensor, bandit: SoftmaxBandit, alpha: float = alpha) -> torch.Tensor:
            return bandit.value(x, alpha)

        logits = torch.randn(arms, generator=g, dtype=torch.float64)
        bandit = SoftmaxBandit(torch.rand(arms, generator=g, dtype=torch.float64))
        wanted = torch.autograd.functional.hessian(partial(value, bandit=bandit), logits)
        assert torch.allclose(bandit.hessian(logits, alpha), wanted, atol=1e-10)
        (slope,) = torch.autograd.grad(bandit.value(logits.requires_grad_(), alpha), logits)
        logits = logits.detach()
        assert torch.allclose(bandit.gradient(logits, alpha), slope, atol=1e-10)
        entropy = torch.autograd.functional.hessian(bandit.entropy, logits)
        assert torch.allclose(bandit.entropy_hessian(logits), entropy, atol=1e-10)
        assert float(torch.linalg.matrix_norm(wanted, 2)) <= bandit.hessian_bound(logits, alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_edge_of_the_softmax_bandit(alpha: float) -> None:
    bandit = SoftmaxBandit(REWARDS)
    optimum, edge = bandit.optimum(alpha), bandit.critical_lr(alpha)
    hessian = bandit.hessian(optimum, alpha)
    assert edge == pytest.approx(2 / float(torch.linalg.eigvalsh(-hessian)[-1]), rel=1e-9)
    assert edge >= 4 / alpha * (1 - 1e-9)
    push = 1e-6 * torch.linalg.eigh(-hessian)[1][:, -1]
    for share, comes_back in ((0.98, True), (1.02, False)):
        back = returns(lambda x: bandit.gradient(x, alpha), optimum, share * edge, push=push, steps=60)
        assert back is comes_back


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_edge_of_the_gaussian_bandit_has_a_kink(alpha: float) -> None:
    bandit = GaussianBandit(2.0)
    optimum, edge = bandit.optimum(alpha), bandit.critical_lr(alpha)
    assert edge == pytest.approx(1.0 if alpha <= 1 else 1 / alpha)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(bandit.value(leaf, alpha), leaf)[0]

    wanted = torch.autograd.functional.hessian(lambda x: bandit.value(x, alpha), optimum)
    assert torch.allclose(bandit.hessian(optimum, alpha), wanted, atol=1e-10)
    assert torch.allclose(gradient(optimum), torch.zeros(2).double(), atol=1e-12)
    push = 1e-6 * torch.linalg.eigh(-wanted)[1][:, -1]
    assert returns(gradient, optimum, 0.98 * edge, push=push, steps=60)
    assert not returns(gradient, optimum, 1.02 * edge, push=push, steps=60)


def test_two_arms_reach_the_sharp_constant() -> None:
    """The steepest Hessian of two arms with rewards in [0, 1] is 1 / (3 sqrt 3), at p (1 - p) |1 - 2 p| largest."""
    bandit = SoftmaxBandit(torch.tensor([1.0, 0.0], dtype=torch.float64))
    norms = [
        float(torch.linalg.matrix_norm(bandit.hessian(torch.tensor([x, 0.0], dtype=torch.float64), 0.0), 2))
        for x in torch.linspace(-6, 6, 2001).tolist()
    ]
    assert max(norms) == pytest.approx(1 / (3 * math.sqrt(3)), rel=1e-5)


def test_entropy_of_a_squashed_gaussian() -> None:
    """Against sampling, finite differences of its mean, and the bound of the uniform distribution."""
    mu, log_std = torch.tensor([0.3, -1.0, 2.0]).double(), torch.tensor([-0.5, 0.2, 0.8]).double()
    found = tanh_gaussian_entropy(mu, log_std)
    noise = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(3):
        u = mu[i] + log_std[i].exp() * noise
        log_p = -(noise**2) / 2 - log_std[i] - math.log(2 * math.pi) / 2 - torch.log1p(-(torch.tanh(u) ** 2) + 1e-300)
        error = float((-log_p).std()) / math.sqrt(len(noise))
        assert float(found[i]) == pytest.approx(float(-log_p.mean()), abs=5 * error)
    assert float(tanh_gaussian_entropy(torch.zeros(()), torch.tensor(-0.13))) == pytest.approx(0.6836, abs=1e-4)
    grid = torch.linspace(-4, 1, 26).double()
    assert float(tanh_gaussian_entropy(torch.zeros(26).double(), grid).max()) < math.log(2)
    fewer = tanh_gaussian_entropy(torch.zeros(26).double(), grid, nodes=200)
    assert torch.allclose(fewer, tanh_gaussian_entropy(torch.zeros(26).double(), grid), atol=2e-6)
    narrow = tanh_gaussian_entropy(torch.zeros(()).double(), torch.tensor(-8.0).double())
    assert float(narrow) == pytest.approx(-8 + math.log(2 * math.pi * math.e) / 2, abs=1e-5)


def test_bad_input() -> None:
    for call in (
        lambda: SoftmaxBandit(torch.ones(1)),
        lambda: GaussianBandit(0.0),
        lambda: SoftmaxBandit(REWARDS).optimum(0.0),
        lambda: GaussianBandit(1.0).critical_lr(-1.0),
    ):
        with pytest.raises(InvalidArgumentError):
            call()
