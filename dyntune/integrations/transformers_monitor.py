"""A monitor as a Transformers callback: :class:`MonitorCallback`."""

# ruff: noqa: ARG002 - hooks have the framework's signature

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch

from dyntune.errors import InvalidArgumentError, MissingDependencyError
from dyntune.integrations.attachment import Attachment
from dyntune.monitor.alerts import Detector
from dyntune.monitor.breaker import OnFailure
from dyntune.monitor.monitor import Monitor
from dyntune.monitor.sink import Sink
from dyntune.objective.losses import Criterion, LossFunction

if TYPE_CHECKING:
    from transformers import Trainer
try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        "the Transformers callback needs Transformers, which is not installed: pip install 'dyntune[transformers]'."
    ) from error

__all__ = ["MonitorCallback"]

KEY = "dyntune.MonitorCallback"  # under which a checkpoint's trainer_state.json holds the state


class MonitorCallback(TrainerCallback):
    """Watches ``trainer.train()``: a :class:`dyntune.Monitor` on the optimizer inside Accelerate's wrapper.

    A callback is told neither the batch nor its loss. So this one is given the trainer, and for as long as that trains
    ``trainer.training_step`` is followed by a look at what it was given and what it returned. The loss is that of the
    step: of accumulated batches, their sum as the trainer weighs them.

    It is closed when training ends or ``training_step`` raises. As a context manager it is closed, and taken off the
    trainer, whatever happens. Checkpoints hold what the record needs to go on from them; a second ``train()`` goes on,
    too. Of several processes each writes a log of its own, and rank 0 to the sinks.

    Args:
        trainer: A ``transformers.Trainer`` or a subclass; it is given the callback.
        loss_fn: As for :class:`dyntune.Monitor`; default the loss that the model itself returns for a batch.
        criterion: As for :class:`dyntune.Monitor`.
        overhead: As for :class:`dyntune.Monitor`.
        log: As for :class:`dyntune.Monitor`.
        resume: As for :class:`dyntune.Monitor`; implied where a checkpoint is resumed that holds the record's state.
        sinks: As for :class:`dyntune.Monitor`.
        detectors: As for :class:`dyntune.Monitor`.
        on_error: As for :class:`dyntune.Monitor`.
        replay: As for :class:`dyntune.Monitor`; clipping and mixed precision are the trainer's.
        seed: As for :class:`dyntune.Monitor`.

    Raises:
        InvalidArgumentError: No trainer.
        DyntuneError: When training begins: as :class:`dyntune.Monitor`; a log that exists, for one.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments
        >>> sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        >>> rows = [{"input_ids": [i % 11, 3, 5, i % 7], "labels": [i % 11, 3, 5, i % 7]} for i in range(64)]
        >>> quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        >>> arguments = TrainingArguments(".", use_cpu=True, max_steps=20, dataloader_pin_memory=False, **quiet)
        >>> trainer = Trainer(model, arguments, train_dataset=rows)
        >>> trainer.remove_callback(PrinterCallback)
        >>> with MonitorCallback(trainer) as callback:
        ...     done = trainer.train()
        >>> callback.monitor.run.series("train/loss")[1].size
        20
    """

    def __init__(
        self,
        trainer: Trainer,
        loss_fn: LossFunction | None = None,
        *,
        criterion: Criterion | None = None,
        overhead: float = 0.02,
        log: str | os.PathLike[str] | None = None,
        resume: bool = False,
        sinks: Sequence[Sink] = (),
        detectors: Literal["default"] | Sequence[Detector] = "default",
        on_error: OnFailure = "warn",
        replay: int = 0,
        seed: int = 0,
    ) -> None:
        if not all(hasattr(trainer, name) for name in ("training_step", "add_callback", "accelerator", "args")):
            raise InvalidArgumentError(
                f"trainer is a {type(trainer).__name__}, not a transformers.Trainer. Give that, or use dyntune.Monitor "
                "in a loop of your own."
            )
        options: dict[str, Any] = {
            "loss_fn": loss_fn,
            "criterion": criterion,
            "overhead": overhead,
            "log": log,
            "resume": resume,
        }
        options |= {"sinks": sinks, "detectors": detectors, "on_error": on_error, "replay": replay, "seed": seed}
        self._attachment = Attachment(options)
        self._trainer: Any = trainer
        self._replaced: tuple[Any, ...] | None = None  # what stood in the place of our training_step, if anything did
        trainer.add_callback(self)

    @property
    def monitor(self) -> Monitor | None:
        """The present training's, or the last one's; None before the first."""
        return self._attachment.monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach; the optimizer is wrapped and restored by now."""
        self._close()
        self._attachment.restored = state.stateful_callbacks.get(KEY)
        self._attachment.begin(
            kwargs["model"],
            kwargs["optimizer"],
            main=state.is_world_process_zero,
            accumulate=args.gradient_accumulation_steps,
            scaler=self._trainer.accelerator.scaler,
            clipped=bool(args.max_grad_norm),
            clip_norm=args.max_grad_norm or None,
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        )
        own = vars(self._trainer)
        original = self._trainer.training_step
        self._replaced = (own["training_step"],) if "training_step" in own else ()

        def training_step(model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            batch = dict(inputs)
            self._attachment.forward_begins()
            try:
                loss = original(model, inputs, *more, **named)
            except BaseException:
                self._close()
                raise
            # Each is its batch's part of the step's loss, and the monitor takes their mean.
            self._attachment.observe(loss * self._trainer.current_gradient_accumulation_steps, batch)
            return loss

        self._trainer.training_step = training_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put into the checkpoint, if one is about to be saved, what the record needs."""
        if control.should_save and (found := self._attachment.state()) is not None:
            state.stateful_callbacks[KEY] = found

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close."""
        self._close()

    def _close(self) -> None:
        if self._replaced is not None:
            del self._trainer.training_step
            for earlier in self._replaced:
                self._trainer.training_step = earlier
            self._replaced = None
        self._attachment.close()

    def __enter__(self) -> MonitorCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()
        self._trainer.remove_callback(self)
