"""Loss, gradient norm and learning rate of consecutive steps in blocks of one size: :class:`Steps`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dyntune.monitor.rows import Array, Rows

__all__ = ["BLOCK", "Block", "Steps", "median"]

# Steps that are judged together, by what was known before them. The median of 32 is not moved by a spike or two, and
# half of what a monitor writes at a time. Blocks of one size make alarms the same however rows were handed over.
BLOCK = 32
COLUMNS = ("train/loss", "grad/norm", "train/lr")


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive steps; NaN where a number was not recorded (or is NaN, which is for others to tell).

    What several detectors ask for is worked out once.
    """

    steps: NDArray[np.int64]  # (BLOCK,)
    loss: Array  # (BLOCK,)
    norm: Array  # (BLOCK,)
    lr: Array  # (BLOCK,)

    @cached_property
    def losses(self) -> Array:
        """Those that are finite, shape (n,)."""
        return _finite(self.loss)

    @cached_property
    def norms(self) -> Array:
        """Those that are finite, shape (n,)."""
        return _finite(self.norm)

    @cached_property
    def rates(self) -> Array:
        """Those that are finite, shape (n,)."""
        return _finite(self.lr)

    @cached_property
    def level(self) -> float:
        """Median of the losses; NaN without any."""
        return median(self.losses)

    @cached_property
    def length(self) -> float:
        """Median of the gradient norms; NaN without any."""
        return median(self.norms)

    @cached_property
    def highest_rate(self) -> float:
        """NaN without any."""
        return float(np.fmax.reduce(self.lr))


def median(values: Array) -> float:
    """The value in the middle, of an even number the upper one; NaN of none, and undefined where there are NaNs.

    A fifth of the time of ``np.median``, which looks for NaNs and takes a mean.

    Args:
        values: Shape (n,).
    """
    return float(np.partition(values, values.size // 2)[values.size // 2]) if values.size else math.nan


def _finite(values: Array) -> Array:
    finite = np.isfinite(values)
    return values if finite.all() else values[finite]


class Steps:
    """Cuts what is recorded at every step into blocks. Several detectors may share one: rows are cut once.

    Cost:
        Some 10 microseconds for 64 rows.

    Example:
        >>> from dyntune.monitor.rows import Row
        >>> rows = Rows.of(Row(step=i, values={"train/loss": 1.0 / (i + 1)}) for i in range(70))
        >>> [(int(block.steps[0]), len(block.steps)) for block in Steps().take(rows)]
        [(0, 32), (32, 32)]
    """

    def __init__(self) -> None:
        self._numbers = np.empty((len(COLUMNS), 0))
        self._steps = np.empty(0, dtype=np.int64)
        self._rows: Rows | None = None
        self._blocks: list[Block] = []

    def take(self, rows: Rows) -> list[Block]:
        """More rows; the blocks that are full now. The same rows again: the same blocks."""
        if rows is not self._rows:
            self._rows, self._blocks = rows, self._cut(rows)
        return self._blocks

    def _cut(self, rows: Rows) -> list[Block]:
        names = rows.names
        present = [name in names for name in COLUMNS]
        if not any(present):
            return []
        new = np.full((len(COLUMNS), len(rows)), np.nan)
        for index, name in enumerate(COLUMNS):
            if present[index]:
                new[index] = rows.column(name)
        steps = rows.steps
        kept = np.logical_or.reduce([rows.has(name) for name in COLUMNS])
        if not kept.all():  # rows of measurements and settings are among them: not steps of their own
            new, steps = new[:, kept], steps[kept]
        numbers = np.concatenate([self._numbers, new], axis=1)
        steps = np.concatenate([self._steps, steps])
        whole = len(steps) // BLOCK * BLOCK
        self._numbers, self._steps = numbers[:, whole:], steps[whole:]
        return [
            Block(steps[at : at + BLOCK], *(numbers[index, at : at + BLOCK] for index in range(len(COLUMNS))))
            for at in range(0, whole, BLOCK)
        ]
