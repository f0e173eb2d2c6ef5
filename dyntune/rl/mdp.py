r"""Finite Markov decision processes with a softmax policy: values, gradients and Hessians without sampling.

For logits theta[s, a] the value is one linear solve, :math:`V = (I - \gamma P_\pi)^{-1} (r_\pi + \tau h)`, with the
entropies h of the rows where the entropy is part of the return (*soft*), and with
:math:`J = \rho \cdot V + \alpha \sum_s d(s) H(\pi(\cdot | s))` at a fixed state distribution d where it is a bonus on
the batch (*local*), which is what A2C and PPO have. Automatic differentiation through the solve is exact, so that what
the usual surrogates make of the Hessian can be compared with it:

* the **log-probability** surrogate :math:`\sum d\, \pi\, A \log \pi_\theta` has the right gradient; for a table of
  logits and exact advantages its Hessian is *zero*, since :math:`\nabla^2 \log \pi` is the same for all actions and
  the advantages average to zero;
* the **ratio** surrogate :math:`\sum d\, \pi_{old} A\, \pi_\theta / \pi_{old}` is exact at :math:`\gamma = 0`, and
  leaves out how actions now move the states and advantages later.

Sources: Agarwal et al. (2019), arXiv:1908.00261 (smoothness 8 / (1 - gamma)^3 of the softmax value for rewards in
[0, 1]); Mei et al. (2020), arXiv:2005.06392 (the entropy's); Foerster et al. (2018), arXiv:1802.05098 (surrogates'
second derivatives).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dyntune.errors import InvalidArgumentError

__all__ = ["TabularMDP"]


@dataclass(frozen=True)
class TabularMDP:
    """S states, A actions.

    Args:
        transitions: P[s, a, s'], rows sum to 1. Shape (S, A, S), float64.
        rewards: Mean reward of (s, a). Shape (S, A).
        start: Distribution of the first state. Shape (S,).
        gamma: Discount, in [0, 1).

    Raises:
        InvalidArgumentError: Shapes that do not fit, rows that are no distributions, or a discount outside [0, 1).
    """

    transitions: torch.Tensor
    rewards: torch.Tensor
    start: torch.Tensor
    gamma: float

    def __post_init__(self) -> None:
        states, actions = self.rewards.shape
        if self.transitions.shape != (states, actions, states) or self.start.shape != (states,):
            raise InvalidArgumentError(
                f"transitions has shape {tuple(self.transitions.shape)}, rewards {tuple(self.rewards.shape)} and start "
                f"{tuple(self.start.shape)}: they are (S, A, S), (S, A) and (S,)."
            )
        if not 0 <= self.gamma < 1:
            raise InvalidArgumentError(f"gamma={self.gamma}: values are finite for a discount in [0, 1).")
        for name, rows in (("transitions", self.transitions), ("start", self.start)):
            if bool((rows < 0).any()) or not torch.allclose(rows.sum(-1), torch.ones((), dtype=rows.dtype), atol=1e-9):
                raise InvalidArgumentError(f"{name} has a row that is no distribution: entries >= 0 that sum to 1.")

    @classmethod
    def random(cls, *, states: int, actions: int, gamma: float, seed: int) -> TabularMDP:
        """Transitions uniform on the simplex, rewards uniform in [0, 1], the start uniform over states."""
        g = torch.Generator().manual_seed(seed)
        raw = -torch.rand(states, actions, states, generator=g, dtype=torch.float64).clamp_min(1e-300).log()
        return cls(
            transitions=raw / raw.sum(-1, keepdim=True),
            rewards=torch.rand(states, actions, generator=g, dtype=torch.float64),
            start=torch.full((states,), 1 / states, dtype=torch.float64),
            gamma=gamma,
        )

    @classmethod
    def from_table(
        cls,
        table: Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]],
        *,
        gamma: float,
        start: int = 0,
    ) -> TabularMDP:
        """From ``env.unwrapped.P`` of gymnasium's toy-text environments, such as FrozenLake.

        Args:
            table: state -> action -> (probability, next state, reward, terminated).
            gamma: Discount, in [0, 1).
            start: The first state.

        What has terminated stays where it is without reward.
        """
        states, actions = len(table), len(table[0])
        transitions = torch.zeros(states, actions, states, dtype=torch.float64)
        rewards = torch.zeros(states, actions, dtype=torch.float64)
        ended = {s2 for rows in table.values() for row in rows.values() for _, s2, _, done in row if done}
        for s, rows in table.items():
            for a, row in rows.items():
                if s in ended:
                    transitions[s, a, s] = 1.0
                    continue
                for probability, after, reward, _ in row:
                    transitions[s, a, after] += probability
                    rewards[s, a] += probability * reward
        first = torch.zeros(states, dtype=torch.float64)
        first[start] = 1.0
        return cls(transitions, rewards, first, gamma)

    @property
    def states(self) -> int:
        """S."""
        return self.rewards.shape[0]

    @property
    def actions(self) -> int:
        """A."""
        return self.rewards.shape[1]

    def value(self, logits: torch.Tensor, tau: float = 0.0) -> torch.Tensor:
        """The return from the start, with the entropy weighted by `tau` in every later step; can be differentiated.

        Args:
            logits: Shape (S, A).
            tau: Weight of the entropy.
        """
        return self.start @ self.values(logits, tau)

    def values(self, logits: torch.Tensor, tau: float = 0.0) -> torch.Tensor:
        """V, shape (S,)."""
        log_pi = torch.log_softmax(logits, -1)
        pi = log_pi.exp()
        moved = torch.einsum("sa,sat->st", pi, self.transitions)
        reward = (pi * (self.rewards - tau * log_pi)).sum(-1)
        eye = torch.eye(self.states, dtype=moved.dtype)
        solved: torch.Tensor = torch.linalg.solve(eye - self.gamma * moved, reward)
        return solved

    def visits(self, logits: torch.Tensor) -> torch.Tensor:
        """Expected discounted number of visits of each state from the start, which sums to 1 / (1 - gamma)."""
        moved = torch.einsum("sa,sat->st", torch.softmax(logits, -1), self.transitions)
        eye = torch.eye(self.states, dtype=moved.dtype)
        solved: torch.Tensor = torch.linalg.solve((eye - self.gamma * moved).T, self.start)
        return solved

    def advantages(self, logits: torch.Tensor, tau: float = 0.0) -> torch.Tensor:
        """Q - V of the present policy, shape (S, A); with `tau`, of the soft return."""
        log_pi = torch.log_softmax(logits, -1)
        v = self.values(logits, tau)
        q = self.rewards - tau * log_pi + self.gamma * torch.einsum("sat,t->sa", self.transitions, v)
        return q - v[:, None]

    def surrogate(self, logits: torch.Tensor, *, kind: str, at: torch.Tensor | None = None) -> torch.Tensor:
        """What a policy-gradient method ascends, with exact visits and advantages of the policy `at`.

        Args:
            logits: Shape (S, A).
            kind: ``"ratio"`` or ``"log-prob"``.
            at: Logits that visits and advantages belong to; None: `logits`, held still.
        """
        old = (logits if at is None else at).detach()
        weights = self.visits(old)[:, None] * torch.softmax(old, -1) * self.advantages(old)
        log_pi = torch.log_softmax(logits, -1)
        if kind == "ratio":
            return (weights * torch.exp(log_pi - torch.log_softmax(old, -1))).sum()
        if kind == "log-prob":
            return (weights * log_pi).sum()
        raise InvalidArgumentError(f'kind={kind!r}: "ratio" or "log-prob".')

    def local_entropy(self, logits: torch.Tensor, *, at: torch.Tensor | None = None) -> torch.Tensor:
        """Entropies of the rows, weighted by the visits of the policy `at`: the bonus of A2C and PPO."""
        log_pi = torch.log_softmax(logits, -1)
        visits = self.visits((logits if at is None else at).detach())
        return -(visits @ (log_pi.exp() * log_pi).sum(-1))

    def soft_optimum(self, tau: float, *, rtol: float = 1e-13, most: int = 100_000) -> torch.Tensor:
        """Logits of the best policy of the soft return, ``Q* / tau``, by soft value iteration; tau > 0."""
        if not 0 < tau < math.inf:
            raise InvalidArgumentError(f"tau={tau}: without entropy the best policy has infinite logits.")
        v = torch.zeros(self.states, dtype=torch.float64)
        for _ in range(most):
            q = self.rewards + self.gamma * torch.einsum("sat,t->sa", self.transitions, v)
            new = tau * torch.logsumexp(q / tau, -1)
            if float((new - v).abs().max()) <= rtol * max(1.0, float(new.abs().max())):
                break
            v = new
        q = self.rewards + self.gamma * torch.einsum("sat,t->sa", self.transitions, v)
        return q / tau

    def smoothness_bound(self, tau: float = 0.0) -> float:
        """Theory's bound on the spectral norm of the Hessian of the soft return, for rewards in [0, 1].

        Far too large for advice (by 500 and more where it was measured), and never to be passed: a check on what is
        computed. ``(8 + tau (4 + 8 log A)) / (1 - gamma)^3``: Agarwal et al., Lemma D.4; Mei et al., Lemma 14, whose
        constants were taken from second hand.
        """
        return (8 + tau * (4 + 8 * math.log(self.actions))) / (1 - self.gamma) ** 3
