r"""A Gaussian squashed by tanh, as SAC's policy is: a bandit on (-1, 1) with all derivatives.

With u = mu + s eps every part of J is an expectation of some h(u), so that derivatives are those along the path:

.. math:: \partial_\mu = E h', \quad \partial_l = E[s \epsilon h'], \quad \partial_{\mu\mu} = E h'', \quad
          \partial_{\mu l} = E[s \epsilon h''], \quad \partial_{ll} = E[s \epsilon h' + s^2 \epsilon^2 h''],

with l = log s. For the entropy, beside the Gaussian's own l, h is log(1 - tanh^2 u): h' = -2 tanh u, h'' = -2 sech^2 u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch

from dyntune.errors import InvalidArgumentError, NonFiniteError
from dyntune.rl.bandit import tanh_gaussian_entropy

__all__ = ["SquashedBandit"]

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]

# Newton's steps double the digits near the maximum; the damped ones before were never more than 40 in the tests.
NEWTON_STEPS = 200


@dataclass(frozen=True)
class SquashedBandit:
    """An action a = tanh(u), u from N(mu, e^(2 l)), reward ``-k (a - target)^2 / 2``; parameters (mu, l).

    Args:
        k: Curvature of the reward, >= 0; with 0 only the entropy is left.
        target: The best action, in (-1, 1).
        nodes: Of the Gauss-Hermite quadrature, 2 to 200. Derivatives are those of the sum, whatever it approximates.

    Raises:
        InvalidArgumentError: A number outside its range.

    Accuracy:
        See :func:`dyntune.rl.tanh_gaussian_entropy`.

    Example:
        >>> bandit = SquashedBandit(k=0.0)
        >>> best = bandit.optimum(alpha=1.0)
        >>> [round(float(x), 2) for x in (best[1], bandit.value(best, 1.0))]  # of at most log 2 = 0.69
        [-0.13, 0.68]
    """

    k: float
    target: float = 0.0
    nodes: int = 120

    def __post_init__(self) -> None:
        if not 0 <= self.k < math.inf or not -1 < self.target < 1 or not 2 <= self.nodes <= 200:
            raise InvalidArgumentError(
                f"k={self.k}, target={self.target}, nodes={self.nodes}: k is finite and >= 0, the target an action "
                "that tanh reaches, in (-1, 1), and the weights of more than 200 nodes are lost to rounding."
            )

    @cached_property
    def _rule(self) -> Pair:
        points, weights = np.polynomial.hermite_e.hermegauss(self.nodes)
        return torch.from_numpy(points), torch.from_numpy(weights / weights.sum())

    def value(self, parameters: torch.Tensor, alpha: float) -> torch.Tensor:
        """J of (mu, l), with the differential entropy in nats; can be differentiated."""
        mu, log_std = parameters
        points, weights = self._rule
        actions = torch.tanh(mu + log_std.exp() * points)
        reward = -self.k / 2 * ((actions - self.target) ** 2 @ weights)
        return reward + alpha * tanh_gaussian_entropy(mu, log_std, nodes=self.nodes)

    def gradient(self, parameters: torch.Tensor, alpha: float) -> torch.Tensor:
        """Of J, shape (2,)."""
        noise, first, _ = self._slopes(parameters, alpha)
        weights = self._rule[1]
        return torch.stack([first @ weights, (noise * first) @ weights + alpha])

    def hessian(self, parameters: torch.Tensor, alpha: float) -> torch.Tensor:
        """Of J, shape (2, 2)."""
        noise, first, second = self._slopes(parameters, alpha)
        terms = torch.stack([second, noise * second, noise * first + noise**2 * second])
        return (terms @ self._rule[1])[[0, 1, 1, 2]].view(2, 2)

    def entropy_hessian(self, parameters: torch.Tensor) -> torch.Tensor:
        """Of the entropy alone, shape (2, 2)."""
        return SquashedBandit(0.0, nodes=self.nodes).hessian(parameters, 1.0)

    def _slopes(self, parameters: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``s eps``, h' and h'' at the nodes."""
        noise = parameters[1].exp() * self._rule[0]
        t = torch.tanh(parameters[0] + noise)
        square, miss = 1 - t**2, t - self.target
        first = -self.k * miss * square - 2 * alpha * t
        second = -self.k * square * (square - 2 * t * miss) - 2 * alpha * square
        return noise, first, second

    def optimum(self, alpha: float) -> torch.Tensor:
        """(mu, l) of the best policy, by Newton's steps on minus the absolute Hessian, halved where J falls; alpha > 0.

        Raises:
            NonFiniteError: No maximum was reached.
        """
        if not 0 < alpha < math.inf:
            raise InvalidArgumentError(f"alpha={alpha}: without an entropy bonus the optimum lies at infinity.")
        width = min(0.25, alpha / self.k) if self.k > 0 else 0.25  # of the Gaussian arm, up to 1/2
        x = torch.tensor([math.atanh(self.target), 0.5 * math.log(width)], dtype=torch.float64)
        for _ in range(NEWTON_STEPS):
            gradient = self.gradient(x, alpha)
            values, vectors = torch.linalg.eigh(self.hessian(x, alpha))
            scale = float(values.abs().max())
            if float(gradient.norm()) <= 1e-12 * scale:  # a step shorter than rounding of the parameters
                return x
            direction = vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(1e-6 * scale))
            before, step = float(self.value(x, alpha)), 1.0
            slack = 8 * torch.finfo(torch.float64).eps * abs(before)  # J is flat to rounding near its maximum
            while float(self.value(x + step * direction, alpha)) < before - slack and step > 1e-9:
                step /= 2
            x = x + step * direction
        raise NonFiniteError(f"no maximum was found for alpha={alpha} in {NEWTON_STEPS} steps: gradient {gradient}.")

    def critical_lr(self, alpha: float) -> float:
        """Largest rate at which gradient ascent stays at the optimum."""
        return 2 / float(torch.linalg.eigvalsh(-self.hessian(self.optimum(alpha), alpha))[-1])
