"""Numbers of a run into a CSV file: :class:`CSVSink`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dyntune.errors import InvalidArgumentError, RunFileError
from dyntune.integrations.text import detail
from dyntune.monitor.run import Event

__all__ = ["HEADER", "CSVSink"]

HEADER = ("step", "kind", "name", "value", "detail")

# A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV Injection").
_FORMULA = ("=", "+", "-", "@")


class CSVSink:
    """Writes a line for every number and event: ``step,kind,name,value,detail``.

    ``kind`` is ``metric`` or ``event``, ``detail`` what is known of an event, as JSON. So metrics may appear later in
    the run, as those of rare measurements do. A metric's value is written so that reading gives back the same number,
    and ``nan``, ``inf`` or ``-inf``. Control characters in names are escaped as in Python, and a name that a
    spreadsheet would take for a formula begins with ``'``.

    Args:
        path: The file; made at the first write.
        resume: Append to a file that exists. Otherwise, it must not. Where a step appears twice, the later lines count.

    Raises:
        RunFileError: At the first write: the file exists and ``resume`` is false, or begins as no file of this sink.
        OSError: It cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = CSVSink(f"{folder}/run.csv")
        ...     sink.write(10, {"curvature/lambda_max": 12.5}, ())
        ...     sink.close()
        ...     print(Path(folder, "run.csv").read_text(encoding="utf-8"))
        step,kind,name,value,detail
        10,metric,curvature/lambda_max,12.5,
        <BLANKLINE>

        As a table with a column for each metric: ``pandas.read_csv(path).query("kind == 'metric'")
        .pivot_table(index="step", columns="name", values="value", aggfunc="last")``.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        self._path = Path(path)
        self._resume = resume
        self._file: io.BufferedRandom | None = None
        self._closed = False

    def write(self, step: int, values: Mapping[str, float], events: Sequence[Event]) -> None:
        """See :class:`dyntune.monitor.sink.Sink`. One call to the system, so that a kill tears one step at most."""
        if self._closed:
            raise InvalidArgumentError(f"sink {str(self._path)!r} is closed; make another with resume=True.")
        if self._file is None:
            self._file = self._open()
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        for name, value in values.items():
            lines.writerow((step, "metric", _cell(name), repr(float(value)), ""))
        for event in events:
            at = step if event.step is None else event.step
            lines.writerow((at, "event", _cell(event.name), "", detail(event)))
        self._file.write(text.getvalue().encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._closed = True
        if self._file is not None:
            self._file.close()

    def _open(self) -> io.BufferedRandom:
        header = (",".join(HEADER) + "\n").encode()
        try:
            file = self._path.open("r+b" if self._resume and self._path.exists() else "x+b")
        except FileExistsError as error:
            raise RunFileError(
                f"{str(self._path)!r} exists: numbers of two runs would mix. Choose another name, or go on with it by "
                "resume=True."
            ) from error
        found = file.read(len(header))
        if not header.startswith(found):
            file.close()
            raise RunFileError(
                f"{str(self._path)!r} begins with {found!r}, not with {header!r}: it is no file of this sink, and "
                "appending would spoil it. Choose another name."
            )
        file.truncate(_end_of_lines(file))  # without a line that a killed process left unfinished
        if file.seek(0, os.SEEK_END) == 0:
            file.write(header)
        return file


def _end_of_lines(file: io.BufferedRandom) -> int:
    """Where the last whole line ends; line breaks within cells are escaped."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        if (at := file.read(end - start).rfind(b"\n")) >= 0:
            return start + at + 1
        end = start
    return 0


def _cell(name: str) -> str:
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown
