"""The three problems: two multilayer perceptrons on digits and a character transformer.

Single batch, cross-entropy, no dropout: every peer can run them as shipped. The attention is written out, as
products and a softmax, because the fused kernel has no second derivative on CPU and no peer switches it off.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

SHAKESPEARE = Path(__file__).resolve().parents[1] / "data" / "shakespeare.txt"
"""Plays of Shakespeare in plain text (public domain)."""

NUM_DIGITS = 512
NUM_SGD_STEPS, SGD_LR = 60, 0.2
VOCABULARY, BLOCK_LENGTH, BATCH_SIZE = 64, 64, 16
NUM_ADAM_STEPS, ADAM_LR = 20, 1e-3


@dataclass(frozen=True)
class Problem:
    """A model at a parameter point, one batch and a loss: a Hessian to be measured."""

    name: str
    description: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    criterion: nn.Module

    def fresh_model(self) -> nn.Module:
        """A copy for one run: some peers leave the evaluation mode, `.grad` or reference cycles behind."""
        return copy.deepcopy(self.model)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


class Attention(nn.Module):
    """Causal self-attention as two matrix products and a softmax."""

    causal: Tensor

    def __init__(self, width: int, num_heads: int, length: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("causal", torch.ones(length, length, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))  # (B, h, T, d)
        scores = (q @ k.transpose(-2, -1)) / heads[-1] ** 0.5  # (B, h, T, T)
        weights = scores.masked_fill(~self.causal[:length, :length], float("-inf")).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, length: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, length)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharTransformer(nn.Module):
    """A small language model; logits are (batch, vocabulary, length), as `nn.CrossEntropyLoss` takes them."""

    def __init__(self, width: int = 128, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(0.02 * torch.randn(BLOCK_LENGTH, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, BLOCK_LENGTH) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.tensor(digits.data[:NUM_DIGITS] / 16.0, dtype=torch.float32)  # grey levels 0..16
    return inputs, torch.tensor(digits.target[:NUM_DIGITS])


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))


def _train(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    num_steps: int,
) -> None:
    for _ in range(num_steps):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()


def mlp_at_init() -> Problem:
    """Indefinite Hessian with a small gap at the top: the case where a start vector can mislead."""
    inputs, targets = _digits()
    text = f"MLP 64-256-256-10, tanh, {NUM_DIGITS} digits, at initialisation"
    return Problem("mlp-init", text, _mlp(), inputs, targets, nn.CrossEntropyLoss())


def mlp_after_sgd() -> Problem:
    """The same model once a few directions have sharpened."""
    inputs, targets = _digits()
    model, criterion = _mlp(), nn.CrossEntropyLoss()
    batches = iter(lambda: (inputs, targets), None)
    _train(model, criterion, torch.optim.SGD(model.parameters(), SGD_LR), batches, NUM_SGD_STEPS)
    text = f"the same MLP after {NUM_SGD_STEPS} full-batch SGD steps (lr {SGD_LR})"
    return Problem("mlp-sgd", text, model, inputs, targets, criterion)


def _tokens() -> Tensor:
    """Characters as indices; the rarest share the last one, so that the vocabulary is 64."""
    text = SHAKESPEARE.read_text()
    common = [char for char, _ in Counter(text).most_common(VOCABULARY - 1)]
    index = {char: i for i, char in enumerate(sorted(common))}
    return torch.tensor([index.get(char, VOCABULARY - 1) for char in text])


def _text_batches(tokens: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - BLOCK_LENGTH, (BATCH_SIZE,), generator=generator)
        windows = torch.stack([tokens[i : i + BLOCK_LENGTH + 1] for i in starts.tolist()])
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def transformer_after_adam() -> Problem:
    """A language model early in training, on a batch it has not seen."""
    torch.manual_seed(0)
    model, criterion = CharTransformer(), nn.CrossEntropyLoss()
    batches = _text_batches(_tokens(), seed=0)
    _train(model, criterion, torch.optim.Adam(model.parameters(), ADAM_LR), batches, NUM_ADAM_STEPS)
    inputs, targets = next(batches)
    text = (
        f"character transformer, 2 layers, width 128, 4 heads, T={BLOCK_LENGTH}, B={BATCH_SIZE}, "
        f"explicit attention, after {NUM_ADAM_STEPS} Adam steps (lr {ADAM_LR})"
    )
    return Problem("transformer", text, model, inputs, targets, criterion)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp-init": mlp_at_init,
    "mlp-sgd": mlp_after_sgd,
    "transformer": transformer_after_adam,
}
