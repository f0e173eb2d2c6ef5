"""Closed-form Hessians of tabular MDPs: against automatic differentiation, DiCE, and what a surrogate leaves out."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian

from dyntune.rl import TabularMDP, dice_return, ratio_hessian, return_hessian

GAMMAS = (0.0, 0.5, 0.9, 0.99)


def problem(gamma: float, seed: int = 0, states: int = 4, actions: int = 3) -> tuple[TabularMDP, torch.Tensor]:
    mdp = TabularMDP.random(states=states, actions=actions, gamma=gamma, seed=seed)
    return mdp, torch.randn(states, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derived(function: object, logits: torch.Tensor) -> torch.Tensor:
    return hessian(function, logits).reshape(logits.numel(), -1)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_the_hessian_of_the_return(gamma: float, tau: float) -> None:
    for seed in range(3):
        mdp, logits = problem(gamma, seed)
        wanted = derived(lambda x, mdp=mdp: mdp.value(x, tau), logits)
        # 1e-10 of its size: at gamma = 0.99 that is some hundred times the reward's.
        assert torch.allclose(return_hessian(mdp, logits, tau), wanted, atol=1e-10 * max(1.0, float(wanted.norm())))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_what_each_surrogate_s_hessian_is(gamma: float) -> None:
    """DiCE has the true one, the ratio form its blocks, the log-probability nothing."""
    mdp, logits = problem(gamma, 5)
    true, ratio = return_hessian(mdp, logits), ratio_hessian(mdp, logits)
    size = float(true.norm())
    assert torch.allclose(derived(lambda x: dice_return(mdp, x, at=logits), logits), true, atol=1e-10 * max(1.0, size))
    surrogate = derived(lambda x: mdp.surrogate(x, kind="ratio", at=logits), logits)
    assert torch.allclose(ratio, surrogate, atol=1e-10 * max(1.0, size))
    assert float(derived(lambda x: mdp.surrogate(x, kind="log-prob", at=logits), logits).norm()) <= 1e-12 * size
    missing = float((true - ratio).norm()) / size
    assert missing <= 1e-14 if gamma == 0.0 else missing > 0.1


def test_dice_has_the_gradient_and_value_of_the_return() -> None:
    mdp, logits = problem(0.9, 1)
    leaf = logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(dice_return(mdp, leaf, at=logits), leaf)
    (wanted,) = torch.autograd.grad(mdp.value(leaf), leaf)
    assert torch.allclose(slope, wanted, atol=1e-12)
    elsewhere = logits + 0.5 * torch.randn(4, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    # Re-weighted by ratios it is the other policy's return, whichever policy made the data.
    assert float(dice_return(mdp, elsewhere, at=logits)) == pytest.approx(float(mdp.value(elsewhere)), rel=1e-12)


def test_it_is_affine_in_tau_and_flat_along_common_shifts() -> None:
    mdp, logits = problem(0.9, 2)
    none, half, one = (return_hessian(mdp, logits, tau) for tau in (0.0, 0.5, 1.0))
    assert torch.allclose(half, (none + one) / 2, atol=1e-11)
    shift = torch.zeros(4, 3, dtype=torch.float64)
    shift[1] = 1.0  # the logits of one state together
    assert float((one @ shift.reshape(-1)).norm()) <= 1e-12 * float(one.norm())
