"""Numbers of steps that wait as tensors where they were made, and are read together: :class:`Pending`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from dyntune.errors import InvalidArgumentError
from dyntune.objective.dtensor import local

__all__ = ["Block", "Number", "Pending", "Step", "kept_scalar", "read_scalars"]

Number: TypeAlias = "float | torch.Tensor"


def kept_scalar(value: Any) -> Number:
    """A number as it is now: of a device, a copy that stays there, since the next step may write to it.

    On the CPU it is read at once: that takes less than a copy, and waits for nothing.

    Raises:
        InvalidArgumentError: Not one real number.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise InvalidArgumentError(
                f"loss has shape {tuple(value.shape)} and dtype {value.dtype}: one real number per step is recorded. "
                "Give its mean: observe(loss.mean())."
            )
        if value.is_cpu and type(value) is torch.Tensor:
            return float(value.item())
        return local(value.detach()).clone()
    if isinstance(value, (str, bytes)):
        raise InvalidArgumentError(f"loss={value!r} is text; give the loss tensor or a number.")
    return float(value)


def read_scalars(items: Sequence[Number]) -> list[float]:
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
    """What is kept of one step.

    Args:
        number: Its number.
    """

    __slots__ = ("losses", "lr", "more", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.lr: Number | None = None  # of the first group
        self.losses: list[Number] | None = None  # to be averaged
        self.more: dict[str, Number] | None = None  # by column

    def add_loss(self, loss: Number) -> None:
        """One more loss of this step."""
        if self.losses is None:
            self.losses = [loss]
        else:
            self.losses.append(loss)

    def put(self, name: str, value: Number) -> None:
        """The number of a column."""
        if self.more is None:
            self.more = {}
        self.more[name] = value


@dataclass(frozen=True)
class Block:
    """Consecutive steps in columns.

    Args:
        first: The first step.
        count: How many.
        columns: By name: places from 0 that have a number, ascending, and the numbers.
    """

    first: int
    count: int
    columns: dict[str, tuple[list[int], list[float]]]

    def values(self) -> dict[str, Any]:
        """In the form that :meth:`dyntune.monitor.rows.Table.extend` takes."""
        found: dict[str, Any] = {}
        for name, (at, numbers) in self.columns.items():
            if len(at) < self.count:
                found[name] = {"at": at, "values": numbers}
            else:
                found[name] = numbers[0] if numbers.count(numbers[0]) == self.count else numbers
        return found


class Pending:
    """Steps in order, until they are read."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def take(self, upto: int) -> Block | None:
        """Steps below `upto`, with the mean of their losses; waits for the device. None where there is none.

        They are removed first: numbers that cannot be read are not tried again.
        """
        steps, self.steps = [s for s in self.steps if s.number < upto], [s for s in self.steps if s.number >= upto]
        if not steps:
            return None
        waiting: dict[str, tuple[list[int], list[Number]]] = {}
        shares: list[int] = []  # losses per step that has some
        for place, step in enumerate(steps):
            if step.losses is not None:
                at, numbers = waiting.setdefault("train/loss", ([], []))
                at.append(place)
                numbers += step.losses
                shares.append(len(step.losses))
            if step.lr is not None:
                at, numbers = waiting.setdefault("train/lr", ([], []))
                at.append(place)
                numbers.append(step.lr)
            for name, number in step.more.items() if step.more is not None else ():
                at, numbers = waiting.setdefault(name, ([], []))
                at.append(place)
                numbers.append(number)
        flat = read_scalars([number for _, numbers in waiting.values() for number in numbers])
        columns: dict[str, tuple[list[int], list[float]]] = {}
        start = 0
        for name, (at, numbers) in waiting.items():
            values = flat[start : start + len(numbers)]
            start += len(numbers)
            columns[name] = at, _means(values, shares) if name == "train/loss" else values
        return Block(steps[0].number, len(steps), columns)


def _means(values: list[float], shares: list[int]) -> list[float]:
    """Means of so many values each."""
    if len(values) == len(shares):
        return values
    found, start = [], 0
    for share in shares:
        found.append(sum(values[start : start + share]) / share)
        start += share
    return found
