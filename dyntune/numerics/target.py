"""Which eigenvalues are wanted, how they are ordered, and what must be excluded for them to be right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError

__all__ = ["Target", "Which"]

Which: TypeAlias = Literal["largest", "smallest", "magnitude", "both"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """`k` eigenvalues at one end, at both, or of largest magnitude.

    Order of the answer: ``largest`` descending, ``smallest`` ascending, ``magnitude`` by descending magnitude, ``both``
    the k largest descending followed by the k smallest ascending.
    """

    which: Which
    k: int

    def __post_init__(self) -> None:
        if self.which not in get_args(Which):
            raise InvalidArgumentError(f"which={self.which!r}; choose one of {', '.join(get_args(Which))}.")
        if self.k < 1:
            raise InvalidArgumentError(f"k={self.k}: ask for at least one eigenvalue.")

    @property
    def magnitude(self) -> bool:
        """Whether the ends compete."""
        return self.which == "magnitude"

    @property
    def simple(self) -> bool:
        """Whether at most one eigenvalue per end is wanted, so that one run can certify it."""
        return self.k == 1

    @property
    def count(self) -> int:
        """Number of values in the answer."""
        return 2 * self.k if self.which == "both" else self.k

    @property
    def looks_at(self) -> tuple[bool, bool]:
        """(upper end, lower end)."""
        return self.which != "smallest", self.which != "largest"

    @property
    def ends(self) -> int:
        """How many ends must be certified."""
        return sum(self.looks_at)

    def choose(self, values: Array) -> NDArray[np.int_]:
        """Indices of the wanted values, in the order of the answer; fewer than `count` if there are too few."""
        ascending = np.argsort(values, kind="stable")
        if self.which == "largest":
            return ascending[::-1][: self.k]
        if self.which == "smallest":
            return ascending[: self.k]
        if self.which == "magnitude":
            return np.argsort(-np.abs(values), kind="stable")[: self.k]
        # A single value stands for both ends where one per end is wanted; listed twice it would be locked twice.
        if len(values) >= 2 * self.k or (len(values) == 1 and self.k == 1):
            return np.concatenate([ascending[::-1][: self.k], ascending[: self.k]])
        half = (len(values) + 1) // 2
        return np.concatenate([ascending[::-1][:half], ascending[: len(values) - half]])

    def is_upper(self, chosen: Array) -> NDArray[np.bool_]:
        """For values in the order of the answer: whether each is bounded by what lies above it."""
        if self.which == "both":
            return np.arange(len(chosen)) < (len(chosen) + 1) // 2
        if self.which == "magnitude":
            return chosen >= 0
        return np.full(len(chosen), self.which == "largest")

    def bounds(self, chosen: Array, slack: Array) -> tuple[float | None, float | None]:
        """(lower, upper): where nothing else may lie if every value is to be right within its `slack`.

        Args:
            chosen: The values, in any order.
            slack: Tolerance of each.
        """
        if self.which == "magnitude":
            edge = float((np.abs(chosen) + slack).min())
            return -edge, edge
        if self.which == "largest":
            return None, float((chosen + slack).min())
        if self.which == "smallest":
            return float((chosen - slack).max()), None
        order = np.argsort(chosen, kind="stable")
        half = (len(chosen) + 1) // 2
        top, bottom = order[-half:], order[: max(half, 1)] if len(chosen) == 1 else order[: len(chosen) - half]
        return float((chosen - slack)[bottom].max()), float((chosen + slack)[top].min())
