r"""SAC's automatic temperature: a coupled map whose stability no Hessian shows.

The loss of the temperature is linear in log alpha, so its Hessian is zero and 2 / lambda says nothing. What matters is
the map of policy and temperature together. At the fixed point of a Gaussian arm (:class:`~dyntune.rl.GaussianBandit`),
with the policy's rate eta, the temperature's rate eta_a and both updated at once,

.. math:: M = \begin{pmatrix} 1 - 2 \eta \alpha & \eta \alpha \\ -\eta_a & 1 \end{pmatrix} ,

which is stable iff :math:`\eta_a < 2` and :math:`\eta \alpha (4 - \eta_a) < 4` (Jury), and overdamped iff
:math:`\eta_a \le \eta \alpha`: as alpha becomes small in training, it always ends by oscillating.

Derived here, and checked by iterating the map in ``tests/rl/test_temperature.py``. Plain gradient steps; with Adam the
constants change, and it is a sketch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dyntune.errors import InvalidArgumentError

__all__ = ["TemperatureMap", "feasible_entropy"]


@dataclass(frozen=True)
class TemperatureMap:
    """The linear map of (log std, log alpha) about the fixed point.

    Args:
        lr: Of the policy, > 0.
        alpha_lr: Of log alpha, > 0.
        alpha: Temperature at the fixed point, > 0.

    Example:
        >>> (
        ...     TemperatureMap(lr=0.05, alpha_lr=1.9, alpha=1.0).stable,
        ...     TemperatureMap(lr=0.05, alpha_lr=2.1, alpha=1.0).stable,
        ... )
        (True, False)
    """

    lr: float
    alpha_lr: float
    alpha: float

    def __post_init__(self) -> None:
        for name in ("lr", "alpha_lr", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidArgumentError(f"{name}={getattr(self, name)}: rates and temperatures are positive.")

    @property
    def jacobian(self) -> np.ndarray:
        """M, shape (2, 2)."""
        step = self.lr * self.alpha
        return np.array([[1 - 2 * step, step], [-self.alpha_lr, 1.0]])

    @property
    def radius(self) -> float:
        """Largest modulus of its eigenvalues."""
        return float(np.abs(np.linalg.eigvals(self.jacobian)).max())

    @property
    def stable(self) -> bool:
        """Jury's conditions."""
        return self.alpha_lr < 2 and self.lr * self.alpha * (4 - self.alpha_lr) < 4

    @property
    def oscillates(self) -> bool:
        """Whether it turns around the fixed point on its way."""
        return self.alpha_lr > self.lr * self.alpha

    @property
    def period(self) -> float:
        """Steps of one turn; infinite where it does not oscillate."""
        angle = abs(float(np.angle(np.linalg.eigvals(self.jacobian)).max()))
        return 2 * math.pi / angle if angle > 0 else math.inf


def feasible_entropy(
    target: float, *, actions: int | None = None, dimensions: int | None = None, scale: float = 1.0
) -> tuple[bool, float]:
    """Whether a target entropy can be reached, and the largest entropy there is, in nats.

    With a target that cannot, log alpha grows at every step and never comes back.

    Args:
        target: Of the policy's entropy; the sum over dimensions.
        actions: Number of discrete actions: log A at most.
        dimensions: Of an action squashed by tanh: log(2 scale) each at most.
        scale: Half the width of an action's range, where log-probabilities are of the scaled action.

    Raises:
        InvalidArgumentError: Neither or both of `actions` and `dimensions`, or a number that is not positive.

    Example:
        >>> feasible_entropy(-3.0, dimensions=3)[0], feasible_entropy(-1.0, dimensions=1, scale=0.1)[0]
        (True, False)
    """
    if (actions is None) == (dimensions is None):
        raise InvalidArgumentError("give either actions=, for a discrete policy, or dimensions=, for one with tanh.")
    if (actions is not None and actions < 1) or (dimensions is not None and dimensions < 1) or not scale > 0:
        raise InvalidArgumentError(f"actions={actions}, dimensions={dimensions}, scale={scale}: all are positive.")
    largest = math.log(actions) if actions is not None else (dimensions or 1) * math.log(2 * scale)
    return target < largest, largest
