"""From lines to a run: sorts records by kind, counts what is wrong, and lets the last attempt at a step win."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dyntune.errors import RunFileError
from dyntune.monitor.lines import SCHEMA, decode
from dyntune.monitor.rows import Table
from dyntune.monitor.run import BadLine, Column, Event, Run

__all__ = ["Reader", "read_lines", "run_from_lines"]

SHOWN = 80  # characters of a bad line that are kept


def run_from_lines(lines: Iterable[bytes], *, path: str | None = None) -> Run:
    r"""The run in lines, of which the last one may be the beginning of a record.

    Args:
        lines: With their newlines, as iterating over a file gives them. The beginning of an object is never an object,
            so a last line that is a record is kept, newline or not.
        path: Where they come from.

    Raises:
        RunFileError: A newer version of the format, or records of two runs.

    Example:
        >>> run = run_from_lines([b'{"kind":"row","seq":0,"step":3,"values":{"loss":1.5}}\n', b'{"kind":"ro'])
        >>> run["loss"].tolist(), run.torn
        ([1.5], 1)
    """
    return read_lines(lines).run(path=path)


def read_lines(lines: Iterable[bytes]) -> Reader:
    """A reader that has taken the lines."""
    reader = Reader()
    for line in lines:
        reader.take(line)
    return reader


class Reader:
    """What a sequence of records amounts to. A writer gives its records to one, too, so that both see the same."""

    def __init__(self) -> None:
        self.table = Table()
        self.events: list[Event] = []
        self.columns: dict[str, Column] = {}
        self.provenance: dict[str, Any] = {}
        self.assumed: dict[str, Any] = {}
        self.bad: list[BadLine] = []
        self.torn = self.unknown = self.lost = self.records = 0
        self.id: str | None = None
        self.rank, self.world = 0, 1
        self.seq = -1  # of the last record
        self.open = False  # whether the last line has no newline yet
        self._attempts: list[tuple[int, int | None]] = []  # first row of it, last step that counts
        self._jumps: list[int] = []  # missing records, place by place; negative where the count goes back
        self._lines = self._bad_since = 0

    def take(self, line: bytes) -> None:
        """Read one line, its newline included."""
        self._lines += 1
        self.open = not line.endswith(b"\n")
        line = line.removesuffix(b"\n")
        try:
            record = decode(line)
        except ValueError as error:
            if self.open:
                self.torn += 1
                return
            self._bad_since += 1
            start = line[:SHOWN].decode("utf-8", errors="replace")
            self.bad.append(BadLine(self._lines, (str(error) or "not JSON").splitlines()[0], start))
            return
        jump = record["seq"] - self.seq - 1
        if not 0 <= jump <= self._bad_since:
            self._jumps.append(jump)
        self.add(record)
        self._bad_since = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a record that is known to be one."""
        self.records += 1
        self.seq = record["seq"]
        match record["kind"]:
            case "header":
                self._head(record)
            case "column":
                known = ("name", "unit", "method", "level", "covers")
                self.columns[record["name"]] = Column(**{key: record[key] for key in known if key in record})
            case "assumed":
                self.assumed = record.get("detail", {})
            case "row":
                status = {name: (kind, reason) for name, (kind, reason) in record.get("status", {}).items()}
                self.table.append(record["step"], record.get("values", {}), status, record.get("labels", {}))
            case "rows":
                self.table.extend(record["step"], record["count"], record.get("values", {}))
            case "event":
                self._happened(record["name"], record.get("step"), record.get("detail", {}))
            case "resumed":
                self._resume(record)
            case "lost":
                self._lose(record)
            case _:
                self.unknown += 1

    def _head(self, record: Mapping[str, Any]) -> None:
        if record["schema"] > SCHEMA:
            raise RunFileError(
                f"the run was written in version {record['schema']} of the format; this dyntune reads up to "
                f"{SCHEMA}. Install a newer one."
            )
        found = record.get("run")
        if self.id is not None and found is not None and found != self.id:
            raise RunFileError(
                f"line {self._lines} begins another run, {found!r}, than the one before it, {self.id!r}: their steps "
                "would mix. Split the file there."
            )
        self._close_piece(record)
        self.id = found
        self.rank, self.world = record.get("rank", 0), record.get("world", 1)
        self.provenance = {"schema": record["schema"], **record.get("provenance", {})}

    def _close_piece(self, record: Mapping[str, Any]) -> None:
        if record.get("torn", False) and self._bad_since:
            self.bad.pop()  # the line before is what a writer that died left behind
            self._bad_since -= 1
            self.torn += 1

    def _happened(self, name: str, step: int | None, detail: Mapping[str, Any]) -> None:
        self.events.append(Event(name=name, step=step, detail=detail, attempt=len(self._attempts)))

    def _resume(self, record: Mapping[str, Any]) -> None:
        self._close_piece(record)
        step = record.get("step")
        self._attempts.append((len(self.table), step))
        self._happened("resumed", step, {key: record[key] for key in ("of", "provenance") if key in record})

    def _lose(self, record: Mapping[str, Any]) -> None:
        count = record["count"]
        self.lost += count
        if self._jumps and 0 < self._jumps[-1] <= count:  # the gap that it explains
            self._jumps.pop()
        self._happened("lost", None, {key: record[key] for key in ("count", "reason") if key in record})

    def run(self, *, path: str | None = None) -> Run:
        """The run so far."""
        rows = self.table.rows()
        keep = np.ones(len(rows), dtype=bool)
        for first, step in self._attempts:
            if first < len(rows):  # an attempt that has measured nothing has nothing to win with
                cut = int(rows.steps[first])
                cut = cut if step is None else min(cut, step + 1)
                keep[:first] &= rows.steps[:first] < cut
        return Run(
            rows=rows.where(keep) if not keep.all() else rows,
            superseded=rows.where(~keep),
            events=tuple(self.events),
            columns=dict(self.columns),
            provenance=self.provenance,
            assumed=self.assumed,
            quarantined=tuple(self.bad),
            gaps=len(self._jumps),
            torn=self.torn,
            unknown=self.unknown,
            lost=self.lost,
            attempts=1 + len(self._attempts),
            id=self.id,
            rank=self.rank,
            world=self.world,
            path=path,
        )
