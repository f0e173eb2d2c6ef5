"""LQR with a free width of exploration: alpha acts on the gain's curvature through the states that noise visits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dyntune.rl import LQR

ALPHAS = [0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 40.0]


def problem() -> LQR:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 3, generator=g, dtype=torch.float64)
    a = 0.9 * a / float(torch.linalg.eigvals(a).abs().max())
    eye = torch.eye(3, dtype=torch.float64)
    b = torch.randn(3, 2, generator=g, dtype=torch.float64)
    return LQR(a=a, b=b, q=eye, r=0.5 * eye[:2, :2], noise=eye)


def objective(lqr: LQR, theta: torch.Tensor, alpha: float) -> torch.Tensor:
    """Minus cost plus alpha times entropy, of gain and log sigma; the cost is affine in sigma^2."""
    gain, log_std = theta[:-1].view(2, 3), theta[-1]
    quiet = replace(lqr, sigma=0.0).cost(gain)
    noise = replace(lqr, sigma=1.0).cost(gain) - quiet
    return -quiet - (2 * log_std).exp() * noise + alpha * lqr.entropy(log_std)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_edge_over_alpha(alpha: float) -> None:
    """``2 N x Sigma`` in the gain, Sigma growing with sigma^2 = alpha m / 2 tr N, 2 m alpha in log sigma."""
    lqr = problem()
    gain = lqr.optimum()
    closed, eye = lqr.closed_loop(gain), torch.eye(9, dtype=torch.float64)
    running = (lqr.q + gain.T @ lqr.r @ gain).reshape(-1)
    p = torch.linalg.solve(eye - torch.kron(closed.T, closed.T), running).view(3, 3)
    n = lqr.r + lqr.b.T @ p @ lqr.b
    variance = alpha * 2 / (2 * float(torch.trace(n)))
    source = lqr.noise + variance * lqr.b @ lqr.b.T
    sigma = torch.linalg.solve(eye - torch.kron(closed, closed), source.reshape(-1)).view(3, 3)
    theta = torch.cat([gain.reshape(-1), 0.5 * torch.log(torch.tensor([variance], dtype=torch.float64))])

    wanted = torch.block_diag(2 * torch.kron(n, sigma), torch.tensor([[4 * alpha]], dtype=torch.float64))
    found = -torch.autograd.functional.hessian(lambda x: objective(lqr, x, alpha), theta)
    assert torch.allclose(found, wanted, atol=1e-10 * float(wanted.norm()))
    assert torch.allclose(replace(lqr, sigma=variance**0.5).hessian(gain), wanted[:-1, :-1], atol=1e-8)

    values, vectors = torch.linalg.eigh(wanted)
    edge, push = 2 / float(values[-1]), 1e-6 * vectors[:, -1]
    for share, comes_back in ((0.98, True), (1.02, False)):
        x = theta + push
        for _ in range(60):
            leaf = x.detach().requires_grad_()
            x = x + share * edge * torch.autograd.grad(objective(lqr, leaf, alpha), leaf)[0]
        moved = float(((x - theta) @ push) / (push @ push))
        assert (abs(moved) < 1) is comes_back


def test_more_exploration_never_raises_the_edge() -> None:
    lqr = problem()
    rates = [replace(lqr, sigma=s).critical_lr(lqr.optimum()) for s in (0.0, 0.3, 1.0, 3.0)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0] / 2
