r"""Largest stable (preconditioned) eigenvalue times learning rate, per optimizer.

On a quadratic with curvature :math:`\lambda` along an eigenvector, an optimizer is a linear recurrence; it is stable as
long as the roots of its characteristic polynomial lie inside the unit circle. With learning rate :math:`\eta`, momentum
:math:`\beta`, decoupled weight decay :math:`\gamma`:

=====================================  ================  ==========================================================
optimizer (PyTorch semantics)          matrix            stable while
=====================================  ================  ==========================================================
SGD                                    H (+ decay)       :math:`\eta\lambda < 2`
SGD, momentum, dampening d             H (+ decay)       :math:`\eta\lambda < (2 + 2\beta)/(1-d)`
SGD, Nesterov                          H (+ decay)       :math:`\eta\lambda < (2 + 2\beta)/(1 + 2\beta)`
Adam                                   P^-1/2 H P^-1/2   :math:`\eta\lambda < (2 + 2\beta_1)/(1-\beta_1)`
AdamW                                  P^-1/2 H P^-1/2   :math:`\eta\lambda < (1+\beta_1)(2-\eta\gamma)/(1-\beta_1)`
=====================================  ================  ==========================================================

Sources: Cohen et al. (2021), arXiv:2103.00065, for gradient descent with momentum; Cohen et al. (2022),
arXiv:2207.14484, for Adam with a frozen preconditioner (38 for :math:`\beta_1 = 0.9`); the AdamW row follows from the
same recurrence with the factor :math:`1-\eta\gamma` on the parameters and is tested on ``torch.optim`` itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dyntune.errors import InvalidArgumentError
from dyntune.records import Estimate

__all__ = ["Recurrence", "batch_threshold", "recurrence", "threshold"]

DETERMINISTIC_SOURCE = "Cohen et al. 2021, arXiv:2103.00065; Cohen et al. 2022, arXiv:2207.14484"
STOCHASTIC_SOURCE = (
    "Andreyev and Beneventano 2024, arXiv:2412.20553 (batch sharpness); arXiv:2604.14108 (momentum, small batches: "
    "2 (1 - beta) / eta); for Adam by the change of variable eta -> (1 - beta1) eta, derived, not published"
)


@dataclass(frozen=True)
class Recurrence:
    """What an optimizer does on one eigenvector of a quadratic.

    Args:
        family: ``"sgd"`` or ``"adam"``.
        momentum: Heavy-ball momentum, or Adam's beta1.
        dampening: SGD's dampening.
        nesterov: Whether SGD looks ahead.
        lr: Learning rate (of the first group).
        coupled_decay: Weight decay added to the gradient: the matrix is H + decay I.
        decoupled_decay: Weight decay applied to the parameters directly.
    """

    family: str
    momentum: float
    lr: float
    dampening: float = 0.0
    nesterov: bool = False
    coupled_decay: float = 0.0
    decoupled_decay: float = 0.0

    @property
    def preconditioned(self) -> bool:
        """Whether the threshold speaks of P^-1/2 H P^-1/2 rather than of H."""
        return self.family == "adam"


def recurrence(optimizer: torch.optim.Optimizer) -> Recurrence:
    """Read the recurrence off a torch optimizer (its first parameter group).

    Raises:
        InvalidArgumentError: An optimizer without an entry in the table.
    """
    group = optimizer.param_groups[0]
    if group.get("maximize", False):
        raise InvalidArgumentError("the optimizer has maximize=True: stability here is that of minimisation.")
    decay = float(group.get("weight_decay", 0.0))
    lr = float(group["lr"])
    if isinstance(optimizer, torch.optim.AdamW):
        return Recurrence("adam", float(group["betas"][0]), lr, decoupled_decay=decay)
    if isinstance(optimizer, torch.optim.Adam):
        decoupled = bool(group.get("decoupled_weight_decay", False))
        kind = {"decoupled_decay": decay} if decoupled else {"coupled_decay": decay}
        return Recurrence("adam", float(group["betas"][0]), lr, **kind)
    if isinstance(optimizer, torch.optim.SGD):
        return Recurrence(
            "sgd",
            float(group["momentum"]),
            lr,
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            coupled_decay=decay,
        )
    raise InvalidArgumentError(
        f"no stability threshold is known for {type(optimizer).__name__}; known are SGD (momentum, Nesterov), Adam and "
        "AdamW."
    )


def threshold(optimizer: torch.optim.Optimizer | Recurrence) -> Estimate:
    """Largest stable value of eigenvalue times learning rate, for full-batch training.

    For Adam and AdamW the eigenvalue is that of P^-1/2 H P^-1/2 with the bias-corrected P = sqrt(v) + eps held fixed.
    With coupled weight decay the matrix is H + decay I (P^-1/2 (H + decay I) P^-1/2).

    Args:
        optimizer: A torch SGD, Adam or AdamW, or a :class:`Recurrence`.

    Returns:
        An exact number (``low == value == high``), dimensionless.

    Raises:
        InvalidArgumentError: An optimizer without an entry in the table.

    Source:
        Table and sources in ``dyntune.stability.thresholds``.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> round(float(threshold(torch.optim.SGD([w], lr=0.1, momentum=0.9))), 6)
        3.8
        >>> round(float(threshold(torch.optim.Adam([w], lr=0.1))), 6)
        38.0
    """
    r = optimizer if isinstance(optimizer, Recurrence) else recurrence(optimizer)
    beta = r.momentum
    if r.family == "adam":
        value = (1 + beta) * (2 - r.lr * r.decoupled_decay) / (1 - beta)
    elif r.nesterov:
        value = (2 + 2 * beta) / (1 + 2 * beta)
    elif beta:
        value = (2 + 2 * beta) / (1 - r.dampening)
    else:
        value = 2.0
    return _exact(value, f"characteristic polynomial of {r.family}; {DETERMINISTIC_SOURCE}")


def batch_threshold(optimizer: torch.optim.Optimizer | Recurrence) -> Estimate:
    """Where *batch* sharpness times learning rate settles for small-batch training.

    Batch sharpness is the curvature of each batch along its own (preconditioned) gradient, averaged over batches. The
    value is 2 for SGD and Adam, 2 (1 - momentum) for heavy-ball SGD: with small batches momentum multiplies the step
    by 1 / (1 - momentum) without damping the noise.

    Args:
        optimizer: As for :func:`threshold`.

    Returns:
        A number without an interval of its own; the source says which part is published and which derived.
    """
    r = optimizer if isinstance(optimizer, Recurrence) else recurrence(optimizer)
    value = 2.0 if r.family == "adam" else 2.0 * (1 - r.momentum) / (1 - r.dampening)
    return _exact(value, f"small-batch plateau; {STOCHASTIC_SOURCE}")


def _exact(value: float, method: str) -> Estimate:
    return Estimate(value=value, low=value, high=value, level=1.0, unit="1", method=method, covers="numerical")
