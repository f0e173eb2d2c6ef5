"""A monitor for as long as a framework trains: :class:`Attachment`, which callbacks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dyntune.monitor.monitor import Monitor

__all__ = ["Attachment"]


class Attachment:
    """Makes a monitor when a training begins, closes it when that ends, and goes on with the record in the next.

    Args:
        options: Of :class:`dyntune.Monitor`, as the user gave them.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.monitor: Monitor | None = None
        self.restored: Mapping[str, Any] | None = None  # what a checkpoint held, until a monitor has taken it
        self._options = dict(options)

    def begin(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        main: bool,
        accumulate: int,
        scaler: Any,
        clipped: bool,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Attach a monitor to the optimizer.

        Args:
            model: What is trained.
            optimizer: What steps it, wrapped or not.
            main: Whether this process is the one that writes to sinks.
            accumulate: Batches per step.
            scaler: The gradient scaler, if any.
            clipped: Whether gradients are clipped.
            clip_norm: What their norm is clipped to.
            autocast: Dtype of mixed precision.

        Raises:
            DyntuneError: As :class:`dyntune.Monitor` and its ``load_state_dict``.
        """
        self.close()
        state, self.restored = self.restored or self.state(), None
        options = dict(self._options)
        options["resume"] = options["resume"] or state is not None
        if not main:
            options["sinks"] = ()
        found = {"accumulate": accumulate, "scaler": scaler, "clipped": clipped}
        found |= {"clip_norm": clip_norm, "autocast": autocast}
        self.monitor = Monitor(model, optimizer, **options, **found)
        if state is not None:
            try:
                self.monitor.load_state_dict(state)
            except BaseException:
                self.close()
                raise

    def forward_begins(self) -> None:
        """The framework is about to run the model on the next batch."""
        if self.monitor is not None:
            self.monitor._forward_begins()

    def observe(self, loss: Any, batch: Any) -> None:
        """Pass on the loss of a batch and the batch, before the step."""
        if self.monitor is not None:
            self.monitor.observe(loss, batch=batch)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint is to hold; None where there is nothing yet."""
        return None if self.monitor is None else self.monitor.state_dict()

    def close(self) -> None:
        """Close the monitor, which stays to be read."""
        if self.monitor is not None:
            self.monitor.close()
