"""How vectors are spread over the processes of a job: what a space has to know of it, and nothing of collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Spread"]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _same_part(_index: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How the vectors of a space are spread over processes.

    Two cases share it. *Replicas* hold all of every vector: inner products are local, and `agree` sees to it that all
    processes go on with the same bits. *Shards* hold a part each: `total` adds up what the parts contribute.

    Args:
        shapes: Whole shape of every tensor; the space's own shapes are those of this process's parts.
        weights: One over the number of processes that add the same entries to `total`, per tensor.
        nbytes: Bytes of the largest part of a vector that any process holds, so that all choose the same basis.
        total: Sum over the processes, in place.
        agree: The first process's numbers, in place.
        part: ``(index, tensor) -> this process's part`` of a whole or distributed tensor.
        present: ``(index, part) -> tensor`` as the user knows it.
        cut: Whether any process holds less than all.
    """

    shapes: tuple[torch.Size, ...]
    weights: tuple[float, ...]
    nbytes: int
    total: Callable[[torch.Tensor], torch.Tensor] = _same
    agree: Callable[[torch.Tensor], torch.Tensor] = _same
    part: Callable[[int, torch.Tensor], torch.Tensor] = _same_part
    present: Callable[[int, torch.Tensor], torch.Tensor] = _same_part
    cut: bool = False
