"""The diagonal P of an optimizer's step ``-lr P^-1 m``, read from its state.

=====================  ==========================================================================================
optimizer              P, entry by entry
=====================  ==========================================================================================
SGD                    1
Adam, AdamW, NAdam     ``sqrt(v / (1 - beta2^t)) + eps`` (amsgrad: the running maximum of v)
RAdam                  the same over the rectification ``r_t``; 1 while it is not rectified
RMSprop                ``sqrt(v) + eps`` (centered: ``sqrt(v - mean^2) + eps``)
Adagrad                ``(sqrt(sum) + eps) (1 + (t - 1) lr_decay)``
Adadelta               ``sqrt(v + eps) / sqrt(a + eps)``
Adamax                 the running maximum (its eps is inside)
Adafactor              ``sqrt(V) lr / alpha_t``, V the factored second moment, alpha_t its relative step
=====================  ==========================================================================================

With parameter groups of different learning rates P is divided by ``lr / lr of the first group``, so that one learning
rate, the first group's, multiplies everything. Adafactor's clipping of the update's RMS is left out: it acts on the
gradient, not on curvature. Sources: the update rules in ``torch.optim``, against whose steps the tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dyntune.errors import InvalidArgumentError, OptimizerMismatchError

__all__ = ["check_optimizer", "diagonal_scale", "group_ratios"]


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise unless the optimizer holds exactly the model's trainable parameters.

    Raises:
        OptimizerMismatchError: It holds others, or lacks some: learning-rate advice would be about another problem.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    ours = {id(p) for p in parameters.values()}
    missing = [name for name, p in parameters.items() if p.requires_grad and id(p) not in held]
    # Frozen parameters may stay in an optimizer: they never get a gradient.
    frozen = {id(p) for group in optimizer.param_groups for p in group["params"] if not p.requires_grad}
    foreign = len(held - ours - frozen)
    if missing or foreign:
        raise OptimizerMismatchError(
            f"the optimizer holds {foreign} parameter(s) that are not the model's and lacks {len(missing)} of its "
            f"trainable ones ({', '.join(missing[:3])}): the learning rate would be one for another problem. Build it "
            "from this model: torch.optim.AdamW(model.parameters(), ...)."
        )


def group_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Learning rate of each parameter group over that of the first (1 where the first is zero)."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return [rate / rates[0] if rates[0] > 0 else 1.0 for rate in rates]


def diagonal_scale(
    optimizer: torch.optim.Optimizer,
    tensors: Sequence[torch.Tensor],
    *,
    ratios: Sequence[float] | None = None,
    momentum_correction: bool = False,
) -> list[torch.Tensor] | None:
    """P for the given parameters, shaped like them; None where it is the identity.

    Args:
        optimizer: A stepped torch optimizer.
        tensors: Parameters that it holds.
        ratios: Learning-rate ratios of the groups; default :func:`group_ratios`.
        momentum_correction: Multiply by ``1 - beta1^t``, the factor by which Adam's momentum correction lengthens its
            first steps; off when asking about the steady state.

    Raises:
        OptimizerMismatchError: A parameter that the optimizer does not hold.
        InvalidArgumentError: A parameter that it has not stepped yet.
    """
    wanted = {id(t) for t in tensors}
    scales: dict[int, torch.Tensor | float] = {}
    identity = True
    for group, ratio in zip(optimizer.param_groups, ratios or group_ratios(optimizer), strict=True):
        if ratio <= 0:
            raise InvalidArgumentError(
                f"a parameter group has lr ratio {ratio:g} to the first group: what is not trained has no "
                "preconditioner. Leave its parameters out (params=...)."
            )
        for p in group["params"]:
            if id(p) not in wanted:
                continue
            scale = _scale(optimizer, group, p, momentum_correction=momentum_correction)
            identity = identity and ratio == 1.0 and isinstance(scale, float)
            scales[id(p)] = scale / ratio
    missing = [i for i, t in enumerate(tensors) if id(t) not in scales]
    if missing:
        raise OptimizerMismatchError(
            f"the optimizer does not hold {len(missing)} of the {len(tensors)} parameters (the first has shape "
            f"{tuple(tensors[missing[0]].shape)}): their preconditioner is unknown."
        )
    if identity:
        return None
    # State of parameters in bfloat16 or float16 is stored like them; products are not.
    dtypes = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
    return [
        torch.as_tensor(scales[id(t)], dtype=dtype, device=t.device).expand_as(t)
        for t, dtype in zip(tensors, dtypes, strict=True)
    ]


def _scale(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], p: torch.Tensor, *, momentum_correction: bool
) -> torch.Tensor | float:
    """P of one parameter; 1.0 for SGD."""
    if isinstance(optimizer, torch.optim.SGD):
        return 1.0
    state: Mapping[str, Any] = optimizer.state.get(p, {})
    if "step" not in state:
        raise InvalidArgumentError(
            f"the {type(optimizer).__name__} has not stepped a parameter of shape {tuple(p.shape)} yet: its second "
            "moment says nothing. Measure after some training steps (20 or more)."
        )
    steps = float(state["step"])
    if "square_avg" in state:
        return _square_average(group, state)
    if "sum" in state:  # Adagrad
        total: torch.Tensor = state["sum"]
        return (total.sqrt() + float(group["eps"])) * (1 + (steps - 1) * float(group["lr_decay"]))
    if "variance" in state or "row_var" in state:
        return _adafactor(group, state, p, steps)
    beta1, beta2 = (float(b) for b in group["betas"])
    correction: float = 1 - beta1**steps if momentum_correction else 1.0
    if "exp_inf" in state:  # Adamax
        largest: torch.Tensor = state["exp_inf"]
        return largest * correction
    second: torch.Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    eps = float(group["eps"])
    if isinstance(optimizer, torch.optim.RAdam):  # adds eps before the bias correction
        rectification = _rectification(beta2, steps)
        moment: torch.Tensor = (second.sqrt() + eps) / math.sqrt(1 - beta2**steps)
        return correction if rectification is None else moment * (correction / rectification)
    corrected: torch.Tensor = second / (1 - beta2**steps)
    return correction * (corrected.sqrt() + eps)


def _square_average(group: Mapping[str, Any], state: Mapping[str, Any]) -> torch.Tensor:
    """RMSprop or Adadelta."""
    average: torch.Tensor = state["square_avg"]
    eps = float(group["eps"])
    if "acc_delta" in state:
        moved: torch.Tensor = state["acc_delta"]
        return ((average + eps) / (moved + eps)).sqrt()
    if group.get("centered", False):
        average = average - state["grad_avg"].square()
    return average.sqrt() + eps


def _adafactor(group: Mapping[str, Any], state: Mapping[str, Any], p: torch.Tensor, steps: float) -> torch.Tensor:
    lowest, least_size = group["eps"]
    second: torch.Tensor
    lowest = torch.finfo(p.dtype).eps if lowest is None else lowest
    if state.get("row_var") is not None:
        rows: torch.Tensor = state["row_var"]
        second = (rows @ state["col_var"]) / rows.mean(dim=-2, keepdim=True).clamp(min=lowest)
    else:
        second = state["variance"]
    lr = float(group["lr"])
    size = max(float(least_size), float(p.detach().norm()) / math.sqrt(p.numel()))
    second_root = second.clamp(min=float(lowest) ** 2).sqrt()
    return second_root * (lr / (size * min(lr, 1 / math.sqrt(steps))))


def _rectification(beta2: float, steps: float) -> float | None:
    """RAdam's r_t; None while the variance of the second moment is not tractable (Liu et al. 2020, eq. 6)."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * steps * beta2**steps / (1 - beta2**steps)
    if length <= 5:
        return None
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
