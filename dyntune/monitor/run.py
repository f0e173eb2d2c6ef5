"""What was measured over a training: :class:`Run`. :mod:`dyntune.monitor.load` reads it from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dyntune.errors import InvalidArgumentError
from dyntune.monitor.rows import Array, Row, Rows
from dyntune.records import short_number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Array", "BadLine", "Column", "Event", "Row", "Run"]

ENDS = (".low", ".high")
COMPANIONS = (*ENDS, ".limit")


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
class Event:
    """Something that happened.

    Args:
        name: What.
        step: When; None for no step in particular.
        detail: More about it.
        attempt: How often the run had been resumed by then: 0 is the first attempt.
    """

    name: str
    step: int | None
    detail: Mapping[str, Any]
    attempt: int = 0


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
        rows: In the order in which they were written; those that count. A tuple of :class:`Row` is taken, too. Numbers
            are held in double precision, so integers beyond 2^53 are rounded.
        events: In the order in which they were written, of all attempts; resuming is one, ``"resumed"``, and so is
            ``"lost"``, with a count of the records that could not be written.
        columns: What the columns hold, by name.
        provenance: Versions, seed and options.
        assumed: What the rows assume, as most recently stated: loss, counts, mode.
        quarantined: Lines of the file that are no records; nothing else is lost by them.
        gaps: Places where sequence numbers jump, bad lines apart: records that are missing.
        torn: Records that were cut short, as the last one of a writer that is killed. They are dropped.
        unknown: Records of a kind that this version does not know.
        lost: Records that a writer says it could not write: a full disk, a file that was deleted.
        superseded: Rows of an attempt that a later one took back: after a training that died at step 730 has gone on
            from the checkpoint of step 500, those from 501 on. The later attempt is in ``rows``.
        attempts: 1, and one more for every time that the run was resumed.
        id: What tells this run from others; None where nothing says it.
        rank: The process that wrote it.
        world: Of how many.
        ranks: The runs of all processes by rank, this one's included, where several files were read.
        missing: Ranks of which there is no file, where several were read.
        unreadable: Reasons by file name, where several were read and some are no runs.
        path: The file; None for a run that was kept in memory.
    """

    rows: Sequence[Row]
    events: tuple[Event, ...] = ()
    columns: Mapping[str, Column] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    quarantined: tuple[BadLine, ...] = ()
    gaps: int = 0
    torn: int = 0
    unknown: int = 0
    lost: int = 0
    superseded: Sequence[Row] = ()
    attempts: int = 1
    id: str | None = None
    rank: int = 0
    world: int = 1
    ranks: Mapping[int, Run] = field(default_factory=dict)
    missing: tuple[int, ...] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)
    path: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", Rows.of(self.rows))
        object.__setattr__(self, "superseded", Rows.of(self.superseded))

    @property
    def _rows(self) -> Rows:
        assert isinstance(self.rows, Rows)  # since __post_init__
        return self.rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def steps(self) -> NDArray[np.int64]:
        """Step of every row, shape (rows,)."""
        return self._rows.steps.copy()

    @property
    def names(self) -> tuple[str, ...]:
        """Columns in the order in which they first appear, without ends of intervals and limits of others."""
        found = set(self._rows.names)
        return tuple(n for n in self._rows.names if not (n.endswith(COMPANIONS) and n.rpartition(".")[0] in found))

    def __contains__(self, name: str) -> bool:
        return name in self._rows.names

    def __getitem__(self, name: str) -> Array:
        """Values over all rows, shape (rows,): NaN where the column was not measured.

        Raises:
            InvalidArgumentError: No row has the column.
        """
        if name not in self:
            raise InvalidArgumentError(f"the run has no column {name!r}; it has {', '.join(self.names) or 'none'}.")
        return self._rows.column(name)

    def series(self, name: str) -> tuple[NDArray[np.int64], Array]:
        """Steps and values of the rows in which the column was measured; each of shape (m,).

        A value that is NaN or infinite is itself, one that was refused is NaN.
        """
        values, measured = self[name], self._rows.has(name)
        return self._rows.steps[measured], values[measured]

    def interval(self, name: str) -> tuple[Array, Array]:
        """Ends of the column's intervals where :meth:`series` has values; NaN where there are none."""
        measured = self._rows.has(name)
        low, high = (self._rows.column(name + end)[measured] for end in ENDS)
        return low, high

    def limit(self, name: str) -> Array:
        """Stability limit of the column where :meth:`series` has values; NaN where none is known."""
        return self._rows.column(f"{name}.limit")[self._rows.has(name)]

    def to_pandas(self) -> pd.DataFrame:
        """One line per row, indexed by step, with a column of text for every label (needs pandas).

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas as pd

        columns = {name: self._rows.column(name) for name in self._rows.names}
        texts = {name: self._rows.label(name) for name in self._rows.label_names}
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
        return "\n".join(lines + self._damage() + self._team())

    def _damage(self) -> list[str]:
        counted = {
            "rows superseded by a later attempt": len(self.superseded),
            "bad lines set aside": len(self.quarantined),
            "gaps": self.gaps,
            "records of an unknown kind": self.unknown,
            "torn record dropped" if self.torn == 1 else "torn records dropped": self.torn,
            "records lost": self.lost,
        }
        damage = ", ".join(f"{count} {what}" for what, count in counted.items() if count)
        return [f"file: {damage}"] if damage else []

    @property
    def short(self) -> Mapping[int, int | None]:
        """Last step by rank, of the ranks whose record ends before that of the others; None without any row."""
        last = {rank: int(run.steps.max()) if len(run) else None for rank, run in self.ranks.items()}
        most = max((step for step in last.values() if step is not None), default=None)
        return {rank: step for rank, step in last.items() if step != most}

    def _team(self) -> list[str]:
        if not self.ranks:
            return [f"rank {self.rank} of {self.world}"] if self.world > 1 else []
        said = [f"ranks: {len(self.ranks)} of {self.world} read, shown is rank {self.rank}"]
        if self.missing:
            said.append(f"missing ranks: {', '.join(map(str, self.missing))}")
        said += [f"rank {rank} ends early, at step {step}" for rank, step in self.short.items()]
        said += [f"unreadable: {_printable(name)}: {_printable(reason)}" for name, reason in self.unreadable.items()]
        said += [
            f"rank {rank} {line}" for rank, run in self.ranks.items() if rank != self.rank for line in run._damage()
        ]
        return said


def _printable(text: str) -> str:
    """Names come from files that may be anybody's, and a terminal obeys control characters."""
    return text if text.isprintable() else ascii(text)
