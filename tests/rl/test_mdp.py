"""Tabular MDPs: values against simulation, what surrogates make of the Hessian, edges at the soft optimum, ceilings."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.functional import hessian

from dyntune.errors import InvalidArgumentError
from dyntune.rl import TabularMDP

TAUS = [0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0]


def problem(gamma: float = 0.9, seed: int = 0, states: int = 5, actions: int = 3) -> tuple[TabularMDP, torch.Tensor]:
    mdp = TabularMDP.random(states=states, actions=actions, gamma=gamma, seed=seed)
    logits = torch.randn(states, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mdp, logits


def flat(matrix: torch.Tensor, size: int) -> torch.Tensor:
    return matrix.reshape(size, size)


def test_values_are_those_of_iterating_the_bellman_equation() -> None:
    mdp, logits = problem()
    pi, tau = torch.softmax(logits, -1), 0.3
    v = torch.zeros(5).double()
    for _ in range(400):
        q = mdp.rewards - tau * pi.log() + mdp.gamma * torch.einsum("sat,t->sa", mdp.transitions, v)
        v = (pi * q).sum(-1)
    assert torch.allclose(mdp.values(logits, tau), v, atol=1e-10)
    assert float(mdp.visits(logits).sum()) == pytest.approx(1 / (1 - mdp.gamma))
    assert torch.allclose((pi * mdp.advantages(logits, tau)).sum(-1), torch.zeros(5).double(), atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_gradients_of_surrogates_are_right_and_their_hessians_are_not(gamma: float) -> None:
    mdp, logits = problem(gamma)
    size = logits.numel()

    def slope(function: object) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]  # type: ignore[operator]

    truth = slope(mdp.value)
    for kind in ("ratio", "log-prob"):
        assert torch.allclose(slope(lambda x, kind=kind: mdp.surrogate(x, kind=kind, at=logits)), truth, atol=1e-10)
    exact = flat(hessian(mdp.value, logits), size)
    ratio = flat(hessian(lambda x: mdp.surrogate(x, kind="ratio", at=logits), logits), size)
    wrong = flat(hessian(lambda x: mdp.surrogate(x, kind="log-prob", at=logits), logits), size)
    assert float(wrong.abs().max()) < 1e-12  # identically zero: exact advantages average to zero
    error = float((ratio - exact).norm() / exact.norm())
    if gamma == 0.0:
        assert error < 1e-10
    else:
        assert error > 0.1
    assert float(torch.linalg.eigvalsh(exact).abs().max()) > 1e-3


@pytest.mark.parametrize("tau", TAUS)
def test_the_edge_at_the_soft_optimum(tau: float) -> None:
    mdp, _ = problem(0.8, seed=3, states=4, actions=3)
    optimum = mdp.soft_optimum(tau)
    leaf = optimum.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mdp.value(leaf, tau), leaf)
    assert float(gradient.norm()) < 1e-9
    matrix = -flat(hessian(lambda x: mdp.value(x, tau), optimum), optimum.numel())
    values, vectors = torch.linalg.eigh(matrix)
    edge, push = 2 / float(values[-1]), 1e-6 * vectors[:, -1].view_as(optimum)
    for share, comes_back in ((0.98, True), (1.02, False)):
        x = optimum + push
        for _ in range(60):
            leaf = x.detach().requires_grad_()
            x = x + share * edge * torch.autograd.grad(mdp.value(leaf, tau), leaf)[0]
        # Along the steepest direction alone: others, far from their edge, hardly move in so few steps.
        moved = float(((x - optimum) * push).sum() / push.square().sum())
        assert (abs(moved) < 1) is comes_back


def test_local_and_soft_entropy_differ_but_agree_without_a_future() -> None:
    mdp, logits = problem(0.0)
    size = logits.numel()
    soft = flat(hessian(lambda x: mdp.value(x, 1.0) - mdp.value(x, 0.0), logits), size)
    local = flat(hessian(lambda x: mdp.local_entropy(x, at=logits), logits), size)
    assert torch.allclose(soft, local, atol=1e-10)


def test_frozen_lake_is_what_gymnasium_says() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    table = gymnasium.make("FrozenLake-v1", is_slippery=True).unwrapped.P
    mdp = TabularMDP.from_table(table, gamma=0.99)
    assert (mdp.states, mdp.actions) == (16, 4)
    greedy = mdp.soft_optimum(1e-4)
    # The value of the slippery 4 x 4 lake at this discount, known from value iteration.
    v = torch.zeros(16).double()
    for _ in range(5000):
        v = (mdp.rewards + 0.99 * torch.einsum("sat,t->sa", mdp.transitions, v)).amax(-1)
    assert float(mdp.value(greedy)) == pytest.approx(float(v[0]), abs=2e-3)
    assert float(v[0]) == pytest.approx(0.542, abs=1e-3)


def test_bad_input() -> None:
    mdp, logits = problem()
    with pytest.raises(InvalidArgumentError, match="gamma=1"):
        TabularMDP(mdp.transitions, mdp.rewards, mdp.start, 1.0)
    with pytest.raises(InvalidArgumentError, match="no distribution"):
        TabularMDP(mdp.transitions * 2, mdp.rewards, mdp.start, 0.9)
    with pytest.raises(InvalidArgumentError, match="shape"):
        TabularMDP(mdp.transitions[:2], mdp.rewards, mdp.start, 0.9)
    with pytest.raises(InvalidArgumentError, match="kind="):
        mdp.surrogate(logits, kind="dice")
    with pytest.raises(InvalidArgumentError, match="infinite logits"):
        mdp.soft_optimum(0.0)
    assert mdp.smoothness_bound(1.0) == pytest.approx((12 + 8 * math.log(3)) / 0.1**3)


def test_the_benchmark_s_own_gradient_is_the_exact_one() -> None:
    """benchmarks/rl/frozen_lake.py takes many tables at once, in NumPy."""
    pytest.importorskip("gymnasium")
    from benchmarks.rl.frozen_lake import gradient

    mdp, logits = problem(0.9)
    tables = torch.stack([logits, logits + 0.3 * torch.randn(5, 3, dtype=torch.float64)])
    for found, table in zip(gradient(mdp, tables.numpy(), 0.2), tables, strict=True):
        leaf = table.clone().requires_grad_()
        (exact,) = torch.autograd.grad(mdp.value(leaf, 0.2), leaf)
        assert torch.allclose(torch.from_numpy(found), exact, atol=1e-12)
