"""Hooks on an optimizer's steps that do not keep their owner alive and go when it goes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from dyntune.errors import InvalidArgumentError

__all__ = ["Watcher", "attach", "base_optimizer"]


class Watcher(Protocol):
    """What hooks call."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are there, the step is not made."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The step is made."""


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's and Lightning's, whose own step hooks never run.

    Raises:
        InvalidArgumentError: There is none.
    """
    found = optimizer
    for _ in range(8):  # wrappers within wrappers end somewhere
        inner = getattr(found, "optimizer", None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, torch.optim.Optimizer) or not hasattr(found, "_optimizer_step_pre_hooks"):
        raise InvalidArgumentError(
            f"optimizer is a {type(optimizer).__name__}: the monitor attaches to the step hooks of a torch optimizer "
            "(register_step_pre_hook), and this has none. Pass the torch.optim.Optimizer that steps the model."
        )
    return found


def attach(optimizer: torch.optim.Optimizer, watcher: Watcher) -> Callable[[], None]:
    """Call the watcher around every step, for as long as it lives.

    Neither hook fires where a gradient scaler skips the step, or while gradients are accumulated. The optimizer holds
    no reference to the watcher: when that is garbage, the hooks are removed.

    Args:
        optimizer: A torch optimizer; see :func:`base_optimizer`.
        watcher: Whose methods are called.

    Returns:
        What removes both hooks; may be called again.
    """
    reference = weakref.ref(watcher)

    def before_step(optimizer: torch.optim.Optimizer) -> None:
        watcher = reference()
        if watcher is not None:
            watcher.before_step(optimizer)

    def after_step(optimizer: torch.optim.Optimizer) -> None:
        watcher = reference()
        if watcher is not None:
            watcher.after_step(optimizer)

    left_alone = _Uncompiled(before_step), _Uncompiled(after_step)

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        seen = left_alone[0] if torch.compiler.is_dynamo_compiling() else before_step
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            seen(optimizer)
            return None
        # step(closure), as Lightning calls it: gradients are there when the closure returns, and not yet here.
        then_seen = _followed(closure, lambda: seen(optimizer))
        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_seen}
        return (args[0], then_seen, *args[2:]), kwargs

    def after(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            left_alone[1](optimizer)
        else:
            after_step(optimizer)

    handles = (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))

    def detach() -> None:
        for handle in handles:
            handle.remove()

    weakref.finalize(watcher, detach).atexit = False
    return detach


class _Uncompiled:
    """A call that ``torch.compile`` leaves alone where the optimizer's step is compiled, hooks and all.

    Only code that is being compiled asks for that: the switch costs as much as the rest of a hook.
    """

    def __init__(self, call: Callable[[torch.optim.Optimizer], None]) -> None:
        self._call = call
        self._disabled: Callable[[torch.optim.Optimizer], None] | None = None

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        if self._disabled is None:
            disable: Any = torch.compiler.disable  # has no types
            self._disabled = disable(self._call)
        self._disabled(optimizer)


def _followed(closure: Callable[[], Any], then: Callable[[], None]) -> Callable[[], Any]:
    """The closure, with something done after its first call; L-BFGS makes more within a step."""
    first = True

    def followed() -> Any:
        nonlocal first
        result = closure()
        if first:
            first = False
            then()
        return result

    return followed
