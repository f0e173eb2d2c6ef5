"""Which step losses and batches belong to: :class:`Landing`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dyntune.monitor.pending import Pending, Step, kept_scalar
from dyntune.monitor.session import Session

__all__ = ["Landing"]

MANY_PARTS = 64  # batches of one accumulated step that are remembered


class Landing:
    """Steps that are being recorded, and what the loop says about them, before a step or after it.

    Args:
        session: The training.
        accumulate: Batches per step, to count the steps that a scaler skips.
        scaler: A gradient scaler; None: skipped steps are not counted.
    """

    def __init__(self, session: Session, *, accumulate: int, scaler: Any) -> None:
        self._session, self._accumulate, self._scaler = session, accumulate, scaler
        self.pending = Pending()
        self.open = Step(session.number)  # the next step
        self.batches: list[Any] = []  # of the present step
        self.microbatches: Sequence[Any] | None = None
        self.skipped = 0.0
        self.calm, self.uneasy = math.inf, False  # the highest loss that nobody has to look at, whether one was above
        self._watching = self._in_iteration = False
        self._lands_after: bool | None = None  # whether observe() comes after step(); None: not known yet
        self._passes = 0
        self._epoch, self._new_epoch = 0, False  # of a watched loader

    def restart(self) -> None:
        """Begin again at the session's step."""
        self.pending, self.open = Pending(), Step(self._session.number)

    def pass_begins(self) -> None:
        """A watched loader is iterated over from its start."""
        self._epoch += 1
        self._new_epoch = True

    def fetched(self, batch: Any) -> None:
        """A batch is handed to the loop."""
        self._watching = True
        if self._in_iteration:
            self.batches = []
            self._in_iteration = False
        self._passes += 1
        if len(self.batches) < MANY_PARTS:
            self.batches.append(batch)

    def observed(self, loss: Any, batch: Any, microbatches: Sequence[Any] | None) -> None:
        """The loop speaks of a step."""
        if self._watching:
            after = self._in_iteration
        else:
            if self._lands_after is None:
                self._lands_after = self._session.number > self._session.began
            after = self._lands_after
            self._passes += 1
        if loss is not None:
            step = self.pending.steps[-1] if after and self.pending.steps else self.open
            value = kept_scalar(loss)
            step.add_loss(value)
            if type(value) is float and not value <= self.calm:  # NaN is not
                self.uneasy = True
        if batch is not None:
            self._remember(batch)
        if microbatches is not None:
            self.microbatches = list(microbatches)

    def begins(self, optimizer: torch.optim.Optimizer) -> Step:
        """A step is about to be made."""
        session, step = self._session, self.open
        self.pending.steps.append(step)
        session.number += 1
        self.open = Step(session.number)
        groups = optimizer.param_groups
        first = groups[0]["lr"]
        step.lr = first if type(first) is float else kept_scalar(first)
        for index in range(1, len(groups)):
            if (lr := groups[index]["lr"]) != first:
                step.put(f"train/lr/{index}", kept_scalar(lr))
        if self._new_epoch:
            self._new_epoch = False
            step.put("train/pass", float(self._epoch))
        if self._scaler is not None:
            self._count_skips(optimizer, step)
        return step

    def made(self) -> None:
        """The step is made."""
        self._in_iteration = True
        self.microbatches = None
        if not self._watching or len(self.batches) > 1:
            self.batches = self.batches[-1:]

    def total_skipped(self, skips: Sequence[float]) -> list[float]:
        """How many had been skipped after each of these steps, each of which was (1) or was not (0)."""
        found = []
        for skip in skips:
            self.skipped += skip
            found.append(self.skipped)
        return found

    def _remember(self, batch: Any) -> None:
        if not self._watching:
            self.batches = []
        if len(self.batches) < MANY_PARTS:
            self.batches.append(batch)

    def _count_skips(self, optimizer: torch.optim.Optimizer, step: Step) -> None:
        found = getattr(optimizer, "found_inf", None)
        if isinstance(found, torch.Tensor):  # a fused optimizer skips within its kernel, and its hooks run
            step.put("skipped", kept_scalar(found))
            return
        before = self._watching or not self._lands_after
        expected = (self._passes - before) // self._accumulate
        session = self._session
        self.skipped = max(self.skipped, float(expected - (step.number - session.began)))
        step.put("train/skipped", self.skipped)
