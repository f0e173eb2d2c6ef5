"""What a Lightning module, its datamodule and its trainer say about the training to come."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader

from dyntune.errors import InvalidArgumentError
from dyntune.integrations.stand_ins import unscheduled

__all__ = ["check_module", "find_autocast", "find_clip_norm", "find_loader", "find_num_steps", "find_optimizer"]

# The classes that Lightning's own versions of hooks are in.
FRAMEWORK = ("LightningModule", "LightningDataModule", "ModelHooks", "DataHooks")
# What Trainer(precision=...) means for suggest_lr: mixed precision, or none.
AUTOCAST = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def overridden(owner: Any, hook: str) -> bool:
    """Whether a hook is the user's."""
    defined = [kind.__name__ for kind in type(owner).__mro__ if hook in vars(kind)]
    return bool(defined) and defined[0] not in FRAMEWORK


def check_module(module: Any) -> None:
    """Raise InvalidArgumentError unless this is a Lightning module with automatic optimization."""
    for name in ("training_step", "configure_optimizers", "automatic_optimization"):
        if not hasattr(module, name):
            raise InvalidArgumentError(
                f"module is a {type(module).__name__} without {name}: this door is for a LightningModule. For any "
                "other model call dyntune.suggest_lr(model, batches, ...)."
            )
    if not module.automatic_optimization:
        raise InvalidArgumentError(
            f"{type(module).__name__} has automatic_optimization=False: which step belongs to which rate is known to "
            "its code only. Call dyntune.suggest_lr(model, batches, loss_fn, optimizer=...) for each optimizer."
        )


def find_loader(module: Any, data: Any, trainer: Any) -> tuple[Any, Any]:
    """The training batches, and the object whose transfer hooks they go through (after the module's).

    A datamodule's ``prepare_data`` and ``setup`` run on a shallow copy of it.

    Raises:
        InvalidArgumentError: No data, or several loaders that are drawn from together.
    """
    source = copy.copy(data) if hasattr(data, "train_dataloader") else None
    if source is not None:
        source.trainer = trainer
        source.prepare_data()
        source.setup("fit")
        data = source.train_dataloader()
    elif data is None and overridden(module, "train_dataloader"):
        data = module.train_dataloader()
    if data is None:
        raise InvalidArgumentError(
            f"no data: {type(module).__name__} has no train_dataloader(). Pass a datamodule or a loader: "
            "suggest_lr(module, data)."
        )
    parts = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, (list, tuple)) else ()
    if any(isinstance(part, DataLoader) for part in parts) or type(data).__name__ == "CombinedLoader":
        raise InvalidArgumentError(
            f"the training data are several loaders ({type(data).__name__}), which Lightning combines in one of four "
            "ways. Pass the batches as training_step gets them: suggest_lr(module, [batch, ...])."
        )
    return data, module if source is None else source


def find_num_steps(trainer: Any, loader: Any) -> int | None:
    """Optimizer steps of ``trainer.fit``; None where it has no end."""
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and isinstance(loader, Sized):
        limit = trainer.limit_train_batches
        batches = int(len(loader) * limit) if isinstance(limit, float) else min(len(loader), limit)
        ends.append(math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs)
    return min(ends, default=None)


def find_clip_norm(module: Any, trainer: Any) -> float | None:
    """The norm that the trainer clips gradients to.

    Raises:
        InvalidArgumentError: Clipping by value, or by the module's own hook.
    """
    if overridden(module, "configure_gradient_clipping"):
        raise InvalidArgumentError(
            f"{type(module).__name__} clips gradients in a hook of its own (configure_gradient_clipping), which cannot "
            "be read. Pass clip_norm=, the norm that comes closest; math.inf for none."
        )
    if not trainer.gradient_clip_val:
        return None
    algorithm = getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)
    if algorithm == "value":
        raise InvalidArgumentError(
            'gradient_clip_algorithm="value" changes the direction of steps, for which no stability limit is known. '
            "Clip by norm, or pass clip_norm= (math.inf for none)."
        )
    return float(trainer.gradient_clip_val)


def find_autocast(trainer: Any) -> torch.dtype | None:
    """Dtype of the trainer's mixed precision.

    Raises:
        InvalidArgumentError: A precision that suggest_lr has no counterpart for.
    """
    if trainer.precision not in AUTOCAST:
        raise InvalidArgumentError(
            f"precision={trainer.precision!r} converts the module's weights when training starts, and suggest_lr would "
            f"measure the present ones. It knows {', '.join(AUTOCAST)}; convert the module yourself and leave the "
            "trainer out."
        )
    return AUTOCAST[trainer.precision]


def find_optimizer(module: Any) -> tuple[torch.optim.Optimizer, str | None]:
    """What ``configure_optimizers`` returns, with learning rates as without its scheduler, and the scheduler's name.

    Raises:
        InvalidArgumentError: None, or several optimizers.
    """
    found = module.configure_optimizers()
    schedulers: Any = ()
    if isinstance(found, (list, tuple)) and len(found) == 2 and isinstance(found[0], (list, tuple)):
        found, schedulers = found
    items = [item for item in (found if isinstance(found, (list, tuple)) else [found]) if item is not None]
    optimizers = [item["optimizer"] if isinstance(item, Mapping) else item for item in items]
    if len(optimizers) != 1 or not isinstance(optimizers[0], torch.optim.Optimizer):
        kinds = ", ".join(type(o).__name__ for o in optimizers) or "nothing"
        raise InvalidArgumentError(
            f"{type(module).__name__}.configure_optimizers() returned {kinds}: a learning rate is suggested for one "
            "torch optimizer. For each of several call dyntune.suggest_lr(model, batches, loss_fn, optimizer=...)."
        )
    if isinstance(items[0], Mapping) and "lr_scheduler" in items[0]:
        schedulers = items[0]["lr_scheduler"]
    first = schedulers[0] if isinstance(schedulers, (list, tuple)) and schedulers else schedulers or None
    scheduler = first["scheduler"] if isinstance(first, Mapping) else first
    return unscheduled(optimizers[0]), None if scheduler is None else type(scheduler).__name__
