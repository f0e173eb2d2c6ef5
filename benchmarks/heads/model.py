"""A small GPT on characters whose head count changes nothing but the heads: equal weights for every count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lr.data import CHARACTERS

Scaling: TypeAlias = Literal["sqrt", "inverse", "qknorm", "hot"]
VOCABULARY = len(CHARACTERS)
HOT = 40.0  # the largest logit that a hot model begins with; the issue asks for 30 or more
STD = 0.02  # of a fresh GPT-2's weights
CHECKED = 16  # windows on which logits are measured


@dataclass(frozen=True)
class Shape:
    """What a model is made of.

    Args:
        width: d.
        depth: Blocks.
        context: Characters in a window.
        heads: Divides the width.
        scaling: ``"sqrt"`` for 1 / sqrt(d_h), ``"inverse"`` for 1 / d_h, ``"qknorm"`` for normed queries and keys, and
            ``"hot"`` for W_Q and W_K scaled up until the largest logit is 40.
    """

    width: int
    depth: int
    context: int
    heads: int
    scaling: Scaling


class Attention(nn.Module):
    """Causal self-attention, one Linear for each of queries, keys, values and output."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads, self.head_dim = shape.heads, shape.width // shape.heads
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)
        norm = shape.scaling == "qknorm"
        self.q_norm = nn.RMSNorm(self.head_dim) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if norm else nn.Identity()
        self.scale = 1 / self.head_dim if shape.scaling == "inverse" else self.head_dim**-0.5

    def queries_and_keys(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, h, T, d_h) each."""
        return self.q_norm(self._split(self.q_proj(x))), self.k_norm(self._split(self.k_proj(x)))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.queries_and_keys(x)
        y = F.scaled_dot_product_attention(q, k, self._split(self.v_proj(x)), is_causal=True, scale=self.scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def largest_logit(self, x: torch.Tensor) -> float:
        """Largest absolute logit that is not masked."""
        q, k = self.queries_and_keys(x)
        logits = (q @ k.transpose(-1, -2) * self.scale).tril()
        return float(logits.abs().max())


class Block(nn.Module):
    """Pre-LN."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Logits over characters, shape (B, T, vocabulary)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Into the residual stream."""
        return self.tokens(x) + self.positions.weight[: x.shape[1]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))

    def largest_logit(self, x: torch.Tensor) -> float:
        """Of all blocks and heads."""
        found, h = 0.0, self.embed(x)
        with torch.no_grad():
            for block in self.blocks:
                found = max(found, block.attention.largest_logit(block.norm1(h)))
                h = block(h)
        return found


def new_model(shape: Shape, seed: int, checked: torch.Tensor) -> GPT:
    """A fresh model; all weights but the gains of normed queries are the same for every head count.

    Args:
        shape: What to make.
        seed: Of the weights.
        checked: Windows, of shape (B, T), on which a hot model's logits are set.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(shape)
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if p.dim() > 1:
                # Queries and keys of unit-variance entries at any width: logits of order one, as the pilots had.
                std = shape.width**-0.5 if "_proj" in name or "mlp" in name else STD
                residual = name.endswith(("o_proj.weight", "mlp.2.weight"))
                p.data = torch.randn(p.shape, generator=generator) * std / math.sqrt(2 * shape.depth if residual else 1)
            elif name.endswith("bias"):
                p.data.zero_()
    if shape.scaling == "hot":
        _heat(model, checked[:CHECKED])
    return model


def _heat(model: GPT, x: torch.Tensor) -> None:
    """Scale W_Q and W_K of all blocks by one factor until the largest logit is `HOT`."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    low, high = 0.0, 8.0  # powers of two
    for _ in range(30):
        middle = (low + high) / 2
        for name, p in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                p.data = start[name] * 2.0**middle
        low, high = (low, middle) if model.largest_logit(x) > HOT else (middle, high)
