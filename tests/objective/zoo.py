"""Small models with everything that makes real ones awkward, each with data and a criterion."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from tests.objective.oracle import dense_hessian

__all__ = ["ZOO", "Attention", "Case", "Recurrent", "Tied", "call", "classes", "made", "mlp", "rows", "truth"]


@dataclass(frozen=True)
class Case:
    """A model, one batch (inputs, targets), and the criterion that goes with them."""

    model: nn.Module
    batch: tuple[torch.Tensor, torch.Tensor]
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def double(self) -> Case:
        """The same in float64."""
        x, y = self.batch
        cast = tuple(t.double() if t.is_floating_point() else t for t in (x, y))
        return Case(copy.deepcopy(self.model).double(), cast, self.criterion)  # type: ignore[arg-type]


def rows(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal data; the global generator is not touched."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, high: int = 3, seed: int = 1) -> torch.Tensor:
    """Random integer targets."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model with fixed weights; the global generator is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def mlp(inputs: int = 4, outputs: int = 3, *, seed: int = 0) -> nn.Module:
    """inputs-5-outputs, tanh."""
    return made(lambda: nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)), seed)


class Attention(nn.Module):
    """One head group of ``F.scaled_dot_product_attention``; optionally checkpointed."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 3)
        self.checkpointed = checkpointed

    def block(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.out(h).mean(1)


class MultiHead(nn.Module):
    """``nn.MultiheadAttention`` with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attend(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    """``nn.TransformerEncoderLayer``; dropout 0 so that a copy computes the same in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation=F.gelu)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(x).mean(1))


class Recurrent(nn.Module):
    """An LSTM, which keeps its weights in a list of its own, too."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(3, 4, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cells(x)[0][:, -1])


class Tied(nn.Module):
    """Input embedding and output layer share one matrix, as language models do."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, sparse=sparse)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens)))).transpose(1, 2)


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))


def _batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def _spectral() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def _case(build: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor, *, train: bool = True) -> Case:
    return Case(made(build).train(train), (x, y), nn.CrossEntropyLoss())


ZOO: dict[str, Callable[[], Case]] = {
    "mlp": lambda: _case(mlp, rows(12, 4), classes(12)),
    "batchnorm": lambda: _case(_batchnorm, rows(12, 4), classes(12)),
    "sdpa": lambda: _case(Attention, rows(6, 5, 4), classes(6)),
    "checkpointed sdpa": lambda: _case(lambda: Attention(checkpointed=True), rows(6, 5, 4), classes(6)),
    "multihead": lambda: _case(MultiHead, rows(6, 5, 4), classes(6)),
    "encoder, train": lambda: _case(Encoder, rows(6, 5, 4), classes(6)),
    "encoder, eval": lambda: _case(Encoder, rows(6, 5, 4), classes(6), train=False),
    "lstm": lambda: _case(Recurrent, rows(6, 5, 3), classes(6)),
    "tied": lambda: _case(Tied, classes(4, 5, high=6), classes(4, 5, high=6, seed=2)),
    "conv": lambda: _case(_conv, rows(6, 1, 6, 6), classes(6)),
    "spectral norm, eval": lambda: _case(_spectral, rows(12, 4), classes(12), train=False),
}


def call(case: Case) -> Callable[[Callable[..., Any], Any], torch.Tensor]:
    """The case's loss in the form the oracle takes."""
    return lambda model, data: case.criterion(model(data[0]), data[1])


@functools.cache
def truth(name: str) -> torch.Tensor:
    """The dense Hessian of a member of the zoo, float64."""
    case = ZOO[name]()
    return dense_hessian(case.model, case.batch, call(case))
