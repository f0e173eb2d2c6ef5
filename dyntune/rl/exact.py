r"""Second derivatives of a tabular MDP's return in closed form, and what DiCE makes of it.

With V = T(theta, V) the soft Bellman equation, differentiating twice gives

.. math:: d^2 V = M (T_{\theta\theta} + 2 T_{\theta V}\, dV), \qquad dV = M\, T_\theta, \qquad
          M = (I - \gamma P_\pi)^{-1} .

The first term is a block per state, the Hessian of a bandit whose arms are worth Q(s, .): what the ratio-form surrogate
of PPO has. The second, how actions move the states and values that come later, is what the surrogate leaves out.

Derived here; checked against automatic differentiation in ``tests/rl/test_exact.py``.
"""

from __future__ import annotations

import torch

from dyntune.rl.mdp import TabularMDP

__all__ = ["dice_return", "ratio_hessian", "return_hessian"]


def return_hessian(mdp: TabularMDP, logits: torch.Tensor, tau: float = 0.0) -> torch.Tensor:
    """Hessian of ``mdp.value(logits, tau)``, shape (S * A, S * A); affine in tau.

    Args:
        mdp: The problem.
        logits: Shape (S, A), float64.
        tau: Weight of the entropy in every step.

    Accuracy:
        Rounding; 1e-10 of automatic differentiation in the tests.
    Cost:
        One inverse (S, S) and products of (S * A, S) matrices: 0.5 ms with 16 states and 4 actions on one CPU thread,
        where differentiating the solve twice takes 20 ms.

    Example:
        >>> mdp = TabularMDP.random(states=3, actions=2, gamma=0.9, seed=0)
        >>> logits = torch.zeros(3, 2, dtype=torch.float64)
        >>> H = torch.autograd.functional.hessian(mdp.value, logits).reshape(6, 6)
        >>> bool(torch.allclose(return_hessian(mdp, logits), H, atol=1e-10))
        True
    """
    pi = torch.softmax(logits, -1)
    states, actions = pi.shape
    visits, pull = mdp.visits(logits), pi * mdp.advantages(logits, tau)
    moved = torch.einsum("sa,sat->st", pi, mdp.transitions)
    reach = torch.linalg.inv(torch.eye(states, dtype=pi.dtype) - mdp.gamma * moved)  # M: (S, S)
    value_slope = (reach[:, :, None] * pull).reshape(states, -1)  # dV: (S, S * A)
    fisher = _fisher(pi)
    coupling = mdp.gamma * torch.einsum("s,sab,sbt->sat", visits, fisher, mdp.transitions)
    crossed = coupling.reshape(states * actions, states) @ value_slope
    blocks = visits[:, None, None] * (_block(pi, pull) - tau * fisher)
    hessian: torch.Tensor = _diagonal(blocks) + crossed + crossed.T
    return hessian


def ratio_hessian(mdp: TabularMDP, logits: torch.Tensor) -> torch.Tensor:
    """Hessian of ``mdp.surrogate(x, kind="ratio", at=logits)`` at x = logits: the true one without its cross terms.

    Args:
        mdp: The problem.
        logits: Shape (S, A), float64.

    Returns:
        Shape (S * A, S * A), one block per state.
    """
    pi = torch.softmax(logits, -1)
    blocks = mdp.visits(logits)[:, None, None] * _block(pi, pi * mdp.advantages(logits))
    return _diagonal(blocks)


def dice_return(mdp: TabularMDP, logits: torch.Tensor, *, at: torch.Tensor) -> torch.Tensor:
    """What DiCE's objective is in expectation over trajectories of the policy `at`: a scalar to be differentiated.

    Every reward is weighted by the product of the ratios of all actions up to it, so that the chain has the kernel P
    times ratio. Its derivatives of every order at ``logits = at`` are those of the return.

    Args:
        mdp: The problem.
        logits: Shape (S, A), float64.
        at: Logits of the policy that made the data, shape (S, A); held still.

    Source:
        Foerster et al. (2018), arXiv:1802.05098.
    """
    old = torch.log_softmax(at.detach(), -1)
    weighted = old.exp() * (torch.log_softmax(logits, -1) - old).exp()
    moved = torch.einsum("sa,sat->st", weighted, mdp.transitions)
    eye = torch.eye(mdp.states, dtype=moved.dtype)
    value: torch.Tensor = mdp.start @ torch.linalg.solve(eye - mdp.gamma * moved, (weighted * mdp.rewards).sum(-1))
    return value


def _fisher(pi: torch.Tensor) -> torch.Tensor:
    """``diag(pi) - pi pi^T`` for every state, shape (S, A, A)."""
    return torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]


def _block(pi: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """``diag(g) - pi g^T - g pi^T`` for every state, shape (S, A, A)."""
    crossed = pi[:, :, None] * pull[:, None, :]
    return torch.diag_embed(pull) - crossed - crossed.transpose(-1, -2)


def _diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks (S, A, A) on the diagonal of a matrix (S * A, S * A)."""
    matrix: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix
