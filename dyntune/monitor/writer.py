"""Writing a run, one record at a time, so that whatever happens the file can be read: :class:`RunWriter`."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import numpy as np
import torch

from dyntune.errors import RunFileError
from dyntune.monitor.lines import SCHEMA, encode
from dyntune.monitor.run import Run, run_from_lines
from dyntune.records import Estimate, Status

__all__ = ["RunWriter", "provenance"]

# A record handed to the system survives the death of the process; only a power cut asks for more. A synchronised write
# takes about 3 ms, so that every ten seconds it costs 0.03 % of the time.
SYNC_SECONDS = 10.0


def provenance(**more: Any) -> dict[str, Any]:
    """Versions, machine type and time, and whatever else belongs into the header."""
    own = sys.modules[__name__.partition(".")[0]]  # it is loaded; to import it from here would be a way up
    return {
        "versions": {
            "dyntune": str(own.__version__),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


class RunWriter:
    """Appends records to a file, one system call each, and keeps them in memory as a :class:`Run`.

    The file is opened for appending only, so a record is never torn by another and nothing written is changed. One
    process writes one file.

    Args:
        path: The file, which must not exist; None to keep the run in memory only.
        provenance: What the header says.

    Raises:
        RunFileError: The file exists, or cannot be created.
    """

    def __init__(self, path: str | os.PathLike[str] | None, provenance: Mapping[str, Any]) -> None:
        self._path = None if path is None else str(path)
        self._file: int | None = None if path is None else _created(path)
        self._lines: list[bytes] = []
        self._columns: dict[str, dict[str, Any]] = {}
        self._assumed: dict[str, Any] | None = None
        self._torn = False
        self._synced = time.monotonic()
        self._write("header", schema=SCHEMA, provenance=provenance)

    @property
    def run(self) -> Run:
        """Everything written so far, as a reader of the file would see it."""
        return run_from_lines(self._lines, path=self._path)

    def assume(self, **about: Any) -> None:
        """Say what was assumed; written when it is new or differs from before."""
        if self._assumed != about:
            self._assumed = about
            self._write("assumed", detail=about)

    def declare(self, name: str, **about: Any) -> None:
        """Say what a column holds; written when it is new or differs from before."""
        if self._columns.get(name) != about:
            self._columns[name] = about
            self._write("column", name=name, **about)

    def row(
        self,
        step: int,
        values: Mapping[str, float | Estimate | None],
        *,
        status: Mapping[str, tuple[str, str]] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Measurements at a step; estimates with their intervals and their status."""
        flat: dict[str, float | None] = {}
        found = dict(status or {})
        for name, item in values.items():
            if not isinstance(item, Estimate):
                flat[name] = item
                continue
            self.declare(name, unit=item.unit, method=item.method, level=item.level, covers=item.covers)
            flat |= {name: item.value, f"{name}.low": item.low, f"{name}.high": item.high}
            if item.status is not Status.OK:
                found[name] = (item.status.name, item.reason)
        optional = {key: item for key, item in (("status", found), ("labels", labels)) if item}
        self._write("row", step=step, values=flat, **optional)

    def event(self, name: str, *, step: int | None = None, **detail: Any) -> None:
        """Something that happened."""
        self._write("event", name=name, step=step, detail=detail)

    def _write(self, kind: str, **fields: Any) -> None:
        line = encode({"kind": kind, "seq": len(self._lines), **fields})
        if self._file is not None:
            # After a write that was cut short (a full disk) the piece is closed off as a line of its own.
            data = b"\n" + line if self._torn else line
            self._torn = True
            if (written := os.write(self._file, data)) < len(data):
                raise RunFileError(
                    f"only {written} of {len(data)} bytes could be written to {self._path!r}: disk full?"
                )
            self._torn = False
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        self._lines.append(line[:-1])

    def close(self) -> None:
        """Make sure that everything is on disk; nothing can be written afterwards."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _created(path: str | os.PathLike[str]) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError as error:
        raise RunFileError(
            f"log {str(path)!r} exists: records of two runs would mix. Choose another name, or read it with "
            "dyntune.load_run(path)."
        ) from error
    except OSError as error:
        raise RunFileError(f"log {str(path)!r} cannot be created: {error.strerror or error}.") from error
