"""A learning rate for a Transformers ``Trainer``: :func:`suggest_lr`; a monitor for it: :class:`MonitorCallback`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.integrations.stand_ins import Silent, StandIn, drawn, measured_copy, unscheduled
from dyntune.objective.context import unwrap
from dyntune.objective.state import preserved_rng
from dyntune.records import Recommendation
from dyntune.suggest.lr import suggest_lr as plain_suggest_lr
from dyntune.suggest.progress import ProgressLike

if TYPE_CHECKING:
    from transformers import Trainer

    from dyntune.integrations.transformers_monitor import MonitorCallback

__all__ = ["MonitorCallback", "suggest_lr"]


def __getattr__(name: str) -> Any:
    """Import the callback when it is asked for: its base class is one that a learning rate does not need."""
    if name == "MonitorCallback":
        from dyntune.integrations.transformers_monitor import MonitorCallback

        return MonitorCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# What the accelerator's mixed precision means for suggest_lr.
AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def suggest_lr(
    trainer: Trainer,
    *,
    max_gradients: int = 200,
    seed: int = 0,
    progress: ProgressLike = None,
    strict: bool = False,
) -> Recommendation:
    """Suggest a peak learning rate, as ``trainer.train()`` would train.

    The loss is ``compute_loss`` (label smoothing, `compute_loss_func`, and the count of labels over accumulated batches
    included), the optimizer that of ``create_optimizer``, data those of ``get_train_dataloader``. Clipping,
    accumulation, mixed precision, schedule, warm-up and length are read from the trainer's arguments; their
    ``learning_rate`` plays no part. All of it happens on a shallow copy of the trainer, and a copy of the model in
    train mode that shares its parameters: ``trainer.train()`` takes the same steps afterwards as it would have before.

    Args:
        trainer: A ``transformers.Trainer`` or a subclass, on one process with one device.
        max_gradients: As for :func:`dyntune.suggest_lr`.
        seed: As for :func:`dyntune.suggest_lr`.
        progress: As for :func:`dyntune.suggest_lr`.
        strict: As for :func:`dyntune.suggest_lr`.

    Returns:
        The recommendation, for ``TrainingArguments(learning_rate=...)``.

    Raises:
        InvalidArgumentError: No trainer, one over several processes or devices, or with DeepSpeed; mixed precision in
            float8; a model that cannot be copied.
        DyntuneError: As :func:`dyntune.suggest_lr`.

    Cost:
        As :func:`dyntune.suggest_lr`, and memory for a copy of the model's buffers.
    Assumes:
        A `compute_loss` of your own keeps what it writes in attributes: what it adds to a list or dictionary of the
        trainer stays there.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        >>> sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        >>> rows = [{"input_ids": [i % 11, 3, 5, i % 7], "labels": [i % 11, 3, 5, i % 7]} for i in range(64)]
        >>> arguments = TrainingArguments(".", use_cpu=True, dataloader_pin_memory=False, report_to="none")
        >>> trainer = Trainer(model, arguments, train_dataset=rows)
        >>> rec = suggest_lr(trainer, max_gradients=100)
        >>> rec.knob, rec.cost <= 100
        ('learning rate', True)
    """
    _check(trainer)
    args: Any = trainer.args
    with preserved_rng():
        reader = _reader(trainer)
        loader = reader.get_train_dataloader()
        batches = drawn(loader, module=reader.model, max_gradients=max_gradients)
        accumulate = min(args.gradient_accumulation_steps, len(batches))
        items = _with_counts(reader, batches, accumulate)
        found = reader.create_optimizer()
        optimizer = unscheduled(getattr(found, "optimizer", found))  # out of accelerate's wrapper
    num_steps = _num_steps(args, loader)

    def loss_fn(model: nn.Module, item: Mapping[str, Any]) -> torch.Tensor:
        inputs = reader._prepare_inputs(dict(item["inputs"]))
        loss: torch.Tensor = reader.compute_loss(model, inputs, num_items_in_batch=item["count"])
        # Over the labels of all accumulated batches: those losses are added up, and here they are averaged.
        return loss * accumulate if _adds_up(reader, item["count"]) else loss

    return plain_suggest_lr(
        reader.model,
        items,
        loss_fn,
        optimizer=optimizer,
        num_steps=num_steps,
        schedule=_schedule(trainer, num_steps),
        clip_norm=args.max_grad_norm or None,
        accumulate=accumulate,
        autocast=AUTOCAST[str(trainer.accelerator.mixed_precision)],
        max_gradients=max_gradients,
        seed=seed,
        progress=progress,
        strict=strict,
    )


def _check(trainer: Any) -> None:
    for name in ("args", "model", "accelerator", "compute_loss", "create_optimizer", "get_train_dataloader"):
        if not hasattr(trainer, name):
            raise InvalidArgumentError(
                f"trainer is a {type(trainer).__name__} without {name}: this door is for a transformers.Trainer. For a "
                "model call dyntune.suggest_lr(model, batches, ...)."
            )
    if trainer.is_deepspeed_enabled:
        raise InvalidArgumentError(
            "the trainer uses DeepSpeed, which makes its optimizer when training starts. Measure with a trainer "
            "without TrainingArguments(deepspeed=...)."
        )
    count = trainer.args.world_size * max(1, trainer.args.n_gpu)
    if count > 1:
        raise InvalidArgumentError(
            f"the trainer spreads each step over {count} processes or devices, whose gradients would have to be put "
            "together. Ask on one, CUDA_VISIBLE_DEVICES=0 without a launcher, with gradient_accumulation_steps "
            f"multiplied by {count}."
        )
    if str(trainer.accelerator.mixed_precision) not in AUTOCAST:
        raise InvalidArgumentError(
            f"mixed precision {trainer.accelerator.mixed_precision!r} has no counterpart in torch.autocast (known: "
            f"{', '.join(AUTOCAST)}). Ask with bf16=True."
        )


def _reader(trainer: Any) -> Any:
    """The trainer with a model, a state and a log of its own, and loaders that accelerate keeps no account of."""
    reader = copy.copy(trainer)
    reader.model = reader.model_wrapped = measured_copy(unwrap(trainer.model)).train()
    reader.state, reader.log = copy.deepcopy(trainer.state), Silent()
    reader.accelerator = StandIn(trainer.accelerator, prepare=lambda loader: loader)
    return reader


def _with_counts(reader: Any, batches: Sequence[Any], accumulate: int) -> list[dict[str, Any]]:
    """Every batch with the number of labels in the step that it belongs to; what is short of a step is left out."""
    items = []
    for first in range(0, len(batches) - accumulate + 1, accumulate):
        group = iter(batches[first : first + accumulate])
        samples, count = reader.get_batch_samples(group, accumulate, reader.args.device)
        items += [{"inputs": inputs, "count": count} for inputs in samples]
    return items


def _adds_up(reader: Any, count: Any) -> bool:
    """Whether losses of accumulated batches are parts of a whole: the rule of ``Trainer.training_step``."""
    said = getattr(reader, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    return (reader.model_accepts_loss_kwargs and count is not None) or reader.compute_loss_func is not None


def _num_steps(args: Any, loader: Any) -> int | None:
    if args.max_steps > 0:
        return int(args.max_steps)
    if not isinstance(loader, Sized):
        return None
    steps = max(1, math.ceil(len(loader) / int(args.gradient_accumulation_steps)))
    return math.ceil(float(args.num_train_epochs) * steps)


def _schedule(trainer: Any, num_steps: int | None) -> str:
    if trainer.lr_scheduler is not None:
        return type(trainer.lr_scheduler).__name__
    kind = trainer.args.lr_scheduler_type
    warmup = trainer.args.get_warmup_steps(num_steps or 0)
    return f"{getattr(kind, 'value', kind)} with {warmup} steps of warm-up"
