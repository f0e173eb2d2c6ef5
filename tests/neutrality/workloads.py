"""Trainings with everything that a measurement could disturb: a model, an optimizer and a loop's usual company."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.neutrality.measurements import Subject
from tests.objective.zoo import Recurrent, Tied, classes, made, rows

__all__ = ["WORKLOADS", "Training"]

CRITERION = {"criterion": nn.CrossEntropyLoss()}


class Training:
    """A training loop that stops between any two of its parts.

    Args:
        model: The model.
        batches: What it is trained and measured on.
        optimizer: Its optimizer.
        scheduler: Steps after each optimizer step.
        accumulate: Backward passes per optimizer step.
        autocast: Mixed precision of the forward pass, with a gradient scaler.
        average: A weighted average of the model, updated after each step.
        loss: For measuring.
        unsupported: Measurements that refuse this model.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Any = None,
        accumulate: int = 1,
        autocast: bool = False,
        average: Any = None,
        loss: dict[str, Any] = CRITERION,
        unsupported: frozenset[str] = frozenset(),
    ) -> None:
        self.model, self.batches, self.optimizer = model, batches, optimizer
        self.scheduler, self.accumulate, self.average = scheduler, accumulate, average
        self.autocast = autocast
        self.scaler = torch.amp.GradScaler("cpu", enabled=autocast)
        self.subject = Subject(model, batches, optimizer, loss, unsupported)
        self.losses: list[torch.Tensor] = []

    @property
    def company(self) -> list[Any]:
        """What belongs to the training besides the model."""
        return [o for o in (self.optimizer, self.scheduler, self.scaler, self.average, self.batches) if o is not None]

    def loss(self, index: int) -> torch.Tensor:
        x, y = self.batches[index % len(self.batches)]
        if x.is_floating_point():  # augmentation draws from all three generators
            x = x + 0.1 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * float(np.random.rand())
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            return F.cross_entropy(self.model(x), y)

    def steps(self, count: int) -> Iterator[str]:
        """Train, stopping before each forward pass, with a live graph, with gradients, and after the step."""
        for step in range(count):
            for micro in range(self.accumulate):
                yield "before"
                loss = self.loss(step * self.accumulate + micro)
                yield "live graph"
                self.scaler.scale(loss / self.accumulate).backward()
                yield "gradients"
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scheduler is not None:
                self.scheduler.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            self.losses.append(loss.detach())
            yield "stepped"
            self.optimizer.zero_grad(set_to_none=step % 2 == 0)


def _rows(*shape: int, high: int = 3) -> list[Any]:
    return [(rows(6, *shape, seed=s), classes(6, high=high, seed=s)) for s in range(2)]


class Net(nn.Module):
    """A class of the user's own: frames of torch.nn would be skipped by the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


class Transformer(nn.Module):
    """One encoder layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True, activation=F.gelu)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(x).mean(1))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def mlp() -> Training:
    model = made(Net)
    return Training(model, _rows(4), torch.optim.Adam(model.parameters(), lr=1e-2))


def cnn() -> Training:
    model = made(_cnn)
    return Training(model, _rows(3, 6, 6), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


def channels_last() -> Training:
    model = made(_cnn).to(memory_format=torch.channels_last)
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in _rows(3, 6, 6)]
    return Training(model, batches, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


def transformer() -> Training:
    model = made(Transformer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return Training(model, _rows(5, 4), optimizer, scheduler=scheduler)


def lstm() -> Training:
    model = made(Recurrent)
    return Training(model, _rows(5, 3), torch.optim.Adam(model.parameters(), lr=1e-2))


def tied() -> Training:
    model = made(Tied)
    model.mix.bias.requires_grad_(False)
    batches = [(classes(4, 5, high=6, seed=s), classes(4, 5, high=6, seed=s + 9)) for s in range(2)]
    return Training(model, batches, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))


def mixed_precision() -> Training:
    model = made(Net)
    return Training(model, _rows(4), torch.optim.AdamW(model.parameters(), lr=1e-2), autocast=True)


def compiled() -> Training:
    model = torch.compile(made(Net), backend="eager")
    return Training(model, _rows(4), torch.optim.Adam(model.parameters(), lr=1e-2))


def accumulation() -> Training:
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3)))
    return Training(model, _rows(4), torch.optim.AdamW(model.parameters(), lr=1e-2), accumulate=3)


def averaged() -> Training:
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    return Training(
        model, _rows(4), torch.optim.SGD(model.parameters(), lr=0.1, nesterov=True, momentum=0.9), average=average
    )


def low_precision() -> Training:
    """One refuses: a twin in float32 says nothing of steps that are rounded to bfloat16."""
    model = made(Net).bfloat16()
    batches = [(x.bfloat16(), y) for x, y in _rows(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Training(model, batches, optimizer, unsupported=frozenset({"suggest_lr", "suggest_betas"}))


def hooked() -> Training:
    """Hooks that scale an output and a gradient: part of the function, so they have to run when it is measured.

    The hook on the weight runs again in a second backward pass, which therefore is not the derivative of the gradient
    that the optimizer sees: curvature along the step is refused, and Hessians fall back to finite differences.
    """
    model = made(Net)
    model.first.register_forward_hook(lambda module, inputs, output: output * 1.5)
    model.last.register_full_backward_hook(lambda module, gradients, outputs: None)
    model.first.weight.register_hook(lambda gradient: gradient * 0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return Training(model, _rows(4), optimizer, unsupported=frozenset({"sharpness"}))


WORKLOADS: dict[str, Callable[[], Training]] = {
    f.__name__.replace("_", " "): f
    for f in (
        mlp,
        cnn,
        channels_last,
        transformer,
        lstm,
        tied,
        mixed_precision,
        compiled,
        accumulation,
        averaged,
        low_precision,
        hooked,
    )
}
