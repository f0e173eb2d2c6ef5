"""LQR: cost against simulation, the optimum, edges, and that 2 / lambda is local."""

from __future__ import annotations

import math

import pytest
import torch

from dyntune.errors import InvalidArgumentError
from dyntune.rl import LQR


def problem(seed: int = 0, sigma: float = 0.1) -> LQR:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(3, 3, generator=g, dtype=torch.float64)
    a = 0.9 * a / float(torch.linalg.eigvals(a).abs().max())
    eye = torch.eye(3, dtype=torch.float64)
    return LQR(
        a=a, b=torch.randn(3, 2, generator=g, dtype=torch.float64), q=eye, r=0.5 * eye[:2, :2], noise=eye, sigma=sigma
    )


def slope(lqr: LQR, gain: torch.Tensor) -> torch.Tensor:
    leaf = gain.clone().requires_grad_()
    return torch.autograd.grad(lqr.cost(leaf), leaf)[0]


def test_the_cost_is_that_of_running_the_system() -> None:
    lqr = problem(sigma=0.5)
    gain = 0.7 * lqr.optimum()
    g = torch.Generator().manual_seed(1)
    x, costs = torch.zeros(20_000, 3).double(), []
    for step in range(60):
        u = -x @ gain.T + lqr.sigma * torch.randn(20_000, 2, generator=g, dtype=torch.float64)
        if step >= 40:  # M^40 has forgotten the start
            costs.append((x @ lqr.q * x).sum(-1) + (u @ lqr.r * u).sum(-1))
        x = x @ lqr.a.T + u @ lqr.b.T + torch.randn(20_000, 3, generator=g, dtype=torch.float64)
    means = torch.stack(costs).mean(0)  # of each path
    assert float(means.mean()) == pytest.approx(float(lqr.cost(gain)), abs=5 * float(means.std()) / math.sqrt(20_000))


@pytest.mark.parametrize("seed", range(10))
def test_the_edge_at_the_optimum(seed: int) -> None:
    lqr = problem(seed)
    optimum = lqr.optimum()
    assert float(slope(lqr, optimum).norm()) < 1e-8
    values, vectors = torch.linalg.eigh(lqr.hessian(optimum))
    assert float(values[0]) > 0
    edge, push = lqr.critical_lr(optimum), 1e-6 * vectors[:, -1].view_as(optimum)
    for share, comes_back in ((0.98, True), (1.02, False)):
        gain = optimum + push
        for _ in range(60):
            gain = gain - share * edge * slope(lqr, gain)
        moved = float(((gain - optimum) * push).sum() / push.square().sum())
        assert (abs(moved) < 1) is comes_back


def test_the_edge_is_local() -> None:
    """Towards gains that do not stabilise, curvature grows without bound: no learning rate is stable everywhere."""
    lqr = problem(sigma=0.0)
    optimum = lqr.optimum()
    away = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lqr.is_stable(optimum + middle * away) else (low, middle)
    rates = [lqr.critical_lr(optimum + share * low * away) for share in (0.0, 0.9, 0.99, 0.999)]
    assert rates[3] < rates[2] < rates[1] < rates[0]
    assert rates[3] < 1e-4 * rates[0]
    assert float(lqr.cost(optimum + 1.01 * high * away)) == math.inf


def test_the_entropy_does_not_touch_the_gain() -> None:
    lqr = problem()
    log_std = torch.tensor(0.3).double()
    assert float(lqr.entropy(log_std)) == pytest.approx(2 * (0.3 + 0.5 * math.log(2 * math.pi * math.e)))
    assert float(torch.autograd.functional.hessian(lqr.entropy, log_std)) == 0.0


def test_bad_input() -> None:
    lqr = problem()
    with pytest.raises(InvalidArgumentError, match="shapes"):
        LQR(a=lqr.a, b=lqr.b, q=lqr.r, r=lqr.r, noise=lqr.noise)
    with pytest.raises(InvalidArgumentError, match="sigma=-1"):
        problem(sigma=-1.0)
