"""The architectures of the scenarios, small enough to train hundreds of times."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lr.data import CHARACTERS, CLASSES

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Scaled(nn.Linear):
    """A linear layer that stores W / m and multiplies by m: the same function at first, another best LR."""

    def __init__(self, inputs: int, outputs: int, multiplier: float) -> None:
        super().__init__(inputs, outputs)
        self.multiplier = multiplier
        with torch.no_grad():
            self.weight.div_(multiplier)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x * self.multiplier, self.weight, self.bias)


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices, which is zero at first (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


def add_lora(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    """Freeze `model` and put LoRA on every linear layer."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRA(child, rank, alpha))
    return model


def mlp(
    inputs: int,
    outputs: int,
    *,
    width: int,
    depth: int = 2,
    activation: str = "relu",
    dropout: float = 0.0,
    multiplier: float = 1.0,
) -> nn.Sequential:
    """`depth` hidden layers of `width`."""

    def linear(fan_in: int, fan_out: int) -> nn.Linear:
        return nn.Linear(fan_in, fan_out) if multiplier == 1.0 else Scaled(fan_in, fan_out, multiplier)

    layers: list[nn.Module] = []
    for fan_in in (inputs, *[width] * (depth - 1)):
        layers += [linear(fan_in, width), ACTIVATIONS[activation]()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, linear(width, outputs))


def autoencoder(inputs: int, *, width: int, code: int = 8, activation: str = "relu") -> nn.Sequential:
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        *(nn.Linear(inputs, width), act(), nn.Linear(width, code), nn.Linear(code, width), act()),
        nn.Linear(width, inputs),
    )


def cnn(side: int, *, width: int, activation: str = "relu", dropout: float = 0.0) -> nn.Sequential:
    """Two convolutions, the second with stride 2, and a linear layer."""
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        *(nn.Conv2d(1, width, 3, padding=1), act(), nn.Conv2d(width, width, 3, stride=2, padding=1), act()),
        *(nn.Flatten(), nn.Dropout(dropout), nn.Linear(width * ((side + 1) // 2) ** 2, CLASSES)),
    )


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x))


def resnet(side: int, *, width: int, depth: int = 2) -> nn.Sequential:
    """A stem with stride 2, `depth` residual blocks with BatchNorm, mean over positions."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)),
        *(nn.BatchNorm2d(width), nn.ReLU()),
        *(Residual(width) for _ in range(depth)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)),
    )


class GRU(nn.Module):
    """Rows of an image, or characters, one after the other."""

    def __init__(self, *, width: int, text: bool, side: int = 8) -> None:
        super().__init__()
        self.text, self.side = text, side
        self.embed = nn.Embedding(len(CHARACTERS), 16) if text else nn.Identity()
        self.cell = nn.GRU(16 if text else side, width, batch_first=True)
        self.head = nn.Linear(width, len(CHARACTERS) if text else CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.cell(self.embed(x) if self.text else x.view(-1, self.side, self.side))
        return self.head(hidden if self.text else hidden[:, -1])


class Block(nn.Module):
    """Attention and an MLP, each with its LayerNorm before (pre-LN) or after the sum (post-LN)."""

    def __init__(self, width: int, heads: int, *, post: bool, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.post, self.causal = heads, post, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post:
            x = self.norm1(x + self.dropout(self.attend(x)))
            return self.norm2(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attend(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class LanguageModel(nn.Module):
    """Characters in, logits of the next out; `tied`: the head is the embedding."""

    def __init__(
        self,
        *,
        width: int,
        depth: int = 2,
        heads: int = 2,
        length: int = 32,
        post: bool = False,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, post=post, causal=True, dropout=dropout) for _ in range(depth))
        )
        self.norm = nn.Identity() if post else nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CHARACTERS), bias=not tied)
        if tied:
            nn.init.normal_(self.embed.weight, std=0.02)
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position[: x.shape[1]])))


class ViT(nn.Module):
    """Patches of 2 x 2 pixels of an 8 x 8 image."""

    def __init__(self, *, width: int, depth: int = 2, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, post=False, causal=False, dropout=dropout) for _ in range(depth))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.norm(self.blocks(self.patch(patches) + self.position)).mean(1))


SIDES = {"digits": 8, "mnist": 14, "mnist8": 8}
COLUMNS = {"digits": 64, "mnist": 196, "mnist8": 64, "diabetes": 10, "breast": 30}
OUTPUTS = {"digits": CLASSES, "mnist": CLASSES, "mnist8": CLASSES, "diabetes": 1, "breast": 1}


def build(name: str, data: str, **options: Any) -> nn.Module:
    """A freshly initialised model for a data set; draws from the global random state.

    Args:
        name: ``"mlp-relu"``, ``"mlp-tanh"``, ``"mlp-gelu"``, ``"autoencoder"``, ``"cnn"``, ``"resnet"``, ``"gru"``,
            ``"vit"``, ``"pre-ln"``, ``"post-ln"``, ``"gpt"``.
        data: See :func:`benchmarks.lr.data.load`.
        options: As the architecture takes.
    """
    if name.startswith("mlp-"):
        return mlp(COLUMNS[data], OUTPUTS[data], activation=name.removeprefix("mlp-"), **options)
    if name == "autoencoder":
        return autoencoder(COLUMNS[data], **options)
    if name in ("cnn", "resnet"):
        return {"cnn": cnn, "resnet": resnet}[name](SIDES[data], **options)
    if name == "gru":
        return GRU(text=data not in SIDES, side=SIDES.get(data, 0), **options)
    if name == "vit":
        return ViT(**options)
    return LanguageModel(post=name == "post-ln", tied=name == "gpt", **options)
