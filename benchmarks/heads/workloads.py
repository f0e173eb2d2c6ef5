"""What is trained: sizes x scalings x optimizers, each with every head count, on Shakespeare's characters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from benchmarks.heads.model import GPT, Scaling, Shape, new_model
from benchmarks.lr.data import Data, load

OptimizerName: TypeAlias = Literal["momentum", "adamw"]
HEADS = (1, 2, 4, 8, 16)
DEPTHS, WIDTHS, CONTEXTS = (2, 4), (64, 128), (32, 128)
TOKENS = 512  # of a step, whatever the context
STEPS, WARMUP = 150, 10
SEEDS = (0, 1, 2)
FRESH_SEEDS = (100, 101, 102)  # for the grid's winners, and for whatever is judged against them


@dataclass(frozen=True)
class Group:
    """Cells that differ in nothing but their heads.

    Args:
        width: d.
        depth: Blocks.
        context: Characters in a window.
        scaling: Of the logits.
        optimizer: ``"momentum"`` (SGD, 0.9) or ``"adamw"`` (0.9, 0.95; no decay).
    """

    width: int
    depth: int
    context: int
    scaling: Scaling
    optimizer: OptimizerName

    @property
    def name(self) -> str:
        """A word for it."""
        return f"d{self.width}-L{self.depth}-T{self.context}/{self.scaling}/{self.optimizer}"

    @property
    def half(self) -> str:
        """``"tune"`` or ``"test"``, by the parity of its place: fixed before anything was trained.

        Both halves have all optimizers, and half of all sizes with half of all scalings each.
        """
        place = DEPTHS.index(self.depth) + WIDTHS.index(self.width) + CONTEXTS.index(self.context)
        place += get_args(Scaling).index(self.scaling)
        return ("tune", "test")[place % 2]


@dataclass(frozen=True)
class Cell:
    """One head count of a group: what a learning rate is found for."""

    group: Group
    heads: int
    steps: int = STEPS
    warmup: int = WARMUP

    @property
    def name(self) -> str:
        """A word for it."""
        return f"{self.group.name}/h{self.heads}"

    @property
    def shape(self) -> Shape:
        """Of its model."""
        g = self.group
        return Shape(g.width, g.depth, g.context, self.heads, g.scaling)

    @property
    def batch(self) -> int:
        """Windows of a step."""
        return TOKENS // self.group.context

    def digest(self) -> str:
        """A hash of the definition."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def with_steps(self, steps: int) -> Cell:
        """The same for another length."""
        return replace(self, steps=steps)

    def data(self) -> Data:
        """Windows of text and of held-out text."""
        return load("shakespeare", "text", length=self.group.context)

    def new_model(self, seed: int) -> GPT:
        """A fresh one."""
        return new_model(self.shape, seed, self.data().x)

    def new_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """On its parameters."""
        if self.group.optimizer == "momentum":
            return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Forever, in an order of the seed alone."""
        data, generator = self.data(), torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(data.x), generator=generator)
            for start in range(0, len(order) - self.batch + 1, self.batch):
                rows = order[start : start + self.batch]
                yield data.x[rows], data.y[rows]


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    """Mean cross-entropy per character, nats."""
    x, y = batch
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def groups(*, half: str | None = None) -> list[Group]:
    """All of them, the cheap ones first."""
    found = [
        Group(width, depth, context, scaling, optimizer)
        for width in WIDTHS
        for depth in DEPTHS
        for context in CONTEXTS
        for scaling in get_args(Scaling)
        for optimizer in get_args(OptimizerName)
    ]
    return sorted((g for g in found if half in (None, g.half)), key=lambda g: g.depth * g.width**2)
