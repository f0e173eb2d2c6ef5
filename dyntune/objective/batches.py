"""The batch grammar: what counts as one batch, what as many, and how many rows a batch has.

A tensor, a mapping, or a list or tuple whose first element is a tensor is one batch. A list or tuple of those is many.
Any other re-iterable (a DataLoader) is drawn from once and frozen. One-shot iterators are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch

from dyntune.errors import BatchError, EmptyBatchError, InvalidArgumentError, OneShotIteratorError
from dyntune.objective.state import preserved_rng

__all__ = ["freeze_batches", "is_single_batch", "num_rows", "tensors_of", "to_device"]


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
    with preserved_rng():
        return tuple(islice(iter(batches), None if num_batches == "all" else num_batches))


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


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; the user's containers are never written to."""
    if isinstance(batch, torch.Tensor):
        # A tensor made under inference_mode cannot be saved for backward; its clone can.
        moved = batch.clone() if batch.is_inference() else batch
        return moved if moved.device == device else moved.to(device)
    if isinstance(batch, Mapping):
        items = {key: to_device(value, device) for key, value in batch.items()}
        if all(items[key] is batch[key] for key in items):
            return batch
        try:
            twin = copy.copy(batch)
            for key, value in items.items():
                twin[key] = value  # type: ignore[index]
        except TypeError:  # an immutable mapping
            return items
        return twin
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(item, device) for item in batch)
    return batch
