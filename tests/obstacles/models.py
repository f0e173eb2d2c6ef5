"""Small models, one obstacle each."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Attention",
    "Blocks",
    "Branch",
    "CastByName",
    "Condition",
    "Detached",
    "Distances",
    "MixedPrecision",
    "Noise",
    "Once",
    "Recurrent",
    "Square",
    "Squared",
    "StopAt",
    "TiedEmbedding",
    "WeightNorm",
    "WithHead",
]


class Attention(nn.Module):
    """``F.scaled_dot_product_attention`` of two heads, averaged over positions."""

    def __init__(self, *, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)
        self.causal, self.dropout = causal, dropout

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal, dropout_p=p)
        return self.out(h.transpose(1, 2).flatten(2)).mean(1)


class WithHead(nn.Module):
    """A sequence layer of torch with a linear head."""

    def __init__(self, layer: nn.Module, **options: bool) -> None:
        super().__init__()
        self.layer, self.out, self.options = layer, nn.Linear(4, 3), options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attends = isinstance(self.layer, nn.MultiheadAttention)
        h = self.layer(x, x, x, **self.options)[0] if attends else self.layer(x)
        return self.out(h.mean(1))


class Recurrent(nn.Module):
    """LSTM or GRU, last position."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.out = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cells(x)[0][:, -1])


class Blocks(nn.Module):
    """Two hidden layers, the second one checkpointed."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.reentrant = reentrant

    def block(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(h))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        h = self.block(h) if self.reentrant is None else checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.out(h)


class TiedEmbedding(nn.Module):
    """Embedding and output layer share one matrix if `tied`."""

    def __init__(self, *, tied: bool, sparse: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(7, 4, sparse=sparse), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.mix(self.embed(tokens)))).transpose(1, 2)


class Branch(nn.Module):
    """Some parameters enter the output linearly, some not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 5), nn.Linear(5, 1)
        self.shift = nn.Parameter(torch.tensor([0.3]))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(x))) + self.shift


class CastByName(nn.Module):
    """Stored in bfloat16, and says so again in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.by_name = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.first(x.bfloat16() if self.by_name else x)))


class MixedPrecision(nn.Module):
    """The head is stored in more bits than the body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).bfloat16()
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).to(self.head.weight.dtype))


class Noise(nn.Module):
    """Adds noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.out(h + torch.randn(h.shape, generator=self.generator, dtype=torch.float32).to(h.dtype))


class Square(torch.autograd.Function):
    """Differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a)
        return a * a

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (a,) = ctx.saved_tensors
        return 2 * a * g


class Once(Square):
    """Marked, which ``autograd.grad`` ignores."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (a,) = ctx.saved_tensors
        return 2 * a * g


class Detached(Square):
    """Says nothing: the term with the square's second derivative is missing, and what is left is symmetric."""

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (a,) = ctx.saved_tensors
        return 2 * a.detach() * g


class Squared(nn.Module):
    """`square` in mid-network."""

    def __init__(self, square: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.out, self.square = nn.Linear(4, 6), nn.Linear(6, 3), square

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.square(self.first(x)))


class WeightNorm(nn.Module):
    """torch's fused normalisation of a weight, or the formula."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.v, self.out = nn.Parameter(torch.rand(6, 1)), nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 3)
        self.fused = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        formula = self.g * self.v / self.v.norm(dim=1, keepdim=True)
        weight = torch._weight_norm(self.v, self.g, 0) if self.fused else formula
        return self.out(torch.tanh(x @ weight.T))


class Distances(nn.Module):
    """Distances to learned centres, by ``torch.cdist`` or by the formula."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.centres = nn.Linear(4, 3), nn.Parameter(torch.eye(3))
        self.fused = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        return -torch.cdist(h, self.centres) if self.fused else -(h[:, None] - self.centres).norm(dim=-1)


class _Token:
    """Lives as long as the hook that holds it, and that as long as the graph."""


class StopAt(nn.Module):
    """Passes its input through, forward and backward, and raises when `condition` says so."""

    def __init__(self, condition: Condition) -> None:
        super().__init__()
        self.condition = condition
        self.graphs: list[weakref.ref[_Token]] = []

    @property
    def live(self) -> int:
        """How many graphs are alive that lead through here."""
        return sum(ref() is not None for ref in self.graphs)

    def check(self, token: _Token, gradient: torch.Tensor | None) -> None:
        error = self.condition(self, gradient is not None)
        if error is not None:
            raise error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        token = _Token()
        if x.requires_grad:
            self.graphs.append(weakref.ref(token))
            x.register_hook(functools.partial(self.check, token))
        self.check(token, None)
        return x


Condition = Callable[[StopAt, bool], BaseException | None]
