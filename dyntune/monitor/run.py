"""What was measured over a training: :class:`Run`, and :func:`load_run` that reads it from a file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError, RunFileError
from dyntune.monitor.lines import SCHEMA, decode
from dyntune.records import short_number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["BadLine", "Column", "Event", "Row", "Run", "load_run", "run_from_lines"]

Array = NDArray[np.float64]
ENDS = (".low", ".high")
COMPANIONS = (*ENDS, ".limit")
SHOWN = 80  # characters of a bad line that are kept


@dataclass(frozen=True, kw_only=True)
class Column:
    """What a column holds.

    Args:
        name: Its name.
        unit: Unit of the values.
        method: How they were made, most recently.
        level: Probability with which their intervals cover; None without intervals.
        covers: What the intervals speak of; see :class:`dyntune.Estimate`.
    """

    name: str
    unit: str = ""
    method: str = ""
    level: float | None = None
    covers: str = ""


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


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, at a step or at none in particular."""

    name: str
    step: int | None
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class BadLine:
    """A line that is no record: its number from 1, why, and how it begins."""

    number: int
    reason: str
    start: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A recorded run: columns over steps, events, and where it all comes from.

    ``run["loss"]`` is a column with one entry per row, :meth:`series` the steps and values where it was measured.

    Args:
        rows: In the order in which they were written.
        events: In the order in which they were written.
        columns: What the columns hold, by name.
        provenance: Versions, seed and options.
        assumed: What the rows assume, as most recently stated: loss, counts, mode.
        quarantined: Lines of the file that are no records; nothing else is lost by them.
        gaps: Places where sequence numbers jump, bad lines apart: records that are missing.
        torn: Whether the file ended in the middle of a record, as it does when the writer is killed. That is dropped.
        unknown: Records of a kind that this version does not know.
        path: The file; None for a run that was kept in memory.
    """

    rows: tuple[Row, ...]
    events: tuple[Event, ...] = ()
    columns: Mapping[str, Column] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    quarantined: tuple[BadLine, ...] = ()
    gaps: int = 0
    torn: bool = False
    unknown: int = 0
    path: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def steps(self) -> NDArray[np.int64]:
        """Step of every row, shape (rows,)."""
        return np.array([row.step for row in self.rows], dtype=np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """Columns in the order in which they first appear, without ends of intervals and limits of others."""
        found = dict.fromkeys(name for row in self.rows for name in row.values)
        return tuple(n for n in found if not (n.endswith(COMPANIONS) and n.rpartition(".")[0] in found))

    def __contains__(self, name: str) -> bool:
        return any(name in row.values for row in self.rows)

    def __getitem__(self, name: str) -> Array:
        """Values over all rows, shape (rows,): NaN where the column was not measured.

        Raises:
            InvalidArgumentError: No row has the column.
        """
        if name not in self:
            raise InvalidArgumentError(f"the run has no column {name!r}; it has {', '.join(self.names) or 'none'}.")
        return np.array([_number(row.values.get(name)) for row in self.rows])

    def series(self, name: str) -> tuple[NDArray[np.int64], Array]:
        """Steps and values of the rows in which the column was measured; each of shape (m,).

        A value that is NaN or infinite is itself, one that was refused is NaN.
        """
        values = self[name]
        measured = np.array([name in row.values for row in self.rows], dtype=bool)
        return self.steps[measured], values[measured]

    def interval(self, name: str) -> tuple[Array, Array]:
        """Ends of the column's intervals where :meth:`series` has values; NaN where there are none."""
        rows = [row for row in self.rows if name in row.values]
        low, high = ([_number(row.values.get(name + end)) for row in rows] for end in ENDS)
        return np.array(low), np.array(high)

    def limit(self, name: str) -> Array:
        """Stability limit of the column where :meth:`series` has values; NaN where none is known."""
        return np.array([_number(row.values.get(f"{name}.limit")) for row in self.rows if name in row.values])

    def to_pandas(self) -> pd.DataFrame:
        """One line per row, indexed by step, with a column of text for every label (needs pandas).

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas as pd

        columns = {name: self[name] for name in dict.fromkeys(n for row in self.rows for n in row.values)}
        labels = dict.fromkeys(name for row in self.rows for name in row.labels)
        texts = {name: [row.labels.get(name) for row in self.rows] for name in labels}
        return pd.DataFrame(columns | texts, index=pd.Index(self.steps, name="step"))

    def plot(self, name: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw a column over the steps with its intervals (needs matplotlib, imported here only).

        Args:
            name: Which; default the first one besides the loss.
            ax: Where to draw; default a figure of its own.
        """
        from dyntune.plots import plot_run

        return plot_run(self, name, ax=ax)

    def __str__(self) -> str:
        steps = self.steps
        span = f", steps {steps.min()} .. {steps.max()}" if steps.size else ""
        lines = [f"{len(self)} row{'' if len(self) == 1 else 's'}{span}"]
        for name in self.names:
            at, values = self.series(name)
            unit = self.columns[name].unit if name in self.columns else ""
            last = f"last {short_number(float(values[-1]))} {unit}".rstrip()
            lines.append(f"{_printable(name)}: {at.size} values, {_printable(last)}")
        lines += [f"event at step {event.step}: {_printable(event.name)}" for event in self.events]
        return "\n".join(lines + self._damage())

    def _damage(self) -> list[str]:
        counted = {
            "bad lines set aside": len(self.quarantined),
            "gaps": self.gaps,
            "records of an unknown kind": self.unknown,
            "torn tail dropped": int(self.torn),
        }
        damage = ", ".join(f"{count} {what}" for what, count in counted.items() if count)
        return [f"file: {damage}"] if damage else []


