"""Numbers of steps that wait as tensors where they were made, and are read together: :class:`Pending`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dyntune.errors import InvalidArgumentError
from dyntune.objective.dtensor import local

__all__ = ["Pending", "Step", "kept_scalar", "read_scalars"]


def kept_scalar(value: Any) -> float | torch.Tensor:
    """A number as it is now: a tensor is copied where it is, since the next step may write to it.

    Raises:
        InvalidArgumentError: Not one real number.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise InvalidArgumentError(
                f"loss has shape {tuple(value.shape)} and dtype {value.dtype}: one real number per step is recorded. "
                "Give its mean: observe(loss.mean())."
            )
        return local(value.detach()).clone()
    if isinstance(value, (str, bytes)):
        raise InvalidArgumentError(f"loss={value!r} is text; give the loss tensor or a number.")
    return float(value)


def read_scalars(items: Sequence[float | torch.Tensor]) -> list[float]:
    """All of them as numbers: one transfer for each device and dtype."""
    found: list[float] = [0.0] * len(items)
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, item in enumerate(items):
        if isinstance(item, torch.Tensor):
            places.setdefault((item.device, item.dtype), []).append(i)
        else:
            found[i] = item
    for where in places.values():
        stacked = torch.stack([items[i].reshape(()) for i in where])  # type: ignore[union-attr]
        for i, value in zip(where, stacked.tolist(), strict=True):
            found[i] = float(value)
    return found


class Step:
    """What is kept of one step: its number, and per column the numbers to be averaged."""

    __slots__ = ("columns", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.columns: dict[str, list[float | torch.Tensor]] = {}

    def add(self, name: str, value: float | torch.Tensor) -> None:
        """One more number of a column."""
        column = self.columns.get(name)
        if column is None:
            self.columns[name] = [value]
        else:
            column.append(value)


class Pending:
    """Steps in order, until they are read."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __len__(self) -> int:
        return len(self.steps)

    def take(self, upto: int) -> list[tuple[int, dict[str, float]]]:
        """Steps below `upto`, with the mean of every column; waits for the device.

        They are removed first: numbers that cannot be read are not tried again.
        """
        cut = sum(step.number < upto for step in self.steps)
        taken, self.steps = self.steps[:cut], self.steps[cut:]
        flat = [value for step in taken for column in step.columns.values() for value in column]
        values = iter(read_scalars(flat))
        rows = []
        for step in taken:
            columns = {}
            for name, column in step.columns.items():
                numbers = [next(values) for _ in column]
                columns[name] = numbers[0] if len(numbers) == 1 else sum(numbers) / len(numbers)
            rows.append((step.number, columns))
        return rows
