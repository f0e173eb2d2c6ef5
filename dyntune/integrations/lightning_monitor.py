"""A monitor as a Lightning callback: :class:`MonitorCallback`. For ``lightning`` and ``pytorch_lightning`` alike."""

# ruff: noqa: ARG002 - hooks have the framework's signature

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
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
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = None
    for _name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            Callback = importlib.import_module(_name).Callback
            break
        except ImportError as _error:
            if _error.name is None or not _name.startswith(_error.name):
                raise  # it is there, and broken
    if Callback is None:
        raise MissingDependencyError(
            "the Lightning callback needs Lightning, which is not installed: pip install 'dyntune[lightning]'."
        )

__all__ = ["MonitorCallback"]

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # by the trainer's name of the precision


class MonitorCallback(Callback):
    """Watches a fit: a :class:`dyntune.Monitor` on the optimizer from its first step to its end, also by an exception.

    The loss of every ``training_step`` is recorded as the module returns it, without the factors that accumulation and
    a gradient scaler put in front. The number of accumulated batches, the scaler and clipping are the trainer's.
    Checkpoints hold what the record needs to go on from them; a second ``fit`` goes on, too. Of several processes each
    writes a log of its own, and rank 0 to the sinks. ``test``, ``validate`` and ``predict`` are not watched.

    Args:
        loss_fn: As for :class:`dyntune.Monitor`, of the module: without a loss there is no curvature, since
            ``training_step`` logs and is not called for measurements.
        criterion: As for :class:`dyntune.Monitor`; the module's ``forward`` gives the outputs.
        overhead: As for :class:`dyntune.Monitor`.
        log: As for :class:`dyntune.Monitor`.
        resume: As for :class:`dyntune.Monitor`; implied where a checkpoint is resumed that holds the record's state.
        sinks: As for :class:`dyntune.Monitor`.
        detectors: As for :class:`dyntune.Monitor`.
        on_error: As for :class:`dyntune.Monitor`.
        optimizer_index: Which one of several optimizers is watched; losses are then not recorded, since nothing says
            which optimizer they are for.
        replay: As for :class:`dyntune.Monitor`; clipping and mixed precision are the trainer's.
        seed: As for :class:`dyntune.Monitor`.

    Raises:
        InvalidArgumentError: When the fit begins: several optimizers, or none with that index.
        DyntuneError: When the fit begins: as :class:`dyntune.Monitor`; a log that exists, for one.

    Example:
        >>> import warnings
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callback = MonitorCallback()
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = Trainer(
        ...     max_steps=20, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet
        ... )
        >>> with warnings.catch_warnings():  # Lightning's advice on workers
        ...     warnings.simplefilter("ignore")
        ...     trainer.fit(BoringModel())
        >>> callback.monitor.run.series("train/loss")[1].size
        20
    """

    def __init__(
        self,
        loss_fn: LossFunction | None = None,
        *,
        criterion: Criterion | None = None,
        overhead: float = 0.02,
        log: str | os.PathLike[str] | None = None,
        resume: bool = False,
        sinks: Sequence[Sink] = (),
        detectors: Literal["default"] | Sequence[Detector] = "default",
        on_error: OnFailure = "warn",
        optimizer_index: int | None = None,
        replay: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "loss_fn": loss_fn,
            "criterion": criterion,
            "overhead": overhead,
            "log": log,
            "resume": resume,
        }
        options |= {"sinks": sinks, "detectors": detectors, "on_error": on_error, "replay": replay, "seed": seed}
        self._attachment = Attachment(options)
        self._index = optimizer_index
        self._scaler: Any = None
        self._batch: Any = None
        self._parts: int | None = None  # batches per step, by which a loss was divided; None: losses are not recorded

    @property
    def monitor(self) -> Monitor | None:
        """The present fit's, or the last one's; None before the first."""
        return self._attachment.monitor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; the optimizers are made and restored by now."""
        count, index = len(trainer.optimizers), self._index
        if (index is None and count != 1) or (index is not None and not 0 <= index < count):
            raise InvalidArgumentError(
                f"optimizer_index={index} with {count} optimizers: a monitor watches the steps of one. Say which, 0 to "
                f"{count - 1}."
                if count
                else "the module has no optimizer, so there are no steps to watch. Leave the callback out."
            )
        accumulate = int(trainer.accumulate_grad_batches)
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._parts = None if count > 1 else accumulate if pl_module.automatic_optimization else 1
        self._attachment.begin(
            pl_module,
            trainer.optimizers[index or 0],
            main=trainer.is_global_zero,
            accumulate=accumulate,
            scaler=self._scaler if count == 1 else None,
            clipped=bool(trainer.gradient_clip_val),
            clip_norm=_clip_norm(trainer),
            autocast=AUTOCAST.get(str(trainer.precision)),
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch until its loss comes."""
        self._batch = batch
        self._attachment.forward_begins()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Pass on the loss, as it was before it was divided and scaled, and the batch."""
        if self._parts is None:
            self._attachment.observe(None, self._batch)
            return
        loss = loss.detach() * self._parts
        if self._scaler is not None:  # a division where the loss is: reading the factor would wait for the device
            loss = loss / self._scaler.scale(loss.new_ones(()))
        self._attachment.observe(loss, self._batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close, whatever ended the fit."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        state = self._attachment.state()
        return {} if state is None else {"monitor": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint; taken up when the fit begins."""
        found: Mapping[str, Any] | None = state_dict.get("monitor")
        self._attachment.restored = found

    def _close(self) -> None:
        self._batch = None
        self._attachment.close()


def _clip_norm(trainer: Trainer) -> float | None:
    """What the whole gradient's norm is clipped to; None where it is not, or single entries are."""
    limit, kind = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    return float(limit) if limit and getattr(kind, "value", kind) in (None, "norm") else None
