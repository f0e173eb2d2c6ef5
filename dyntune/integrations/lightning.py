"""A learning rate for a Lightning module, :func:`suggest_lr`, and a monitor for its training, :class:`MonitorCallback`.

For ``lightning`` and ``pytorch_lightning`` alike.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.integrations.lightning_reading import (
    check_module,
    find_autocast,
    find_clip_norm,
    find_loader,
    find_num_steps,
    find_optimizer,
    overridden,
)
from dyntune.integrations.stand_ins import Silent, StandIn, drawn, measured_copy
from dyntune.objective.context import unwrap
from dyntune.objective.state import preserved_rng, seed_all
from dyntune.records import Recommendation
from dyntune.suggest.lr import suggest_lr as plain_suggest_lr
from dyntune.suggest.progress import ProgressLike

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from dyntune.integrations.lightning_monitor import MonitorCallback

__all__ = ["MonitorCallback", "suggest_lr"]


def __getattr__(name: str) -> Any:
    """Import the callback when it is asked for: its base class is one that a learning rate does not need."""
    if name == "MonitorCallback":
        from dyntune.integrations.lightning_monitor import MonitorCallback

        return MonitorCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def suggest_lr(
    module: LightningModule,
    data: Any = None,
    *,
    trainer: Trainer | None = None,
    num_steps: int | None = None,
    schedule: str | None = None,
    clip_norm: float | None = None,
    accumulate: int | None = None,
    autocast: torch.dtype | None = None,
    max_gradients: int = 200,
    seed: int = 0,
    progress: ProgressLike = None,
    strict: bool = False,
) -> Recommendation:
    """Suggest a peak learning rate for a module as ``trainer.fit`` would train it.

    The loss is ``training_step``, the optimizer that of ``configure_optimizers``, whose ratios between parameter groups
    are kept; batches go through the transfer hooks of datamodule or module. All of it happens on a copy of the module
    that shares its parameters, so that nothing is logged and nothing of module and trainer changes.

    Args:
        module: One that optimizes automatically, with one optimizer. Measured in its present mode and on its present
            device; its hooks ``setup`` and ``configure_model`` are not called.
        data: A datamodule (``prepare_data`` and ``setup`` run on a shallow copy), a loader, or a list of batches;
            default ``module.train_dataloader()``.
        trainer: The one that will train: what the module sees as ``self.trainer``, without its loggers, and the source
            of what is not given below.
        num_steps: As for :func:`dyntune.suggest_lr`; default the trainer's.
        schedule: Recorded; default the name of the scheduler that ``configure_optimizers`` returns.
        clip_norm: Norm that gradients are clipped to, ``math.inf`` for none; default the trainer's.
        accumulate: Batches per optimizer step; default the trainer's, times its number of processes.
        autocast: Dtype of mixed precision; default that of the trainer's ``precision``.
        max_gradients: As for :func:`dyntune.suggest_lr`.
        seed: As for :func:`dyntune.suggest_lr`; also of random transfer hooks.
        progress: As for :func:`dyntune.suggest_lr`.
        strict: As for :func:`dyntune.suggest_lr`.

    Returns:
        The recommendation; its value is the rate of the first parameter group.

    Raises:
        InvalidArgumentError: Manual optimization, none or several optimizers, clipping by value or in a hook of the
            module, a precision without a counterpart, no data or several loaders; a module that cannot be copied, or
            that asks for a trainer where none is given.
        DyntuneError: As :func:`dyntune.suggest_lr`.

    Cost:
        As :func:`dyntune.suggest_lr`, and memory for a copy of the module's buffers.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> rec = suggest_lr(BoringModel(), max_gradients=100)
        >>> rec.knob, rec.cost <= 100
        ('learning rate', True)
    """
    origin: Any = unwrap(module)
    check_module(origin)
    if trainer is not None:
        clip_norm = find_clip_norm(origin, trainer) if clip_norm is None else clip_norm
        accumulate = trainer.accumulate_grad_batches * trainer.world_size if accumulate is None else accumulate
        autocast = find_autocast(trainer) if autocast is None else autocast
    with preserved_rng():
        loader, hooks = find_loader(origin, data, trainer)
        batches = drawn(loader, module=origin, max_gradients=max_gradients)
        if trainer is not None and num_steps is None:
            num_steps = find_num_steps(trainer, loader)
        seed_all(seed)
        model = _prepared(origin, trainer, num_steps)
        hooks = model if hooks is origin else hooks
        items = [{"batch": _moved(b, model, hooks), "batch_idx": i} for i, b in enumerate(batches)]
        optimizer, scheduler = find_optimizer(model)
    return plain_suggest_lr(
        model,
        items,
        _loss_fn(model),
        optimizer=optimizer,
        num_steps=num_steps,
        schedule=schedule or scheduler,
        clip_norm=clip_norm,
        accumulate=accumulate or 1,
        autocast=autocast,
        max_gradients=max_gradients,
        seed=seed,
        progress=progress,
        strict=strict,
    )


class _NoTrainer:
    """In the place of a trainer where none is given."""

    def __getattr__(self, name: str) -> Any:
        raise InvalidArgumentError(
            f"the module asks for self.trainer.{name}, and no trainer was given. Pass the one that will train it: "
            "suggest_lr(module, data, trainer=trainer)."
        )


def _prepared(module: Any, trainer: Any, num_steps: int | None) -> Any:
    """A copy that logs nothing, and whose trainer can be read only."""
    held: dict[str, Any] = {"logger": Silent(), "loggers": [], "global_step": 0, "current_epoch": 0}
    if trainer is None:
        held |= {"global_rank": 0, "local_rank": 0, "world_size": 1, "is_global_zero": True}
    if trainer is not None or num_steps is not None:
        held["estimated_stepping_batches"] = math.inf if num_steps is None else num_steps
    model = measured_copy(module)
    for part in model.modules():
        if hasattr(part, "training_step"):
            part.log = part.log_dict = part.print = Silent()
            part._trainer = StandIn(_NoTrainer() if trainer is None else trainer, **held)
    return model


def _moved(batch: Any, model: Any, hooks: Any) -> Any:
    """A batch as ``training_step`` gets it: the datamodule's transfer hooks go before the module's."""

    def hook(name: str) -> Any:
        return getattr(hooks if overridden(hooks, name) else model, name)

    batch = hook("on_before_batch_transfer")(batch, 0)
    batch = hook("transfer_batch_to_device")(batch, model.device, 0)
    return hook("on_after_batch_transfer")(batch, 0)


def _loss_fn(model: Any) -> Any:
    """``training_step`` as a loss function."""
    names = inspect.signature(model.training_step).parameters
    if "dataloader_iter" in names:
        raise InvalidArgumentError(
            f"{type(model).__name__}.training_step draws from dataloader_iter itself: which batches a loss is for is "
            "then unknown. Take a batch: training_step(self, batch, batch_idx)."
        )

    def loss_fn(module: nn.Module, item: Mapping[str, Any]) -> torch.Tensor:
        found = module.training_step(*([item["batch"], item["batch_idx"]][: len(names)]))  # type: ignore[operator]
        loss = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(loss, torch.Tensor):
            raise InvalidArgumentError(
                f"{type(module).__name__}.training_step returned a {type(found).__name__} without a loss (None skips a "
                "step): return a scalar tensor, or a mapping with one as 'loss', for every batch."
            )
        return loss

    return loss_fn
