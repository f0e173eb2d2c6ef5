"""Rows of a run in columns of plain numbers: :class:`Table` grows, :class:`Rows` is what it held at one moment."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Row", "Rows", "Table", "as_number"]

Array = NDArray[np.float64]
Texts = TypeVar("Texts", bound=Mapping[str, Any])

BLOCK = 1024  # rows that are put together at a time while iterating: a megabyte of objects at ten columns


@dataclass(frozen=True, kw_only=True)
class Row:
    """Measurements at one step.

    Args:
        step: The step.
        values: By column; NaN or infinite where the measured number is, None where none was established.
        status: ``(status, reason)`` by column, where it is not OK.
        labels: Text by name, such as the file that was measured.
    """

    step: int
    values: Mapping[str, float | None]
    status: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


def as_number(value: float | None) -> float:
    """A value as floating point: NaN where there is none, infinite beyond the range."""
    if value is None:
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floating point
        return math.inf if value > 0 else -math.inf


class _Column:
    """A growing column that holds only the rows that have it: 12 bytes a number."""

    __slots__ = ("add_at", "add_value", "at", "none", "values")

    def __init__(self) -> None:
        self.at = array("i")
        self.values = array("d")
        self.none = array("i")
        self.add_at, self.add_value = self.at.append, self.values.append  # looked up once, not at every number


class _Texts(Generic[Texts]):
    """Texts of every row: a code of 4 bytes each, and each different mapping once."""

    def __init__(self) -> None:
        self.codes = array("i")
        self.distinct: list[Texts | dict[str, Any]] = [{}]
        self._known: dict[Any, int] = {(): 0}

    def code(self, texts: Texts) -> int:
        """What stands for these texts; the row is not added."""
        if not texts:
            return 0
        code = self._known.setdefault(tuple(texts.items()), len(self.distinct))
        if code == len(self.distinct):
            self.distinct.append(dict(texts))
        return code


class Table:
    """Rows as they come in. Memory: 12 bytes a number, 16 a row, and each different text once; no object per row.

    The arrays of the standard library grow by a sixteenth at a time, so that appending costs the same on average
    however long the table is.
    """

    def __init__(self) -> None:
        self.steps = array("q")
        self.columns: dict[str, _Column] = {}
        self.status: _Texts[Mapping[str, tuple[str, str]]] = _Texts()
        self.labels: _Texts[Mapping[str, str]] = _Texts()

    def __len__(self) -> int:
        return len(self.steps)

    def append(
        self,
        step: int,
        values: Mapping[str, float | None],
        status: Mapping[str, tuple[str, str]],
        labels: Mapping[str, str],
    ) -> None:
        """Add a row."""
        row = len(self.steps)
        codes = self.status.code(status), self.labels.code(labels)
        self.steps.append(step)
        self.status.codes.append(codes[0])
        self.labels.codes.append(codes[1])
        for name, value in values.items():
            column = self.columns.get(name)
            if column is None:
                column = self.columns[name] = _Column()
            column.add_at(row)
            if type(value) is float:
                column.add_value(value)
                continue
            column.add_value(as_number(value))
            if value is None:
                column.none.append(row)

    def extend(self, first: int, count: int, values: Mapping[str, Any]) -> None:
        """Add the rows of `count` consecutive steps.

        Args:
            first: Step of the first one.
            count: How many.
            values: By column: a number that is the same in all rows, a list of one number per row, or, where only some
                rows have it, ``{"at": [0, 2, ...], "values": [...]}``.
        """
        row = len(self.steps)
        ready = []  # all that can fail comes first: rows are added whole or not at all
        for name, item in values.items():
            column = self.columns.get(name)
            if column is None:
                column = self.columns[name] = _Column()
            at: Iterable[int] = range(row, row + count)
            numbers, refused = item, []
            if isinstance(item, dict):
                at, numbers = [row + place for place in item["at"]], item["values"]
            elif not isinstance(item, list):
                numbers = [item] * count
            try:
                found = array("d", numbers)
            except (TypeError, OverflowError):  # a None, or an integer beyond the range
                refused = [place for place, number in zip(at, numbers, strict=True) if number is None]
                found = array("d", map(as_number, numbers))
            ready.append((column, at, found, refused))
        self.steps.extend(range(first, first + count))
        self.status.codes.extend([0] * count)
        self.labels.codes.extend([0] * count)
        for column, at, found, refused in ready:
            column.at.extend(at)
            column.values.extend(found)
            column.none.extend(refused)

    def rows(self, start: int = 0, names: Iterable[str] | None = None) -> Rows:
        """All of it as it is now; later rows do not change what was returned.

        Args:
            start: Leave out so many rows.
            names: Columns; default all.
        """
        columns = {}
        for name in self.columns if names is None else names:
            c = self.columns[name]
            if c.at and c.at[-1] >= start:
                first, none = bisect_left(c.at, start), bisect_left(c.none, start)
                at, without = np.array(c.at[first:], np.int32), np.array(c.none[none:], np.int32)
                columns[name] = _Numbers(at - np.int32(start), np.array(c.values[first:]), without - np.int32(start))
        return Rows(
            steps=np.array(self.steps[start:], dtype=np.int64),
            columns=columns,
            status=(np.array(self.status.codes[start:], np.int32), self.status.distinct),
            labels=(np.array(self.labels.codes[start:], np.int32), self.labels.distinct),
        )


@dataclass(frozen=True, eq=False)
class _Numbers:
    at: NDArray[np.int32]  # (m,) ascending: the rows that have the column
    values: Array  # (m,)
    none: NDArray[np.int32]  # of those, the rows where the value is None


class Rows(Sequence[Row]):
    """Rows that do not change: a sequence of :class:`Row`, made when asked for, and columns without that detour."""

    def __init__(
        self,
        *,
        steps: NDArray[np.int64],
        columns: Mapping[str, _Numbers],
        status: tuple[NDArray[np.int32], Sequence[Any]],
        labels: tuple[NDArray[np.int32], Sequence[Any]],
    ) -> None:
        self.steps = steps  # (rows,)
        self._columns = columns
        self._status = status
        self._labels = labels

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Rows:
        """The same rows in columns."""
        if isinstance(rows, Rows):
            return rows
        table = Table()
        for row in rows:
            table.append(row.step, row.values, row.status, row.labels)
        return table.rows()

    @property
    def names(self) -> tuple[str, ...]:
        """All columns, in the order in which they first appear."""
        return tuple(self._columns)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of labels, in the order in which they first appear."""
        codes, distinct = self._labels
        if not codes.any():
            return ()
        return tuple(dict.fromkeys(name for code in dict.fromkeys(codes.tolist()) for name in distinct[code]))

    def label(self, name: str) -> list[str | None]:
        """A label over all rows."""
        codes, distinct = self._labels
        return [distinct[code].get(name) for code in codes.tolist()]

    def column(self, name: str) -> Array:
        """Values over all rows, shape (rows,): NaN where there is none."""
        column = self._columns.get(name)
        if column is None:
            return np.full(len(self), np.nan)
        if column.at.size == len(self):  # as of what is recorded at every step
            return column.values.copy()
        values = np.full(len(self), np.nan)
        values[column.at] = column.values
        return values

    def has(self, name: str) -> NDArray[np.bool_]:
        """Whether each row has the column, shape (rows,); a refused value counts."""
        column = self._columns.get(name)
        if column is not None and column.at.size == len(self):
            return np.ones(len(self), dtype=bool)
        found = np.zeros(len(self), dtype=bool)
        if column is not None:
            found[column.at] = True
        return found

    def numbers(self, name: str) -> Iterator[tuple[int, float]]:
        """Places from 0 of the rows that have the column, and what they have: NaN where a value was refused."""
        column = self._columns.get(name)
        return iter(()) if column is None else zip(column.at.tolist(), column.values.tolist(), strict=True)

    def all_finite(self, name: str) -> bool:
        """Whether no value of the column is NaN or infinite; a refused one is neither. True without any value."""
        column = self._columns.get(name)
        return column is None or bool(np.isfinite(column.values).all()) or bool(np.isfinite(self._known(column)).all())

    @staticmethod
    def _known(column: _Numbers) -> Array:
        return column.values[~np.isin(column.at, column.none)]

    def where(self, keep: NDArray[np.bool_]) -> Rows:
        """The rows where ``keep``, shape (rows,), is true; columns that none of them has are gone."""
        new = np.cumsum(keep, dtype=np.int32) - 1
        columns = {}
        for name, column in self._columns.items():
            kept, none = keep[column.at], column.none[keep[column.none]]
            if kept.any():
                columns[name] = _Numbers(new[column.at[kept]].astype(np.int32), column.values[kept], new[none])
        (status, reasons), (labels, texts) = self._status, self._labels
        return Rows(
            steps=self.steps[keep], columns=columns, status=(status[keep], reasons), labels=(labels[keep], texts)
        )

    def __len__(self) -> int:
        return int(self.steps.size)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...

    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(len(self))[index])
        at = range(len(self))[index]  # as any sequence does: from the end, or IndexError
        return self._block(at, at + 1)[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), BLOCK):
            yield from self._block(start, min(start + BLOCK, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Rows, tuple, list)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as any sequence that compares by what it holds

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows, columns {', '.join(map(repr, self.names)) or 'none'})"

    def _block(self, start: int, end: int) -> list[Row]:
        values: list[dict[str, float | None]] = [{} for _ in range(start, end)]
        for name, column in self._columns.items():
            low, high = np.searchsorted(column.at, (start, end))
            for at, value in zip(column.at[low:high].tolist(), column.values[low:high].tolist(), strict=True):
                values[at - start][name] = value
            low, high = np.searchsorted(column.none, (start, end))
            for at in column.none[low:high].tolist():
                values[at - start][name] = None
        (status, reasons), (labels, texts) = self._status, self._labels
        return [
            Row(
                step=int(self.steps[at]),
                values=values[at - start],
                status=reasons[status[at]],
                labels=texts[labels[at]],
            )
            for at in range(start, end)
        ]
