"""Mixtures of real sources: three texts, three texts cut to different lengths, and digits with a noisy source.

- ``text``: Shakespeare, English reference text (`pydoc_data.topics`) and Python source code of the standard library in
  windows of 32 characters, weights 0.6, 0.3, 0.1.
- ``lengths``: the same three with equal weights, rows of 4, 16 and 64 characters: short rows are noisy ones.
- ``digits``: 8 x 8 digits. Three sources of clean labels (classes 0 to 2, 3 to 5, 6 to 9; weights 0.3 each) and one of
  200 rows of all classes of which 60% have labels drawn at random (weight 0.1).
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.heads.model import Shape, new_model
from benchmarks.lr.data import CHARACTERS, _characters, load

IGNORED = -100  # targets that pad a short row
MODULES = ("argparse", "ast", "collections/__init__", "configparser", "datetime", "difflib", "inspect", "typing")
TRAIN, HELD_OUT = 131_072, 16_384  # characters of each text
CONTEXT = 64
Rows = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """Sources with their weights, and what is trained on them.

    Args:
        name: A word for it.
        names: Of the sources.
        weights: Of the sources in the objective.
        train: Rows of each.
        held_out: Rows of each, never trained on.
        batch: Rows of a step.
        steps: Of a run.
        every: Steps between two looks at the held-out rows.
    """

    name: str
    names: tuple[str, ...]
    weights: tuple[float, ...]
    train: tuple[Rows, ...]
    held_out: tuple[Rows, ...]
    batch: int
    steps: int
    every: int

    def new_model(self, seed: int) -> nn.Module:
        """A fresh one."""
        if self.name != "digits":
            return new_model(Shape(32, 1, CONTEXT, 2, "sqrt"), seed, torch.zeros(0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def held_out_loss(self, model: nn.Module) -> float:
        """The weighted mean over sources."""
        with torch.no_grad():
            return sum(
                w * float(row_losses(model, rows).mean()) for w, rows in zip(self.weights, self.held_out, strict=True)
            )

    def digest(self) -> str:
        """Short hash of the rows: two of the texts change with Python's version."""
        found = hashlib.sha256()
        for x, y in (*self.train, *self.held_out):
            found.update(x.numpy().tobytes())
            found.update(y.numpy().tobytes())
        return found.hexdigest()[:12]


def row_losses(model: nn.Module, batch: Rows) -> torch.Tensor:
    """Cross-entropy of each row; of text, the mean over its characters. Shape (rows,)."""
    x, y = batch
    if y.dim() == 1:
        return F.cross_entropy(model(x), y, reduction="none")
    each = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none", ignore_index=IGNORED)
    return each.sum(1) / (y != IGNORED).sum(1)


def loss_fn(model: nn.Module, batch: Rows) -> torch.Tensor:
    """Mean over rows."""
    return row_losses(model, batch).mean()


def _code() -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((root / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)


def _windows(text: str, length: int, width: int) -> tuple[Rows, Rows]:
    """Rows of `length` characters, padded to `width`: to train on, and held out."""
    index = {character: i for i, character in enumerate(CHARACTERS)}
    codes = torch.tensor([index.get(character, 0) for character in text[: TRAIN + HELD_OUT + 1]])
    rows = (len(codes) - 1) // length
    x = F.pad(codes[: rows * length].view(rows, length), (0, width - length))
    y = F.pad(codes[1 : rows * length + 1].view(rows, length), (0, width - length), value=IGNORED)
    cut = TRAIN // length
    order = torch.randperm(cut, generator=torch.Generator().manual_seed(0))
    # 128 rows held out, from the end on: of short rows a stretch of text as long as of long ones.
    held = torch.linspace(cut, rows - 1, 128).long()
    return (x[:cut][order], y[:cut][order]), (x[held], y[held])


def _texts(lengths: tuple[int, int, int]) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    texts = (_characters("shakespeare"), _characters("pydoc"), _code())
    cut = [_windows(text, length, max(lengths)) for text, length in zip(texts, lengths, strict=True)]
    return tuple(train for train, _ in cut), tuple(held for _, held in cut)


def _digits() -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
    data = load("digits", "class")
    rng = np.random.default_rng(0)
    noisy = torch.from_numpy(rng.permutation(len(data.y))[:200])
    clean = torch.ones(len(data.y), dtype=torch.bool)
    clean[noisy] = False

    def mislabelled(y: torch.Tensor) -> torch.Tensor:
        drawn = torch.from_numpy(rng.integers(0, 10, len(y)))
        return torch.where(torch.from_numpy(rng.random(len(y)) < 0.6), drawn, y)

    def classes(x: torch.Tensor, y: torch.Tensor, low: int, high: int) -> Rows:
        chosen = (y >= low) & (y < high)
        return x[chosen], y[chosen]

    ranges = ((0, 3), (3, 6), (6, 10))
    x, y = data.x[clean], data.y[clean]
    train = (*(classes(x, y, *r) for r in ranges), (data.x[noisy], mislabelled(data.y[noisy])))
    held = (*(classes(data.x_val, data.y_val, *r) for r in ranges), (data.x_val, mislabelled(data.y_val)))
    return train, held


@functools.cache
def problem(name: str) -> Problem:
    """By its name: ``"text"``, ``"lengths"`` or ``"digits"``."""
    if name == "digits":
        names: tuple[str, ...] = ("0 to 2", "3 to 5", "6 to 9", "noisy labels")
        return Problem(name, names, (0.3, 0.3, 0.3, 0.1), *_digits(), batch=16, steps=1500, every=10)
    names = ("Shakespeare", "English", "Python code")
    if name == "text":
        return Problem(name, names, (0.6, 0.3, 0.1), *_texts((32, 32, 32)), batch=16, steps=500, every=10)
    return Problem(name, names, (1 / 3, 1 / 3, 1 / 3), *_texts((4, 16, 64)), batch=12, steps=500, every=10)
