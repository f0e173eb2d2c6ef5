"""How many bytes a loss's graph saves for the backward pass, also where checkpointing keeps them out of sight.

The engine is chosen by what graphs take. A checkpointed block saves next to nothing in the forward pass, but its
gradient's graph, which a product needs, holds everything that the block computes again: counted by what the forward
pass saves, it looked 14 to 44 times too light (transformers of 4 checkpointed blocks, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyntune.objective.dtensor import local
from dyntune.objective.triage import graph_nodes

__all__ = ["SavedBytes", "bytes_made"]

# Tensors that the graph holds for each one that was counted. Without checkpointing it was 1.0 to 1.2 (a node may save
# nothing under a name), with all blocks checkpointed 10. A block so small that it stays below this hides little.
HIDDEN = 1.25
HIDDEN_LEAST = 5


class SavedBytes:
    """Counts what a forward pass saves.

    Args:
        parameters: Tensors that do not count.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._own = {local(p).untyped_storage().data_ptr() for p in parameters}
        self._seen: dict[int, int] = {}
        self._count = 0

    def counting(self) -> AbstractContextManager[Any]:
        """The scope of the forward pass."""

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = local(tensor).untyped_storage()
            self._seen[storage.data_ptr()] = storage.nbytes()
            self._count += 1
            return tensor.detach()  # the tensor itself would hold the graph that holds it, for ever

        return torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)

    @property
    def total(self) -> int:
        """Bytes of what was seen, each storage once, parameters apart."""
        return sum(size for pointer, size in self._seen.items() if pointer not in self._own)

    def hidden(self, loss: torch.Tensor) -> bool:
        """Whether the graph saves much more than was seen: another hook, that of a checkpoint, was closer."""
        names: dict[type[Node], list[str]] = {}
        held = 0
        for node in graph_nodes([loss]):
            kind = type(node)
            if kind not in names:
                names[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
            held += sum(_held(node, name) for name in names[kind])
        return held > HIDDEN * self._count + HIDDEN_LEAST


def _held(node: Node, name: str) -> int:
    """How many tensors a node saves under a name; asking for the packed ones runs no hook."""
    try:
        found = getattr(node, name)
    except RuntimeError:  # freed already
        return 0
    return len(found) if isinstance(found, (list, tuple)) else int(found is not None)


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all results that are not views of an argument."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        self.total += sum(storage.nbytes() for storage in _storages(result) if storage.data_ptr() not in given)
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [local(t).untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def bytes_made(forward: Callable[[], object]) -> int:
    """Bytes of every intermediate result of a forward pass: at most what its graph saves where nothing is hidden.

    About twice that on an MLP, a CNN and a transformer: room for the second copy that a checkpointed block's double
    backward was seen to hold.
    """
    made = _Made()
    with made:
        forward()
    return made.total
