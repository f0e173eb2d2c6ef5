"""Copies and stand-ins through which a framework's objects are measured without being written to."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.objective.batches import freeze_batches
from dyntune.suggest.lr import num_drawn

__all__ = ["Silent", "StandIn", "drawn", "measured_copy", "unscheduled"]

Module = TypeVar("Module", bound=nn.Module)


class StandIn:
    """Reads what it does not hold itself from another object; what is written stays here.

    Args:
        original: What is read from.
        held: Attributes that differ.

    Example:
        >>> stand_in = StandIn([3, 1], count=None)
        >>> stand_in.count is None, stand_in.index(1)
        (True, 1)
    """

    def __init__(self, original: Any, **held: Any) -> None:
        vars(self).update(held, _original=original)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks an object that is being copied, before it holds anything
            raise AttributeError(name)
        return getattr(vars(self)["_original"], name)


class Silent:
    """In the place of a logger: has every attribute, each of which can be called, and does nothing."""

    def __getattr__(self, name: str) -> Silent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Silent:  # noqa: D102
        return self


def measured_copy(module: Module) -> Module:
    """The module with attributes of its own and the same parameters (which no measurement writes to).

    What a step writes to attributes (metrics, lists of outputs) then stays in the copy, and the copy costs no memory
    but that of its buffers.

    Raises:
        InvalidArgumentError: An attribute cannot be copied.
    """
    shared: dict[int, Any] = {id(p): p for p in module.parameters()}
    try:
        return copy.deepcopy(module, shared)
    except (TypeError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"{type(module).__name__} cannot be copied ({error}), and yours is not to be written to. Keep what cannot "
            "be copied out of its attributes, or call dyntune.suggest_lr(model, batches, loss_fn)."
        ) from error


def drawn(loader: Any, *, module: nn.Module, max_gradients: int) -> tuple[Any, ...]:
    """As many batches as :func:`dyntune.suggest_lr` draws, on the module's device; the loader is put back.

    Raises:
        BatchError: See :func:`dyntune.objective.batches.freeze_batches`.
    """
    device = next(module.parameters()).device
    return freeze_batches(loader, num_batches=num_drawn(max_gradients), device=device)


def unscheduled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer with the same parameters and state, and the rates from before a scheduler set them.

    A warm-up begins at zero and a decay ends there; ratios between groups are then lost.
    """
    twin = copy.copy(optimizer)
    twin.param_groups = [{**group, "lr": group.get("initial_lr", group["lr"])} for group in optimizer.param_groups]
    return twin
