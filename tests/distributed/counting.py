"""What goes over the wire and what lies in memory, counted at torch's dispatcher: the model's own collectives, too."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Memory", "Traffic"]

KINDS = {"allreduce": "all-reduce", "all_reduce": "all-reduce", "broadcast": "broadcast"}
KINDS |= {"allgather": "all-gather", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}


def _nbytes(item: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(item) if isinstance(t, torch.Tensor))


def _storages(item: Any) -> list[Any]:
    tensors = [t for t in tree_leaves(item) if isinstance(t, torch.Tensor)]
    return [getattr(t, "_local_tensor", t).untyped_storage() for t in tensors]


class Traffic(TorchDispatchMode):
    """Bytes of the whole buffers, by kind of collective: of the larger of what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        space, _, name = str(function).partition(".")
        if space in ("c10d", "_c10d_functional"):
            kind = next((k for part, k in KINDS.items() if part in name), None)
            if kind is not None:
                sizes = [_nbytes(a) for a in args] + [_nbytes(result)]
                self.nbytes[kind] += max(sizes)
                self.calls[kind] += 1
        return result


class Memory(TorchDispatchMode):
    """The most bytes of tensors made within the scope that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in known:
                self._living[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._living = {key: held for key, held in self._living.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))
        return result