def _printable(text: str) -> str:
    """Names come from files that may be anybody's, and a terminal obeys control characters."""
    return text if text.isprintable() else ascii(text)


def _number(value: float | None) -> float:
    if value is None:
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floating point
        return math.inf if value > 0 else -math.inf


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a recorded run, also of a writer that was killed or is still at it.

    A torn last line is dropped, a bad one in between set aside and counted; every other record is kept.

    Args:
        path: The JSONL file.

    Returns:
        The run; ``torn``, ``quarantined`` and ``gaps`` say what is missing.

    Raises:
        RunFileError: No such file, no record in it, or one written by a newer version of the format.

    Cost:
        Reads the whole file into memory.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RunFileError(f"run {str(path)!r} cannot be read: {error.strerror or error}. Check the path.") from error
    lines = data.split(b"\n")
    run = run_from_lines(lines[:-1], tail=lines[-1], path=str(path))
    if not (run.rows or run.events or run.columns or run.provenance or run.assumed):
        raise RunFileError(
            f"{str(path)!r} is not a recorded run: none of its {len(lines)} lines is a record (the first: "
            f"{run.quarantined[0].reason if run.quarantined else 'empty'})."
        )
    return run


def run_from_lines(lines: Iterable[bytes], *, tail: bytes = b"", path: str | None = None) -> Run:
    """The run in complete lines (without their newlines), and perhaps the beginning of one more.

    Args:
        lines: Lines that were written whole.
        tail: What follows the last newline. The beginning of an object is never an object, so one that is, is kept.
        path: Where they come from.

    Raises:
        RunFileError: A newer version of the format.
    """
    reader = _Reader()
    for line in lines:
        reader.take(line)
    torn = bool(tail) and not reader.take(tail, last=True)
    return reader.run(torn=torn, path=path)


class _Reader:
    """Sorts records by kind and counts what is wrong."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.events: list[Event] = []
        self.columns: dict[str, Column] = {}
        self.provenance: dict[str, Any] = {}
        self.assumed: dict[str, Any] = {}
        self.bad: list[BadLine] = []
        self.gaps = self.unknown = 0
        self._lines = self._bad_since = 0
        self._seq = -1

    def take(self, line: bytes, *, last: bool = False) -> bool:
        """Read one line; False if it is no record."""
        self._lines += 1
        try:
            record = decode(line)
        except ValueError as error:
            if not last:
                self._bad_since += 1
                start = line[:SHOWN].decode("utf-8", errors="replace")
                self.bad.append(BadLine(self._lines, (str(error) or "not JSON").splitlines()[0], start))
            return False
        jump = record["seq"] - self._seq - 1
        self.gaps += not 0 <= jump <= self._bad_since
        self._seq, self._bad_since = record["seq"], 0
        self._sort(record)
        return True

    def _sort(self, record: dict[str, Any]) -> None:
        match record["kind"]:
            case "header":
                if record["schema"] > SCHEMA:
                    raise RunFileError(
                        f"the run was written in version {record['schema']} of the format; this dyntune reads up to "
                        f"{SCHEMA}. Install a newer one."
                    )
                self.provenance = {"schema": record["schema"], **record.get("provenance", {})}
            case "column":
                known = ("name", "unit", "method", "level", "covers")
                self.columns[record["name"]] = Column(**{key: record[key] for key in known if key in record})
            case "assumed":
                self.assumed = record.get("detail", {})
            case "row":
                status = {name: (kind, reason) for name, (kind, reason) in record.get("status", {}).items()}
                values, labels = record.get("values", {}), record.get("labels", {})
                self.rows.append(Row(step=record["step"], values=values, status=status, labels=labels))
            case "event":
                self.events.append(Event(name=record["name"], step=record.get("step"), detail=record.get("detail", {})))
            case _:
                self.unknown += 1

    def run(self, *, torn: bool, path: str | None) -> Run:
        return Run(
            rows=tuple(self.rows),
            events=tuple(self.events),
            columns=self.columns,
            provenance=self.provenance,
            assumed=self.assumed,
            quarantined=tuple(self.bad),
            gaps=self.gaps,
            torn=torn,
            unknown=self.unknown,
            path=path,
        )
