"""Trainings with a ring, in the ordinary form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dyntune.replay.replaying import Stage
from dyntune.replay.ring import Ring

Batch = tuple[torch.Tensor, torch.Tensor]
CE = nn.CrossEntropyLoss()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ring: Ring,
    batches: Iterable[Any],
    *,
    criterion: Callable[..., torch.Tensor] = CE,
    clip: float | None = None,
    accumulate: int = 1,
    before: Callable[[int], None] | None = None,
) -> list[float]:
    """Train as users do; returns the mean loss of every step."""
    losses: list[float] = []
    parts: list[float] = []
    for index, (x, y) in enumerate(batches):
        if before is not None:
            before(index)
        ring.fetched((x, y))
        loss = criterion(model(x), y)
        (loss / accumulate).backward() if accumulate > 1 else loss.backward()
        ring.observed(loss)
        parts.append(float(loss.detach()))
        if len(parts) < accumulate:
            continue
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        ring.before_step(optimizer)
        optimizer.step()
        ring.after_step()
        optimizer.zero_grad()
        losses.append(sum(parts) / accumulate)
        parts = []
    return losses


def stage_of(model: nn.Module, optimizer: torch.optim.Optimizer, ring: Ring, **options: Any) -> Stage:
    """The ring's window with what it is of."""
    window = ring.window()
    assert window is not None
    return Stage(window, model, optimizer, **{"criterion": CE, **options})


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose initial weights are those of a seed; the global state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def images(count: int, rows: int = 16, seed: int = 0) -> list[Batch]:
    """Batches of 8x8 images of 4 classes, each a pattern in noise three times as large."""
    g = torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 1, 8, 8, generator=g)
    found = []
    for _ in range(count):
        y = torch.randint(0, 4, (rows,), generator=g)
        found.append((patterns[y] + 3 * torch.randn(rows, 1, 8, 8, generator=g), y))
    return found


def mlp() -> nn.Module:
    """With BatchNorm and dropout."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)
    )


def plain_mlp() -> nn.Module:
    """Without."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))


def cnn() -> nn.Module:
    """Two convolutions, the second's weights shared by two places."""
    shared = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        shared,
        nn.GELU(),
        shared,
        nn.Flatten(),
        nn.Linear(256, 4),
    )


class Transformer(nn.Module):
    """Rows of the image as tokens; dropout in attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.block(self.embed(x.flatten(1, 2))).mean(1))
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "transformer": Transformer}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}
