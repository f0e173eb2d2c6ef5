"""Writing a run, one record at a time, so that whatever happens the file can be read: :class:`RunWriter`."""

from __future__ import annotations

import math
import operator
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dyntune.errors import InvalidArgumentError, RunFileError
from dyntune.monitor.append import AppendFile, OnError
from dyntune.monitor.lines import MOST, MOST_ROWS, SCHEMA, encode
from dyntune.monitor.load import check_is_run
from dyntune.monitor.provenance import provenance
from dyntune.monitor.ranks import file_of_rank, open_run_file
from dyntune.monitor.reader import Reader, read_lines
from dyntune.monitor.rows import Rows
from dyntune.monitor.run import Run
from dyntune.records import Estimate, Status

__all__ = ["RunWriter", "provenance"]

STATE = 1  # version of what state_dict() returns


class RunWriter:
    """Appends records to a file, one system call each, and keeps their numbers in memory as a :class:`Run`.

    The file is opened for appending only, so a record is never torn by another and nothing written is changed. Each
    process writes a file of its own.

    **What may be lost.** A record that the system has taken survives the death of the process, by ``kill -9``, too:
    then at most the record being written is lost, and with ``flush_seconds`` those of as many seconds before the last
    one. It does not survive a power cut or a crash of the system until the system has brought it to the disk, on Linux
    by default within about half a minute (``vm.dirty_expire_centisecs``); ``sync_seconds`` sets a bound, at some
    milliseconds for each time. Without it the file is synchronised when it is closed, and at no other time.

    Args:
        path: The file; None to keep the run in memory only. Of several processes each writes its own,
            ``run.rank3.jsonl`` for ``run.jsonl``.
        provenance: What the header says.
        resume: Go on with a file that exists. Otherwise, it must not.
        on_error: What to do when the file cannot be written: ``"raise"``, or ``"warn"`` once, go on, keep what fits
            into 64 KiB, count the rest and try again every ten seconds.
        flush_seconds: How long a record may wait for others that are written with it. 0: each is written at once.
        sync_seconds: How often the file is brought to the disk. None: only when it is closed.
        run_id: What tells this run from others. Default: drawn, not from a random state of the training. Of several
            processes, all must be given the same.
        rank: This process.
        world: The number of processes.

    Raises:
        RunFileError: The file exists and ``resume`` is false, it is another run's or no run at all, or, with
            ``on_error="raise"``, it cannot be opened.
        InvalidArgumentError: A rank that is none of 0 .. world - 1, a time below 0, or an unknown ``on_error``.

    Cost:
        16 to 22 microseconds of CPU time for a record of ten numbers, on a busy machine, some 27 where one is NaN,
        and 12 bytes of memory for each number with spare room for more; ``benchmarks/run_log.py`` measures both.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with RunWriter(f"{folder.name}/run.jsonl", provenance()) as writer:
        ...     for step in range(8):
        ...         writer.row(step, {"loss": 1.0 / (1 + step)})
        ...         if step == 4:
        ...             saved = writer.state_dict()
        >>> with RunWriter(f"{folder.name}/run.jsonl", provenance(), resume=True) as writer:
        ...     writer.load_state_dict(saved)
        ...     writer.row(5, {"loss": 0.25})
        >>> writer.run.steps.tolist(), len(writer.run.superseded)
        ([0, 1, 2, 3, 4, 5], 3)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        provenance: Mapping[str, Any],
        *,
        resume: bool = False,
        on_error: OnError = "raise",
        flush_seconds: float = 0.0,
        sync_seconds: float | None = None,
        run_id: str | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        _check(on_error, flush_seconds, sync_seconds)
        file = file_of_rank("run.jsonl" if path is None else path, rank, world)
        self._path = None if path is None else str(file)
        self._provenance = dict(provenance)
        self._columns: dict[str, dict[str, Any]] = {}
        self._assumed: dict[str, Any] | None = None
        self._reader = Reader()
        self._again: dict[str, Any] | None = None  # the record of having resumed, until it is written
        self._sync = math.inf if sync_seconds is None else sync_seconds
        self._synced = time.monotonic()
        self._fresh = True  # whether no row has been written, in this attempt or before
        self._between = False  # whether what was left behind must be closed off by a newline
        self._file: AppendFile | None = None
        self._lost = 0  # once the file is closed
        there = self._path is not None and _holds_something(file, resume)
        if there:
            self._take_up(file, run_id, rank, world)
        if self._path is not None:
            self._file = AppendFile(
                self._path,
                new=not (there or (resume and file.exists())),
                on_error=on_error,
                flush_seconds=flush_seconds,
                again=self._preamble,
                note=_lost,
            )
        if self._reader.id is None:
            about: dict[str, Any] = {"run": run_id or uuid.uuid4().hex, "rank": rank, "world": world}
            if self._between:
                about["torn"] = True
            self._write("header", schema=SCHEMA, **about, provenance=self._provenance)

    @property
    def run(self) -> Run:
        """Everything recorded so far, also what the file could not take. Copies the numbers."""
        return self._reader.run(path=self._path)

    @property
    def id(self) -> str:
        """What tells this run from others."""
        return str(self._reader.id)

    @property
    def lost(self) -> int:
        """Records that were recorded here and could not be written to the file."""
        return self._lost if self._file is None else self._file.lost

    @property
    def trouble(self) -> str | None:
        """Why the file cannot be written at present; None if it can."""
        return None if self._file is None else self._file.trouble

    def assume(self, **about: Any) -> None:
        """Say what was assumed; written when it is new or differs from before."""
        if self._assumed != about:
            self._write("assumed", detail=about)
            self._assumed = about

    def declare(self, name: str, **about: Any) -> None:
        """Say what a column holds; written when it is new or differs from before."""
        if self._columns.get(name) != about:
            self._write("column", name=name, **about)
            self._columns[name] = about

    def row(
        self,
        step: int,
        values: Mapping[str, float | Estimate | None],
        *,
        status: Mapping[str, tuple[str, str]] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Measurements at a step; estimates with their intervals and their status.

        Raises:
            TypeError: A value that is no number, or a step that is no whole one.
            InvalidArgumentError: A step below 0.
            RunFileError: With ``on_error="raise"``, that the file cannot be written.
        """
        step = operator.index(step)
        if not 0 <= step <= MOST:
            raise InvalidArgumentError(f"step={step}: steps count up from 0.")
        flat: dict[str, float | None] = {}
        found = dict(status or {})
        for name, item in values.items():
            if type(item) is float or item is None:  # nearly always
                flat[name] = item
                continue
            if not isinstance(item, Estimate):
                flat[name] = item if type(item) is int else float(item)
                continue
            self.declare(name, unit=item.unit, method=item.method, level=item.level, covers=item.covers)
            flat |= {name: item.value, f"{name}.low": item.low, f"{name}.high": item.high}
            if item.status is not Status.OK:
                found[name] = (item.status.name, item.reason)
        optional = {key: item for key, item in (("status", found), ("labels", labels)) if item}
        self._write("row", step=step, values=flat, **optional)
        self._fresh = False

    def rows(self, first: int, count: int, values: Mapping[str, Any]) -> None:
        """Measurements at consecutive steps, in one record.

        Args:
            first: The first of the steps.
            count: How many, up to 65,536.
            values: Plain numbers by column, as :meth:`dyntune.monitor.rows.Table.extend` takes them.

        Raises:
            TypeError: A value that is no number.
            InvalidArgumentError: Steps below 0, or too many of them.
            RunFileError: With ``on_error="raise"``, that the file cannot be written.
        """
        if not (0 <= first <= MOST - count and 0 < count <= MOST_ROWS):
            raise InvalidArgumentError(
                f"{count} rows from step {first} on: steps count up from 0, and one record holds 1 to {MOST_ROWS}."
            )
        self._write("rows", step=first, count=count, values=values)
        self._fresh = False

    def rows_since(self, start: int, names: Iterable[str]) -> Rows:
        """What was recorded of these columns after the first `start` rows."""
        return self._reader.table.rows(start, names)

    @property
    def num_rows(self) -> int:
        """Rows recorded so far, those of earlier attempts included."""
        return len(self._reader.table)

    def event(self, name: str, *, step: int | None = None, **detail: Any) -> None:
        """Something that happened."""
        self._write("event", name=name, step=step, detail=detail)

    def state_dict(self, *, step: int | None = None) -> dict[str, Any]:
        """What a checkpoint needs to hold for the run to go on from it; plain values that JSON takes.

        Args:
            step: The step that the checkpoint is of; default that of the last row.

        Returns:
            ``run`` (its identifier), ``step``, ``seq`` (records so far), ``rank``, ``path`` (the file's name, without
            the folder: a checkpoint may be moved) and ``version``.
        """
        if self._file is not None:
            self._file.flush()
        steps = self._reader.table.steps
        return {
            "version": STATE,
            "run": self.id,
            "rank": self._reader.rank,
            "seq": self._reader.seq + 1,
            "step": (steps[-1] if steps else None) if step is None else operator.index(step),
            "path": None if self._path is None else Path(self._path).name,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: what was recorded after its step is superseded by what comes now.

        With a log that was just begun, for want of the old one, this is a fork, and the record says of which run.

        Args:
            state: What :meth:`state_dict` returned, on any rank.

        Raises:
            InvalidArgumentError: It is not what :meth:`state_dict` returns.
            RunFileError: It is another run's, and this one has rows already.
        """
        run, step, seq = _checked(state)
        if run != self.id and not self._fresh:
            raise RunFileError(
                f"the checkpoint is of run {run!r}, the log {self._path!r} of run {self.id!r}: their steps would mix. "
                "Give the log that belongs to the checkpoint, or a new name to begin another."
            )
        again = {"step": step, "torn": False, **(self._again or {}), "provenance": self._provenance}
        self._again = again | {"step": step} | ({"of": run} if run != self.id else {})
        if run == self.id and state.get("rank", 0) == self._reader.rank:
            self._reader.seq = max(self._reader.seq, seq - 1)  # what a power cut took away leaves a gap

    def _take_up(self, file: Path, run_id: str | None, rank: int, world: int) -> None:
        """Read what is there and see whether it is ours."""
        reader = read_lines(open_run_file(file))
        if not reader.records and _begins_a_header(file):
            self._between = True  # its writer died within the first record
            return
        check_is_run(reader, file)
        if reader.id is None or (run_id is not None and run_id != reader.id):
            raise RunFileError(f"log {str(file)!r} is of run {reader.id!r}, not {run_id!r}. Choose another name.")
        if (reader.rank, reader.world) != (rank, world):
            raise RunFileError(
                f"log {str(file)!r} is of rank {reader.rank} of {reader.world}, this is rank {rank} of {world}: with "
                "another number of processes, choose another name."
            )
        if reader.seq > MOST // 2:
            raise RunFileError(
                f"log {str(file)!r} ends with sequence number {reader.seq}, which is damage. Choose another."
            )
        self._reader, self._between = reader, reader.open
        self._fresh = not len(reader.table)
        torn = reader.open and reader.torn > 0
        self._again = {"step": None, "torn": torn, "provenance": self._provenance}

    def _write(self, kind: str, **fields: Any) -> None:
        if self._again is not None:
            again, self._again = self._again, None
            self._write("resumed", **again)
        record = {"kind": kind, "seq": self._reader.seq + 1, **fields}
        line = encode(record)
        if self._between:
            line, self._between = b"\n" + line, False
        self._reader.add(record)
        if self._file is None:
            return
        self._file.append(line, record["seq"])
        if time.monotonic() - self._synced > self._sync:
            self._file.sync()
            self._synced = time.monotonic()

    def _preamble(self, following: int) -> list[bytes]:
        """How a file begins that takes the place of one that was deleted, before the record of that number."""
        reader = self._reader
        about = {"schema": SCHEMA, "run": self.id, "rank": reader.rank, "world": reader.world}
        records: list[dict[str, Any]] = [{"kind": "header", **about, "provenance": self._provenance}]
        records += [{"kind": "column", "name": name, **about} for name, about in self._columns.items()]
        if self._assumed is not None:
            records.append({"kind": "assumed", "detail": self._assumed})
        if (gone := following - len(records)) > 0:
            records.append({"kind": "lost", "count": gone, "reason": "the file was deleted"})
        first = max(following - len(records), 0)
        return [encode({"seq": first + i, **record}) for i, record in enumerate(records)]

    def close(self) -> None:
        """Make sure that everything is on disk; what is recorded afterwards is kept in memory only."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            finally:
                self._lost = file.lost

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check(on_error: str, flush_seconds: float, sync_seconds: float | None) -> None:
    if on_error not in ("raise", "warn"):
        raise InvalidArgumentError(f'on_error={on_error!r}: choose "raise" or "warn".')
    if not flush_seconds >= 0 or (sync_seconds is not None and not sync_seconds >= 0):
        raise InvalidArgumentError(
            f"flush_seconds={flush_seconds}, sync_seconds={sync_seconds}: times are 0 or more, in seconds."
        )


def _holds_something(file: Path, resume: bool) -> bool:
    try:
        if not file.exists():
            return False
        if resume:
            return not file.is_file() or file.stat().st_size > 0
    except OSError:  # a folder that may not be looked into: opening says so
        return False
    raise RunFileError(
        f"log {str(file)!r} exists: records of two runs would mix. Choose another name, read it with "
        "dyntune.load_run(path), or go on with it as a resumed one."
    )


def _begins_a_header(file: Path) -> bool:
    """Whether this is what is left of a writer that died within its first record."""
    beginning = b'{"kind":"header","seq":0,'
    with file.open("rb") as opened:
        found = opened.read(len(beginning))
    return found == beginning or beginning.startswith(found)


def _lost(count: int, number: int, why: str) -> bytes:
    return encode({"kind": "lost", "seq": number, "count": count, "reason": why})


def _checked(state: Mapping[str, Any]) -> tuple[str, int | None, int]:
    run, step, seq = (state.get(key) for key in ("run", "step", "seq")) if isinstance(state, Mapping) else (None,) * 3
    sound = isinstance(run, str) and isinstance(seq, int) and 0 <= seq <= MOST // 2
    if (
        not sound
        or not (step is None or (isinstance(step, int) and 0 <= step <= MOST))
        or state.get("version") != STATE
    ):
        raise InvalidArgumentError(
            f"state with run {run!r}, step {step!r} and sequence number {seq!r}: this is not what state_dict() of "
            f"version {STATE} returns, so the log cannot be continued from it. Give that, or none to begin anew."
        )
    assert isinstance(run, str)
    assert isinstance(seq, int)
    return run, step, seq
