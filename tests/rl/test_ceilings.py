"""Theory's smoothness constants are never passed, on random MDPs and policies."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.functional import hessian

from dyntune.errors import InvalidArgumentError
from dyntune.rl import SoftmaxBandit, TabularMDP, return_hessian, smoothness_ceiling


def worst(count: int) -> float:
    """The largest spectral norm of a Hessian over its ceiling."""
    found = 0.0
    g = torch.Generator().manual_seed(0)
    for seed in range(count):
        states, actions = 2 + seed % 4, 2 + seed % 3
        gamma, tau = (0.0, 0.5, 0.9, 0.99)[seed % 4], (0.0, 0.1, 1.0)[seed % 3]
        mdp = TabularMDP.random(states=states, actions=actions, gamma=gamma, seed=seed)
        logits = 3 * torch.rand((), generator=g) * torch.randn(states, actions, generator=g).double()
        size = logits.numel()
        matrix = hessian(lambda x, mdp=mdp, tau=tau: mdp.value(x, tau), logits).reshape(size, size)
        found = max(found, float(torch.linalg.matrix_norm(matrix, 2)) / mdp.smoothness_bound(tau))
    return found


def test_ceilings_hold() -> None:
    share = worst(60)
    assert 0 < share < 1
    assert share < 0.1  # and are far too large for advice


@pytest.mark.slow
def test_ceilings_hold_on_a_thousand() -> None:
    assert 0 < worst(1000) < 1


def shares(count: int, *, seed: int) -> dict[float, float]:
    """The largest spectral norm over its derived ceiling, by discount: hostile MDPs, all kinds of policies."""
    g = torch.Generator().manual_seed(seed)
    found: dict[float, float] = {}
    for index in range(count):
        states, actions, gamma = 2 + index % 4, 2 + index % 3, (0.0, 0.3, 0.5, 0.9, 0.99)[index % 5]
        mdp = TabularMDP.random(states=states, actions=actions, gamma=gamma, seed=seed + index)
        if index % 2:  # certain transitions and rewards of 0 or 1 curve more than their averages do
            following = torch.randint(states, (states, actions), generator=g)
            rewards = torch.randint(2, (states, actions), generator=g).double()
            mdp = TabularMDP(torch.eye(states).double()[following], rewards, mdp.start, gamma)
        scale = 3 * float(torch.rand((), generator=g))
        logits = scale * torch.randn(states, actions, generator=g, dtype=torch.float64)
        for tau in (0.0, 0.1, 1.0, 10.0):
            norm = float(torch.linalg.matrix_norm(return_hessian(mdp, logits, tau), 2))
            ceiling = smoothness_ceiling(actions=actions, gamma=gamma, tau=tau)
            assert ceiling < mdp.smoothness_bound(tau)  # sharper than what is published
            found[gamma] = max(found.get(gamma, 0.0), norm / ceiling)
    return found


def test_derived_ceilings_hold_on_a_thousand() -> None:
    found = shares(1000, seed=10_000)
    assert max(found.values()) <= 1
    assert found[0.0] > 0.1  # and without a future they are within an order of magnitude


@pytest.mark.slow
def test_derived_ceilings_hold_on_many() -> None:
    assert max(shares(20_000, seed=1_000_000).values()) <= 1


@pytest.mark.parametrize("actions", [2, 3])
def test_the_worst_bandit_stays_below_its_ceiling(actions: int) -> None:
    """Climbing on logits and rewards to the largest Hessian that there is: more than a third of the ceiling."""
    worst = 0.0
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        rewards = torch.zeros(actions, dtype=torch.float64)
        rewards[: 1 + seed % (actions - 1)] = 1.0
        x = torch.randn(actions, generator=g, dtype=torch.float64).requires_grad_()
        climb = torch.optim.Adam([x], lr=0.05)
        for _ in range(200):
            norm = torch.linalg.eigvalsh(SoftmaxBandit(rewards).hessian(x, 0.0)).abs().max()
            climb.zero_grad()
            (-norm).backward()
            climb.step()
            worst = max(worst, float(norm.detach()))
    assert 1 / 3 < worst / smoothness_ceiling(actions=actions) <= 1
    assert worst == pytest.approx(1 / (3 * math.sqrt(3)), rel=2e-3)  # the sharp constant of two arms, and of three


def test_ceilings_scale_as_they_say() -> None:
    assert smoothness_ceiling(actions=3) == 0.5
    assert smoothness_ceiling(actions=3, gamma=0.9) == pytest.approx(500)
    assert smoothness_ceiling(actions=3, spread=7.0) == 3.5
    alone = smoothness_ceiling(actions=4, tau=1.0, spread=0.0)
    assert alone == pytest.approx(2 * math.log(4))
    for wrong in ({"actions": 0}, {"actions": 2, "gamma": 1.0}, {"actions": 2, "tau": -1.0}):
        with pytest.raises(InvalidArgumentError):
            smoothness_ceiling(**wrong)  # type: ignore[arg-type]
