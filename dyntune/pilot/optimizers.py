"""From what the user calls an optimizer to one on cloned parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.stability.scales import check_optimizer

__all__ = ["OPTIMIZER_NAMES", "OptimizerLike", "twin_optimizer"]

OptimizerFactory: TypeAlias = Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer]
OptimizerLike: TypeAlias = "str | torch.optim.Optimizer | OptimizerFactory"

# The learning rate given here is never used: every run sets its own.
_UNSET_LR = 1.0
# Momentum 0.9 is what PyTorch's and most papers' recipes use (Sutskever et al. 2013); the names are for people who have
# not chosen yet, an Optimizer or a factory says anything else.
_BY_NAME: dict[str, OptimizerFactory] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=_UNSET_LR),
    "momentum": lambda p: torch.optim.SGD(p, lr=_UNSET_LR, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=_UNSET_LR, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=_UNSET_LR),
    "adamw": lambda p: torch.optim.AdamW(p, lr=_UNSET_LR),
}
OPTIMIZER_NAMES = tuple(_BY_NAME)


def twin_optimizer(
    optimizer: OptimizerLike, originals: Mapping[str, nn.Parameter], clones: Mapping[str, torch.Tensor]
) -> torch.optim.Optimizer:
    """An optimizer of the user's type, groups and state that steps the clones.

    Args:
        optimizer: A name, a torch Optimizer on the originals, or a function ``params -> Optimizer``.
        originals: The model's trainable parameters by name.
        clones: The twin's tensors by the same names.

    Raises:
        InvalidArgumentError: Unknown name, or a type that cannot be rebuilt from its groups.
        OptimizerMismatchError: See :func:`dyntune.stability.scales.check_optimizer`.
    """
    if isinstance(optimizer, str):
        if optimizer.lower() not in _BY_NAME:
            raise InvalidArgumentError(
                f"optimizer={optimizer!r} is not known by name (known: {', '.join(_BY_NAME)}). Pass a torch Optimizer, "
                "or a function params -> Optimizer."
            )
        return _BY_NAME[optimizer.lower()](list(clones.values()))
    if isinstance(optimizer, torch.optim.Optimizer):
        check_optimizer(optimizer, originals)
        return _rebuilt(optimizer, originals, clones)
    made = optimizer(list(clones.values()))
    if not isinstance(made, torch.optim.Optimizer):
        raise InvalidArgumentError(f"the optimizer factory returned a {type(made).__name__}, not a torch Optimizer.")
    return made


def _rebuilt(
    optimizer: torch.optim.Optimizer, originals: Mapping[str, nn.Parameter], clones: Mapping[str, torch.Tensor]
) -> torch.optim.Optimizer:
    counterpart = {id(p): clones[name] for name, p in originals.items()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        settings = {k: copy.copy(v) for k, v in group.items() if k not in ("params", "initial_lr")}
        kept = [counterpart[id(p)] for p in group["params"] if id(p) in counterpart]
        groups.append({**settings, "params": kept})
    try:
        # The constructor's own arguments come from the groups, which hold every setting.
        twin = type(optimizer)(groups, **{k: v for k, v in optimizer.defaults.items() if k == "lr"})
    except TypeError as error:
        raise InvalidArgumentError(
            f"a {type(optimizer).__name__} cannot be rebuilt from its parameter groups ({error}), and yours is never "
            "stepped. Pass a function instead: optimizer=lambda params: YourOptimizer(params, ...)."
        ) from error
    for original, state in optimizer.state.items():
        if id(original) in counterpart:
            twin.state[counterpart[id(original)]] = {
                k: v.detach().clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in state.items()
            }
    return twin
