"""Theory's smoothness constants are never passed, on random MDPs and policies."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian

from dyntune.rl import TabularMDP


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
