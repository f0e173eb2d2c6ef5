r"""Largest stable (preconditioned) eigenvalue times learning rate, per optimizer.

On a quadratic with curvature :math:`\lambda` along an eigenvector, an optimizer with its preconditioner held fixed is a
linear recurrence; it is stable as long as the roots of its characteristic polynomial lie inside the unit circle. With
learning rate :math:`\eta`, momentum :math:`\beta`, decoupled weight decay :math:`\gamma`, and
:math:`c = 2 - \eta\gamma`:

===================================  ================  ============================================================
optimizer (PyTorch semantics)        matrix            stable while :math:`\eta\lambda` is below
===================================  ================  ============================================================
SGD                                  H (+ decay)       :math:`2`
SGD, momentum, dampening d           H (+ decay)       :math:`2 (1 + \beta) / (1 - d)`
SGD, Nesterov                        H (+ decay)       :math:`2 (1 + \beta) / (1 + 2\beta)`
SGD, momentum, decoupled decay       H                 :math:`c (1 + \beta)`
RMSprop, momentum                    P (+ decay)       :math:`2 (1 + \beta)`
Adagrad, Adadelta, Adafactor         P                 :math:`2`, or :math:`c`
Adam, Adamax, RAdam (late)           P (+ decay)       :math:`2 (1 + \beta) / (1 - \beta)`
AdamW                                P                 :math:`c (1 + \beta) / (1 - \beta)`
NAdam (late)                         P (+ decay)       :math:`c (1 + \beta) / ((1 - \beta)(1 + 2\beta))`
Schedule-Free SGD, AdamW (late)      H, P              :math:`2 / (1 - \beta)`
sign SGD, Lion, Muon, Rprop          none              no linear threshold: the step does not shrink with the gradient
===================================  ================  ============================================================

"P" is :math:`P^{-1/2} H P^{-1/2}` with the diagonal P of :mod:`dyntune.stability.scales`, "+ decay" adds coupled weight
decay to H, "late" means after momentum's own schedule has settled.

Sources: Cohen et al. (2021), arXiv:2103.00065, for gradient descent with momentum; Cohen et al. (2022),
arXiv:2207.14484, for Adam with a frozen preconditioner (38 for :math:`\beta = 0.9`). The other rows follow from the
recurrences; every row that torch.optim implements is tested on it, at 0.98 and 1.02 times the value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from dyntune.errors import InvalidArgumentError
from dyntune.records import Estimate, Status

__all__ = ["Family", "Recurrence", "batch_threshold", "recurrence", "threshold"]

DETERMINISTIC_SOURCE = "Cohen et al. 2021, arXiv:2103.00065; Cohen et al. 2022, arXiv:2207.14484"
STOCHASTIC_SOURCE = (
    "Andreyev and Beneventano 2024, arXiv:2412.20553 (batch sharpness); arXiv:2604.14108 (momentum, small batches: "
    "2 (1 - beta) / eta); for averaged momentum (Adam) by the change of variable eta -> (1 - beta) eta, derived, not "
    "published"
)

# heavy-ball: momentum sums gradients; averaging: momentum is a running mean of them.
Family: TypeAlias = Literal["sgd", "rmsprop", "adam", "nadam", "schedule-free", "sign"]
_PRECONDITIONED: frozenset[str] = frozenset({"rmsprop", "adam", "nadam"})
_SIGN_LIKE = frozenset({"Lion", "Muon", "SignSGD", "Signum", "Rprop"})


@dataclass(frozen=True)
class Recurrence:
    """What an optimizer does on one eigenvector of a quadratic.

    Args:
        family: ``"sgd"`` and ``"rmsprop"`` sum gradients in their momentum, ``"adam"`` and ``"nadam"`` average them;
            ``"schedule-free"``; ``"sign"`` for steps whose length does not follow the gradient.
        momentum: Heavy-ball momentum, or beta1.
        lr: Learning rate (of the first group); only decoupled decay needs it.
        dampening: SGD's dampening.
        nesterov: Whether SGD looks ahead.
        coupled_decay: Weight decay added to the gradient: the matrix is H + decay I.
        decoupled_decay: Weight decay applied to the parameters directly.
        scaled: Whether a Schedule-Free optimizer has a preconditioner.
    """

    family: Family
    momentum: float
    lr: float
    dampening: float = 0.0
    nesterov: bool = False
    coupled_decay: float = 0.0
    decoupled_decay: float = 0.0
    scaled: bool = False

    @property
    def preconditioned(self) -> bool:
        """Whether the threshold speaks of P^-1/2 H P^-1/2 rather than of H."""
        return self.family in _PRECONDITIONED or self.scaled


def recurrence(optimizer: torch.optim.Optimizer) -> Recurrence:
    """Read the recurrence off a torch optimizer (its first parameter group).

    Raises:
        InvalidArgumentError: An optimizer without an entry in the table.
    """
    group = optimizer.param_groups[0]
    if group.get("maximize", False):
        raise InvalidArgumentError("the optimizer has maximize=True: stability here is that of minimisation.")
    name = type(optimizer).__name__
    lr = float(group["lr"])
    if name in _SIGN_LIKE:
        return Recurrence("sign", 0.0, lr)
    if "ScheduleFree" in name:
        beta = float(group["betas"][0]) if "betas" in group else float(group["momentum"])
        return Recurrence("schedule-free", beta, lr, scaled="betas" in group)
    if isinstance(optimizer, torch.optim.SGD):
        return _sgd(group, lr)
    decay = _decay(optimizer, group)
    if isinstance(optimizer, torch.optim.RMSprop):
        return Recurrence("rmsprop", float(group["momentum"]), lr, **decay)
    if isinstance(optimizer, (torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adafactor)):
        return Recurrence("rmsprop", 0.0, lr, **decay)
    if isinstance(optimizer, torch.optim.NAdam):
        return Recurrence("nadam", float(group["betas"][0]), lr, **decay)
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.Adamax, torch.optim.RAdam)):  # AdamW is an Adam
        return Recurrence("adam", float(group["betas"][0]), lr, **decay)
    raise InvalidArgumentError(
        f"no stability threshold is known for {name}; known are SGD (momentum, Nesterov), RMSprop, Adagrad, Adadelta, "
        "Adafactor, Adam, AdamW, NAdam, RAdam, Adamax and Schedule-Free."
    )


def _sgd(group: dict[str, Any], lr: float) -> Recurrence:
    momentum = float(group["momentum"])
    return Recurrence(
        "sgd",
        momentum,
        lr,
        # torch dampens what enters the momentum buffer, and nothing where there is none
        dampening=float(group["dampening"]) if momentum else 0.0,
        nesterov=bool(group["nesterov"]),
        coupled_decay=float(group["weight_decay"]),
    )


def _decay(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Any:
    """Weight decay as keyword: AdamW and Adafactor decouple always, others where the group says so."""
    decay = float(group.get("weight_decay", 0.0))
    decoupled = isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adafactor)) or group.get(
        "decoupled_weight_decay", False
    )
    return {"decoupled_decay" if decoupled else "coupled_decay": decay}


def threshold(optimizer: torch.optim.Optimizer | Recurrence) -> Estimate:
    """Largest stable value of eigenvalue times learning rate, for full-batch training.

    For adaptive methods the eigenvalue is that of P^-1/2 H P^-1/2 with P held fixed (see the module's table); with
    coupled weight decay the matrix is H + decay I in the place of H.

    Args:
        optimizer: A torch optimizer, or a :class:`Recurrence`.

    Returns:
        An exact number (``low == value == high``), dimensionless; refused (``value=None``) for sign-like methods, whose
        step length does not follow the gradient: they oscillate with the amplitude of their step and do not diverge.

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
        >>> threshold(torch.optim.Rprop([w])).status.name
        'REFUSED'
    """
    r = optimizer if isinstance(optimizer, Recurrence) else recurrence(optimizer)
    if r.family == "sign":
        return _none("no linear threshold: the length of a sign-like step does not follow the gradient")
    beta, twice = r.momentum, 2 - r.lr * r.decoupled_decay
    value = {
        "sgd": twice * (1 + beta) / ((1 + 2 * beta) if r.nesterov else (1 - r.dampening)),
        "rmsprop": twice * (1 + beta),
        "adam": twice * (1 + beta) / (1 - beta),
        "nadam": twice * (1 + beta) / ((1 - beta) * (1 + 2 * beta)),
        "schedule-free": 2 / (1 - beta),
    }[r.family]
    return _exact(value, f"characteristic polynomial of {r.family}; {DETERMINISTIC_SOURCE}")


def batch_threshold(optimizer: torch.optim.Optimizer | Recurrence) -> Estimate:
    """Where *batch* sharpness times learning rate settles for small-batch training.

    Batch sharpness is the curvature of each batch along its own (preconditioned) gradient, averaged over batches. The
    value is 2 over what one gradient moves the parameters in the long run: 2 for SGD and for averaged momentum,
    2 (1 - momentum) / (1 - dampening) for momentum that sums gradients, which with small batches multiplies the step
    without damping the noise.

    Args:
        optimizer: As for :func:`threshold`.

    Returns:
        A number without an interval of its own; the source says which part is published and which derived. Refused for
        sign-like and Schedule-Free methods, of which neither is known.
    """
    r = optimizer if isinstance(optimizer, Recurrence) else recurrence(optimizer)
    if r.family in ("sign", "schedule-free"):
        return _none(f"no small-batch threshold is known for {r.family} methods")
    summed = r.family in ("sgd", "rmsprop")
    value = 2.0 * (1 - r.momentum) / (1 - r.dampening) if summed else 2.0
    return _exact(value, f"small-batch plateau; {STOCHASTIC_SOURCE}")


def _exact(value: float, method: str) -> Estimate:
    return Estimate(value=value, low=value, high=value, level=1.0, unit="1", method=method, covers="numerical")


def _none(reason: str) -> Estimate:
    return Estimate(
        value=None,
        low=0.0,
        high=math.inf,
        level=None,
        unit="1",
        method="none",
        covers="numerical",
        status=Status.REFUSED,
        reason=reason,
    )
