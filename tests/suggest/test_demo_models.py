"""On the models of the demo and the notebook the suggestion never diverges: tried for real, at its own warm-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import dyntune
from dyntune.demo.data import english
from dyntune.demo.model import CharTransformer, loss_fn

STEPS = 300
OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr),
}


def train(model: nn.Module, batches: Sequence[Any], loss: Any, name: str, rec: dyntune.Recommendation) -> list[float]:
    """Constant rate after the suggested warm-up, which is harder on stability than a decay."""
    assert rec.value is not None
    optimizer = OPTIMIZERS[name](model.parameters(), rec.value)
    warmup = rec.warmup_steps or 0
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rec.value * min(1.0, (step + 1) / (warmup + 1))
        value = loss(model, batches[step % len(batches)])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def check(losses: list[float]) -> None:
    """Not a blow-up (twice the initial loss at any step), and better than halfway to nothing."""
    start = losses[0]
    assert all(math.isfinite(x) for x in losses)
    assert max(losses) < 2 * start
    assert sum(losses[-30:]) / 30 < 0.8 * start


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_character_transformer(name: str, seed: int) -> None:
    text = english()
    batches = text.batches(text.train, STEPS, size=16, length=32, seed=seed + 1)
    model = CharTransformer(len(text.characters), width=32, length=32, seed=seed)
    rec = dyntune.suggest_lr(model, batches, loss_fn, optimizer=name, num_steps=STEPS, seed=seed)
    check(train(model, batches, loss_fn, name, rec))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
def test_digits(name: str, seed: int, batch_norm: bool) -> None:
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    batches = [(x[part], y[part]) for part in order.split(64)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(64)] if batch_norm else []
        model = nn.Sequential(nn.Linear(64, 64), *middle, nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    criterion = nn.CrossEntropyLoss()
    rec = dyntune.suggest_lr(model, batches, criterion=criterion, optimizer=name, seed=seed)
    check(train(model, batches, lambda m, b: criterion(m(b[0]), b[1]), name, rec))
