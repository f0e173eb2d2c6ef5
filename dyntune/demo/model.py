"""A character transformer as people write them, and how it is trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from dyntune.demo.data import Batch

__all__ = ["CharTransformer", "loss_fn", "train"]


class Block(nn.Module):
    """Attention, then a multilayer perceptron, each on what it adds to."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, width / heads)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        added: torch.Tensor = self.mlp(self.norm2(x))
        return x + added


class CharTransformer(nn.Module):
    """Logits of the next character.

    Args:
        vocabulary: How many characters there are.
        width: Width of the residual stream, a multiple of four.
        layers: Number of blocks.
        length: Longest context.
        seed: Seed of the initial weights; the global generator is left alone.
    """

    def __init__(self, vocabulary: int, *, width: int = 64, layers: int = 2, length: int = 64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token = nn.Embedding(vocabulary, width)
            self.place = nn.Embedding(length, width)
            self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(layers)))
            self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """(B, T) to (B, T, vocabulary)."""
        places = torch.arange(characters.shape[1], device=characters.device)
        logits: torch.Tensor = self.head(self.blocks(self.token(characters) + self.place(places)))
        return logits


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy in nats per character."""
    characters, following = batch
    return F.cross_entropy(model(characters).flatten(0, 1), following.flatten())


def train(model: nn.Module, batches: Iterable[Batch], *, lr: float, warmup: int, num_steps: int) -> None:
    """AdamW, a linear warm-up to `lr`, then linearly down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), (num_steps - step) / max(num_steps - warmup, 1))
    )
    for batch in batches:
        loss = loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
