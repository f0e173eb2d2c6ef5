"""Attention logits, block by block: from queries and keys, or as a model made them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["BARRED", "DenseScores", "FusedScores", "Scores"]

# Additive masks bar at this value and below: the mildest constant in use (older transformers models and BERT). What is
# allowed at -1e4 has probability exp(-1e4) = 0 in every floating-point format.
BARRED = -1e4


class Scores(ABC):
    """Logits of one call of one attention module.

    The attributes are ``shape`` (rows, heads, queries, keys), ``device`` and ``dtype``, that of the blocks.
    """

    shape: tuple[int, int, int, int]
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def block(self, rows: slice, heads: slice, queries: slice) -> torch.Tensor:
        """Logits in ``dtype``, minus infinity where barred; a tensor of its own. Shape as cut."""

    @abstractmethod
    def _open_keys(self) -> torch.Tensor | None:
        """Which keys are open to any query of any head. Shape (rows, keys); None for all."""

    def with_heads(self, heads: int) -> Scores:  # noqa: ARG002 - for those that do not know theirs
        """The same where rows and heads lie in one dimension, rows first."""
        return self

    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which queries are not padding, shape (rows, queries), and the first key that is none, shape (rows,)."""
        rows, _, queries, keys = self.shape
        is_open = self._open_keys()
        if is_open is None or keys == 0:
            every = torch.ones(rows, queries, dtype=torch.bool, device=self.device)
            return every, torch.zeros(rows, dtype=torch.long, device=self.device)
        first = is_open.to(torch.uint8).argmax(-1)
        return (is_open if queries == keys else is_open.new_ones(rows, queries)), first


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class FusedScores(Scores):
    """From what a fused kernel was given.

    Args:
        query: Shape (rows, heads, queries, width).
        key: Shape (rows, heads or a divisor of it, keys, width).
        mask: Boolean (True: allowed) or additive; broadcasts to (rows, heads, queries, keys). None for none.
        causal: Whether query i sees keys up to i only.
        scale: What the products are multiplied by.
    """

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, *, mask: torch.Tensor | None, causal: bool, scale: float
    ) -> None:
        self._query, self._key, self._causal, self._scale = query, key, causal, scale
        self.shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        self.device, self.dtype = query.device, _working(query.dtype)
        self._group = query.shape[1] // max(1, key.shape[1])
        self._mask = None if mask is None else mask[(None,) * (4 - mask.dim())]

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> FusedScores:
        """From the arguments of an ATen operation, by name."""
        query, scale = arguments["query"], arguments.get("scale")
        mask = arguments.get("attn_mask", arguments.get("attn_bias"))
        return FusedScores(
            query,
            arguments["key"],
            mask=mask,
            causal=bool(arguments.get("is_causal", False)),
            scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        )

    def block(self, rows: slice, heads: slice, queries: slice) -> torch.Tensor:
        """See :class:`Scores`."""
        query = self._query[rows, heads, queries].to(self.dtype)
        own = torch.arange(heads.start, heads.stop, device=self.device) // max(1, self._group)
        key = self._key[rows, own].to(self.dtype)
        z = (query * self._scale) @ key.transpose(-1, -2)
        if self._mask is not None:
            mask = self._mask.expand(self.shape)[rows, heads, queries]
            barred = ~mask if mask.dtype == torch.bool else mask <= BARRED
            if mask.dtype != torch.bool:
                z += mask
            z.masked_fill_(barred, -math.inf)
        if self._causal:
            later = torch.arange(self.shape[3], device=self.device)
            now = torch.arange(queries.start, queries.stop, device=self.device)
            z.masked_fill_(later > now[:, None], -math.inf)
        return z

    def _open_keys(self) -> torch.Tensor | None:
        if self._mask is None:
            return None
        is_open = self._mask if self._mask.dtype == torch.bool else self._mask > BARRED
        return is_open.flatten(1, 2).any(1).expand(self.shape[0], self.shape[3])


class DenseScores(Scores):
    """As they enter a softmax over the last dimension.

    Args:
        logits: Shape (rows, ..., heads, queries, keys), or (rows, queries, keys) for one head.
    """

    def __init__(self, logits: torch.Tensor, heads: int = 1) -> None:
        queries, keys = logits.shape[-2:]
        heads = logits.shape[-3] if logits.dim() > 3 else heads
        self._raw = logits
        self._logits = logits.reshape(-1, heads, queries, keys) if logits.numel() else logits.new_zeros(0, heads, 1, 1)
        self.shape = tuple(self._logits.shape)  # type: ignore[assignment]
        self.device, self.dtype = logits.device, _working(logits.dtype)

    def with_heads(self, heads: int) -> Scores:
        """See :class:`Scores`."""
        return DenseScores(self._raw, heads) if self._raw.dim() == 3 else self

    def block(self, rows: slice, heads: slice, queries: slice) -> torch.Tensor:
        """See :class:`Scores`."""
        z = self._logits[rows, heads, queries].to(self.dtype, copy=True)
        return z.masked_fill_(z <= BARRED, -math.inf)

    def _open_keys(self) -> torch.Tensor | None:
        return torch.stack([(row > BARRED).any(0).any(0) for row in self._logits]) if self.shape[0] else None
