"""What the processes of the tests measure: models, one set of rows, shards of it, and the layouts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dyntune  # noqa: F401 - for the fork server, which imports this module
from tests.objective import zoo
from tests.objective.zoo import classes, made, rows

__all__ = ["LAYOUTS", "MODELS", "Batch", "cuts", "data", "laid_out", "model", "shards"]

Batch = tuple[torch.Tensor, torch.Tensor]
ROWS = 24
# Of "wide", whose parameters are all that costs memory.
WIDTH, WIDE_LAYERS = 128, 6


def _mlp(hidden: int = 12) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 7), nn.Sequential(nn.Tanh(), nn.Linear(7, 3))
    )


def _normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()


def _dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3))


def _partly_frozen() -> nn.Module:
    net = _mlp()
    net[0].requires_grad_(False)
    return net


def _everything() -> nn.Module:
    """Buffers that forward passes write to, randomness, a frozen parameter."""
    inner = nn.Sequential(nn.BatchNorm1d(7), nn.Dropout(0.2), nn.Linear(7, 3))
    inner[2].bias.requires_grad_(False)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 7), inner)


class _Tied(zoo.Tied):
    """FSDP2 warns of models that return a view."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens).contiguous()


def _wide() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(WIDE_LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))


# The second layer of "ragged" is cut unevenly by two processes and by four, its last by none evenly.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "ragged": lambda: _mlp(9),
    "encoder": zoo.Encoder,
    "tied": _Tied,
    "batchnorm": _normalised,
    "dropout": _dropping,
    "frozen": _partly_frozen,
    "wide": _wide,
    "everything": _everything,
}


def model(name: str) -> nn.Module:
    """The same bits on every process."""
    return made(MODELS[name])


def data(name: str) -> Batch:
    """All rows, the same on every process; "tied" is a language model some of whose targets do not count."""
    if name == "tied":
        targets = classes(ROWS, 5, high=6, seed=2)
        targets[::3, 2:] = -100
        return classes(ROWS, 5, high=6), targets
    shape = {"encoder": (5, 4), "wide": (WIDTH,)}.get(name, (6,))
    return rows(ROWS, *shape), classes(ROWS)


def cuts(size: int, *, equal: bool) -> list[int]:
    """Where the rows are cut into one piece per process; unequal ones grow with the rank."""
    total = size * (size + 1) // 2
    return [ROWS * r // size if equal else ROWS * (r * (r + 1) // 2) // total for r in range(size + 1)]


def shards(name: str, size: int, *, equal: bool, batches: int = 1) -> list[list[Batch]]:
    """Every process's list of batches; the longest piece comes in `batches` of them."""
    x, y = data(name)
    edges = cuts(size, equal=equal)
    pieces = [(x[a:b], y[a:b]) for a, b in pairwise(edges)]
    counts = [1] * (size - 1) + [batches]
    return [
        list(zip(p.tensor_split(n), q.tensor_split(n), strict=True)) for (p, q), n in zip(pieces, counts, strict=True)
    ]


def _sharded(net: nn.Module, **options: Any) -> nn.Module:
    for child in net.children():
        if not isinstance(net, zoo.Tied) and any(True for _ in child.parameters()):
            fully_shard(child, **options)
    return fully_shard(net, **options)


def _left_whole(net: nn.Module) -> nn.Module:
    """Without resharding, and with whole parameters left over from a forward pass, as after an evaluation."""
    _sharded(net, reshard_after_forward=False)
    with torch.no_grad():
        net(torch.zeros(2, 6))
    return net


def _tensor_parallel(net: nn.Module) -> nn.Module:
    size = dist.get_world_size()
    # torch hands pieces of unequal length from one layer to the next only by way of the whole.
    whole = Replicate() if net[0].out_features % size else None  # type: ignore[index]
    plan = {"0": ColwiseParallel(output_layouts=whole), "2": RowwiseParallel(input_layouts=whole)}
    return parallelize_module(net, init_device_mesh("cpu", (size,)), plan)


LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda net: net,
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP2": _sharded,
    "FSDP2 left whole": _left_whole,
    "TP": _tensor_parallel,
}


def laid_out(name: str, layout: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in a layout."""
    return LAYOUTS[layout](model(name).to(dtype))
