"""The batch grammar: what counts as one batch, what as many, and how many rows a batch has.

A tensor, a mapping, or a list or tuple whose first element is a tensor is one batch. A list or tuple of those is many.
Any other re-iterable (a DataLoader) is drawn from once and frozen. One-shot iterators are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dyntune.errors import BatchError, EmptyBatchError, InvalidArgumentError, OneShotIteratorError
from dyntune.objective.state import preserved_rng

__all__ = ["freeze_batches", "is_single_batch", "map_tensors", "num_rows", "split_rows", "tensors_of", "to_device"]


def is_single_batch(batches: Any) -> bool:
    """Whether `batches` is one batch by the grammar."""
    if isinstance(batches, (torch.Tensor, Mapping)):
        return True
    return isinstance(batches, (list, tuple)) and len(batches) > 0 and isinstance(batches[0], torch.Tensor)


def freeze_batches(batches: Any, *, num_batches: int | Literal["all"], device: torch.device) -> tuple[Any, ...]:
    """Draw, check and move the batches.

    Args:
        batches: See the module's docstring.
        num_batches: How many to draw from a loader; explicit lists are used whole.
        device: Where the tensors go.

    Returns:
        A tuple of batches, tensors on `device`.

    Raises:
        OneShotIteratorError: An iterator or generator.
        EmptyBatchError: Nothing was drawn, or a batch has no rows.
        BatchError: Not a batch at all.
    """
    if num_batches != "all" and (not isinstance(num_batches, int) or num_batches < 1):
        raise InvalidArgumentError(f'num_batches={num_batches!r}: give a positive number, or "all".')
    drawn = tuple(to_device(batch, device) for batch in _draw(batches, num_batches))
    if not drawn:
        raise EmptyBatchError(
            "batches is empty: nothing can be measured without data. Pass a batch such as (inputs, targets), a list of "
            "batches, or a DataLoader that yields at least one."
        )
    for index, batch in enumerate(drawn):
        if num_rows(batch) == 0:
            raise EmptyBatchError(
                f"batch {index} has no rows (shapes {[tuple(t.shape) for t in tensors_of(batch)][:4]}): its mean loss "
                "is undefined. Leave it out."
            )
    return drawn


def _draw(batches: Any, num_batches: int | Literal["all"]) -> Sequence[Any]:
    if is_single_batch(batches):
        return (batches,)
    if isinstance(batches, (list, tuple)):
        if any(item is None or isinstance(item, (str, bytes, int, float)) for item in batches):
            raise BatchError(
                f"batches is a {type(batches).__name__} that holds {[type(b).__name__ for b in batches][:4]}; a batch "
                "is a tensor, a mapping, or a list or tuple that begins with a tensor."
            )
        return batches
    if isinstance(batches, Iterator):
        raise OneShotIteratorError(
            f"batches is a one-shot iterator ({type(batches).__name__}): measuring would use it up, and a second "
            "product would see other data. Write: batches = list(itertools.islice(iterator, 16))"
        )
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise BatchError(
            f"batches is a {type(batches).__name__}; pass a tensor, a mapping, (inputs, targets), a list of those, or "
            "a DataLoader."
        )
    if isinstance(batches, (str, bytes)):
        raise BatchError("batches is a string; pass tensors.")
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise BatchError(
            f"batches is a Dataset ({type(batches).__name__}), which yields single examples. Write: batches = "
            "DataLoader(dataset, batch_size=64)"
        )
    with preserved_rng(), _undisturbed(batches):
        return tuple(islice(iter(batches), None if num_batches == "all" else num_batches))


@contextmanager
def _undisturbed(loader: Any) -> Iterator[None]:
    """Put back the generators that a loader owns, and the iterator of one with persistent workers, perhaps in use."""
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners)}
    generators = [(g, g.get_state()) for g in found.values() if isinstance(g, torch.Generator)]
    running = getattr(loader, "_iterator", None) if isinstance(loader, DataLoader) else None
    try:
        if running is not None:
            loader._iterator = None
        yield
    finally:
        if running is not None:
            loader._iterator = running
        for generator, state in generators:
            generator.set_state(state)


def tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a batch, in order, through nested lists, tuples and mappings."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from tensors_of(item)
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from tensors_of(item)


def num_rows(batch: Any) -> int:
    """Size of the first dimension of the first tensor; 1 for a batch without tensors or a zero-dimensional one."""
    first = next(tensors_of(batch), None)
    return 1 if first is None or first.dim() == 0 else first.shape[0]


def split_rows(batch: Any, parts: int) -> tuple[Any, ...]:
    """Cut a batch into at most `parts` of consecutive rows; tensors without the batch's rows go to every part.

    Args:
        batch: A batch by the grammar.
        parts: How many, >= 1.
    """
    rows = num_rows(batch)
    edges = [rows * i // parts for i in range(parts + 1)]
    return tuple(_rows(batch, rows, slice(a, b)) for a, b in pairwise(edges) if b > a)


def _rows(batch: Any, rows: int, part: slice) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[part] if batch.dim() and batch.shape[0] == rows else batch
    if isinstance(batch, Mapping):
        return {key: _rows(value, rows, part) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_rows(item, rows, part) for item in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_rows(item, rows, part) for item in batch)
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; the user's containers are never written to."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        # A tensor made under inference_mode cannot be saved for backward; its clone can.
        usable = tensor.clone() if tensor.is_inference() else tensor
        return usable if usable.device == device else usable.to(device)

    return map_tensors(batch, moved)


def map_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The batch with `change` applied to each of its tensors, in containers of the same kind."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        items = {key: map_tensors(value, change) for key, value in batch.items()}
        if all(items[key] is batch[key] for key in items):
            return batch
        # A shallow copy keeps the type (BatchEncoding has attributes), where its copy does not share the items.
        if isinstance(batch, dict) or (isinstance(batch, MutableMapping) and hasattr(batch, "__copy__")):
            twin = copy.copy(batch)
            twin.update(items)
            return twin
        return items
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(item, change) for item in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(item, change) for item in batch)
    return batch
