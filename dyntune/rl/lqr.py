r"""The linear-quadratic regulator as a policy-gradient problem: a landscape that is smooth only where it is good.

State :math:`x' = A x + B u`, control :math:`u = -K x + \sigma \varepsilon`, cost :math:`E \sum_t x^T Q x + u^T R u`
averaged over time. With :math:`M = A - B K` stable, the stationary covariance solves

.. math:: \Sigma = M \Sigma M^T + W + \sigma^2 B B^T ,

and the cost of a step is :math:`\mathrm{tr}((Q + K^T R K) \Sigma) + \sigma^2 \mathrm{tr}(R)`. The entropy of the policy
depends on :math:`\sigma` alone: a bonus does not touch the Hessian in K. Where M is not stable the cost is infinite, so
that no bound on the Hessian holds everywhere: 2 / lambda at a point is about that point (Fazel et al. 2018,
arXiv:1801.05039).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dyntune.errors import InvalidArgumentError

__all__ = ["LQR"]


@dataclass(frozen=True)
class LQR:
    """The problem; all matrices in float64.

    Args:
        a: Shape (n, n).
        b: Shape (n, m).
        q: State cost, symmetric and positive semidefinite, shape (n, n).
        r: Control cost, symmetric and positive definite, shape (m, m).
        noise: Covariance W of the state noise, positive definite, shape (n, n).
        sigma: Standard deviation of the policy's noise, >= 0.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> problem = LQR(a=0.5 * one, b=one, q=one, r=one, noise=one, sigma=0.0)
        >>> round(float(problem.cost(0.5 * one)), 4)  # M = 0: the state is its noise, and u = -x / 2
        1.25
    """

    a: torch.Tensor
    b: torch.Tensor
    q: torch.Tensor
    r: torch.Tensor
    noise: torch.Tensor
    sigma: float = 0.1

    def __post_init__(self) -> None:
        n, m = self.b.shape
        shapes = (self.a.shape, self.q.shape, self.noise.shape, self.r.shape)
        if shapes != ((n, n), (n, n), (n, n), (m, m)):
            raise InvalidArgumentError(
                f"a, q, noise and r have shapes {', '.join(str(tuple(s)) for s in shapes)} with b of shape {(n, m)}: "
                "they are (n, n), (n, n), (n, n) and (m, m)."
            )
        if not 0 <= self.sigma < math.inf:
            raise InvalidArgumentError(f"sigma={self.sigma}: the policy's noise has a standard deviation of 0 or more.")

    def closed_loop(self, gain: torch.Tensor) -> torch.Tensor:
        """M = A - B K, shape (n, n)."""
        return self.a - self.b @ gain

    def is_stable(self, gain: torch.Tensor) -> bool:
        """Whether the state stays bounded under a gain of shape (m, n)."""
        return float(torch.linalg.eigvals(self.closed_loop(gain)).abs().max()) < 1

    def cost(self, gain: torch.Tensor) -> torch.Tensor:
        """Mean cost of a step, a scalar that can be differentiated twice; infinite where the gain does not stabilise.

        Args:
            gain: K, shape (m, n).
        """
        if not self.is_stable(gain.detach()):
            return torch.full((), math.inf, dtype=gain.dtype) + 0.0 * gain.sum()
        m = self.closed_loop(gain)
        n = len(m)
        source = self.noise + self.sigma**2 * self.b @ self.b.T
        # vec(Sigma) = (I - M x M)^-1 vec(W): of a few states the plain solve is as quick as any.
        eye = torch.eye(n * n, dtype=m.dtype)
        covariance = torch.linalg.solve(eye - torch.kron(m, m), source.reshape(-1)).reshape(n, n)
        running: torch.Tensor = ((self.q + gain.T @ self.r @ gain) * covariance).sum()
        return running + self.sigma**2 * torch.trace(self.r)

    def entropy(self, log_std: torch.Tensor) -> torch.Tensor:
        """Of the policy at a log standard deviation: linear in it, and free of the gain."""
        controls = self.b.shape[1]
        return controls * (log_std + math.log(2 * math.pi * math.e) / 2)

    def optimum(self) -> torch.Tensor:
        """The best gain, from the discrete algebraic Riccati equation, shape (m, n)."""
        from scipy.linalg import solve_discrete_are

        p = torch.from_numpy(solve_discrete_are(*(x.numpy() for x in (self.a, self.b, self.q, self.r))))
        best: torch.Tensor = torch.linalg.solve(self.r + self.b.T @ p @ self.b, self.b.T @ p @ self.a)
        return best

    def hessian(self, gain: torch.Tensor) -> torch.Tensor:
        """Of the cost, shape (m n, m n)."""
        size = gain.numel()
        found: torch.Tensor = torch.autograd.functional.hessian(self.cost, gain)  # type: ignore[no-untyped-call]
        return found.reshape(size, size)

    def critical_lr(self, gain: torch.Tensor) -> float:
        """2 over the largest eigenvalue at a gain: a local number."""
        return 2 / float(torch.linalg.eigvalsh(self.hessian(gain))[-1])
