"""What is trained: four architectures on real data, for each half of the benchmark with AdamW and with a kind of SGD.

The halves share no pair of architecture and data set. Learning rates were found by `rates.py`; see there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.lr.data import Data, load
from benchmarks.lr.scenario import TARGETS, Scenario

ARCHITECTURES = ("mlp", "cnn", "transformer", "gru")
HALVES = ("tune", "test")
STEPS = 1200  # of a run with a fault
EVALUATED = 256  # rows, half of them held out


@dataclass(frozen=True)
class Workload:
    """A healthy training, complete but for the seed.

    Args:
        name: Architecture / data set / optimizer.
        architecture: One of ``ARCHITECTURES``.
        half: ``"tune"`` or ``"test"``.
        scenario: Model, data, optimizer and schedule.
        lr: Peak learning rate.
        length: Characters in a window of text.
        drops: Shares of the run after which the learning rate falls to a fifth.
        restarts: How often a cosine schedule begins again.
    """

    name: str
    architecture: str
    half: str
    scenario: Scenario
    lr: float
    length: int = 32
    drops: tuple[float, ...] = ()
    restarts: int = 0

    @property
    def steps(self) -> int:
        return self.scenario.steps

    @property
    def is_adam(self) -> bool:
        return self.scenario.optimizer in ("adam", "adamw")

    @property
    def is_text(self) -> bool:
        return self.scenario.loss == "text"

    def changed(self, *, lr: float | None = None, **changes: Any) -> Workload:
        """Another learning rate, and other fields of the scenario."""
        return replace(self, lr=self.lr if lr is None else lr, scenario=replace(self.scenario, **changes))

    def data(self) -> Data:
        s = self.scenario
        noise, scale = s.label_noise, s.input_scale
        return load(s.data_name, TARGETS[s.loss], label_noise=noise, input_scale=scale, length=self.length)

    def evaluation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fixed rows with clean labels, half of them training rows: harm is measured on these."""
        s = self.scenario
        data, half = load(s.data_name, TARGETS[s.loss], input_scale=s.input_scale, length=self.length), EVALUATED // 2
        return torch.cat([data.x[:half], data.x_val[:half]]), torch.cat([data.y[:half], data.y_val[:half]])

    def new_model(self, seed: int) -> nn.Module:
        return self.scenario.new_model(seed)

    def new_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.scenario.new_optimizer(model, self.lr, fused=True)

    def criterion(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.scenario.criterion(out, y)

    def factor(self, step: int) -> float:
        """The schedule: what every group's learning rate is multiplied by at a step."""
        value = self.scenario.factor(step)
        if self.restarts:
            period = self.steps / (self.restarts + 1)
            value = 0.5 * (1.0 + math.cos(math.pi * (step % period) / period))
        return value * 0.2 ** sum(step >= share * self.steps for share in self.drops)


# (architecture, half): data set with architecture of benchmarks/lr, common options, {optimizer: (lr, options)}.
_ROWS: dict[tuple[str, str], tuple[str, dict[str, Any], dict[str, tuple[float, dict[str, Any]]]]] = {
    ("mlp", "tune"): (
        "mnist8/mlp-relu",
        {"batch": 32, "width": 96, "model": (("depth", 4),)},
        {"adamw": (2e-3, {"weight_decay": 0.01}), "sgd": (1e-1, {})},
    ),
    ("mlp", "test"): (
        "digits/mlp-relu",
        {"batch": 32, "width": 96, "model": (("depth", 4),), "label_noise": 0.05},
        {"adamw": (1e-3, {"weight_decay": 0.01}), "momentum": (2e-2, {"schedule": "cosine"})},
    ),
    ("cnn", "tune"): (
        "digits/cnn",
        {"batch": 16, "width": 8},
        {"adamw": (5e-3, {"schedule": "cosine"}), "momentum": (2e-2, {})},
    ),
    ("cnn", "test"): (
        "mnist8/cnn",
        {"batch": 16, "width": 8},
        {"adamw": (5e-3, {}), "nesterov": (3e-2, {"schedule": "linear"})},
    ),
    ("transformer", "tune"): (
        "shakespeare/pre-ln",
        {"batch": 4, "width": 32, "loss": "text", "warmup": 50, "clip": 1.0},
        {"adamw": (6e-3, {"schedule": "cosine", "betas": (0.9, 0.99)}), "momentum": (3e-2, {})},
    ),
    ("transformer", "test"): (
        "digits/vit",
        {"batch": 8, "width": 32, "warmup": 50},
        {"adamw": (2e-3, {"schedule": "cosine"}), "momentum": (7e-3, {})},
    ),
    ("gru", "tune"): (
        "digits/gru",
        {"batch": 16, "width": 32},
        {"adamw": (3e-3, {}), "rmsprop": (2e-3, {}), "momentum": (5e-2, {"clip": 1.0})},
    ),
    ("gru", "test"): (
        "shakespeare/gru",
        {"batch": 4, "width": 32, "loss": "text"},
        {"adamw": (5e-3, {"clip": 1.0}), "sgd": (1.0, {"clip": 1.0, "schedule": "cosine"})},
    ),
}
_LENGTHS = {"gru": 16}


def _workloads() -> Iterator[Workload]:
    for (architecture, half), (family, common, optimizers) in _ROWS.items():
        for optimizer, (lr, options) in optimizers.items():
            name = f"{architecture}/{family.split('/')[0]}/{optimizer}"
            settings = {"optimizer": optimizer, "steps": STEPS} | common | options
            scenario = Scenario(name=name, family=family, half=half, **settings)
            yield Workload(name, architecture, half, scenario, lr, _LENGTHS.get(architecture, 32))


WORKLOADS = {workload.name: workload for workload in _workloads()}


def workload_for(architecture: str, half: str, kind: str) -> Workload:
    """The workload of an architecture and half whose optimizer is of a kind: ``"adam"``, or ``"sgd"``."""
    found = [w for w in WORKLOADS.values() if (w.architecture, w.half) == (architecture, half)]
    return next(w for w in found if w.is_adam == (kind == "adam") and w.scenario.optimizer != "rmsprop")
