"""Trainings that a monitor watches, and the same without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.monitor.budget import Budget

__all__ = ["Training", "Unlimited", "network"]


class Unlimited(Budget):
    """Everything is measured in turn, at every step: what a test sees does not depend on the clock."""

    interval = 1

    def in_turn(self, shares: Mapping[str, float]) -> list[str]:
        self.turn = getattr(self, "turn", -1) + 1
        if not shares:
            return []
        kinds = list(shares)
        return kinds[self.turn % len(kinds) :] + kinds[: self.turn % len(kinds)]

    def affords(self, kind: str, *, share: float) -> bool:
        return True


def network(seed: int = 0) -> nn.Module:
    """Buffers and dropout: what a probe could leave behind."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 12),
            nn.BatchNorm1d(12),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(12, 8),
            nn.Tanh(),
            nn.Linear(8, 3),
        )


@dataclass
class Training:
    """A loop in the ordinary form; its random numbers come from the global generator, as a user's do.

    Args:
        steps: How many.
        optimizer: Made from the parameters.
        observe: ``"before"`` or ``"after"`` the step, or not at all.
        autocast: Data type of mixed precision.
        scaler: A gradient scaler.
        accumulate: Batches per step.
        wrap: Applied to the model, such as ``torch.compile``.
    """

    steps: int = 120
    optimizer: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=3e-3)
    observe: str = "after"
    autocast: torch.dtype | None = None
    scaler: Any = None
    accumulate: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    model: nn.Module = field(default_factory=network)

    def __post_init__(self) -> None:
        self.wrapped = self.wrap(self.model)
        self.opt = self.optimizer(self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 16, 6, generator=generator)
        self.batches = [(rows, (rows[:, :3] + 0.5 * rows[:, 3:]).argmax(1)) for rows in x]
        self.losses: list[float] = []

    def monitored(self, **options: Any) -> dyntune.Monitor:
        """A monitor of this training that measures all the time."""
        options = {"criterion": nn.CrossEntropyLoss(), "overhead": 0.9, "on_error": "raise"} | options
        options = {"scaler": self.scaler, "accumulate": self.accumulate} | options
        monitor = dyntune.Monitor(self.wrapped, self.opt, **options)
        monitor._session.budget = Unlimited(monitor.overhead)
        return monitor

    def loop(self, monitor: dyntune.Monitor | None = None, steps: int | None = None) -> None:
        """Train."""
        count = (self.steps if steps is None else steps) * self.accumulate
        loader = [self.batches[i % len(self.batches)] for i in range(count)]
        for i, batch in enumerate(loader if monitor is None else monitor.watch(loader)):
            self._batch(i, batch, monitor)

    def _batch(self, i: int, batch: Any, monitor: dyntune.Monitor | None) -> None:
        precision: AbstractContextManager[Any] = (
            nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast)
        )
        with precision:
            loss = F.cross_entropy(self.wrapped(batch[0]).float(), batch[1]) / self.accumulate
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.losses.append(float(loss.detach()))
        if monitor is not None and self.observe == "before":
            monitor.observe(loss)
        if (i + 1) % self.accumulate == 0:
            self._step()
        if monitor is not None and self.observe == "after":
            monitor.observe(loss)

    def _step(self) -> None:
        if self.scaler is None:
            self.opt.step()
        else:
            self.scaler.step(self.opt)
            self.scaler.update()
        self.opt.zero_grad()
