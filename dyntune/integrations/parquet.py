"""Numbers of a run into a Parquet file: :class:`ParquetSink`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyntune.errors import InvalidArgumentError, MissingDependencyError, RunFileError
from dyntune.integrations.text import detail, storable
from dyntune.monitor.run import Event

__all__ = ["ParquetSink"]

# Rows of a row group: Parquet's authors advise large ones; this many take about 5 MB here before they are written.
GROUP = 65536


class ParquetSink:
    """Writes a row for every number and event: ``step`` (int64), ``kind``, ``name``, ``value`` (double), ``detail``.

    ``kind`` is ``metric`` or ``event``, ``detail`` what is known of an event, as JSON, and null for a metric; ``value``
    is null for an event. Parquet has its index at the end: the file is there once the sink is closed, and a process
    that is killed leaves none. Then the log makes it, ``dyntune export run.jsonl --to parquet -o run.parquet``.

    Args:
        path: The file. Until the sink is closed, ``.partial`` is added to its name.
        resume: Go on with a file that exists: it is replaced by one that holds the old rows and the new ones. Where a
            step appears twice, the later rows count.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        RunFileError: At the first write: the file exists and ``resume`` is false, or has other columns.
        OSError: It cannot be written.

    Example::

        export(load_run("run.jsonl"), ParquetSink("run.parquet"))
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError as error:
            raise MissingDependencyError(
                f"the Parquet sink {str(path)!r} needs pyarrow, which is not installed: pip install "
                "'dyntune[parquet]', or write CSV."
            ) from error
        self._arrow: Any = pa
        self._parquet: Any = parquet
        self._schema = pa.schema(
            [
                pa.field("step", pa.int64(), nullable=False),
                pa.field("kind", pa.string(), nullable=False),
                pa.field("name", pa.string(), nullable=False),
                pa.field("value", pa.float64()),
                pa.field("detail", pa.string()),
            ]
        )
        self._path = Path(path)
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        self._resume = resume
        self._writer: Any = None
        self._rows: list[tuple[int, str, str, float | None, str | None]] = []
        self._closed = False

    def write(self, step: int, values: Mapping[str, float], events: Sequence[Event]) -> None:
        """See :class:`dyntune.monitor.sink.Sink`."""
        if self._closed:
            raise InvalidArgumentError(f"sink {str(self._path)!r} is closed; make another with resume=True.")
        if self._writer is None:
            self._open()
        self._rows += [(step, "metric", storable(name), float(value), None) for name, value in values.items()]
        for event in events:
            at = step if event.step is None else event.step
            self._rows.append((at, "event", storable(event.name), None, detail(event)))
        if len(self._rows) >= GROUP:
            self._flush()

    def close(self) -> None:
        """Finish the file and give it its name. Without any write there is none."""
        if self._closed:
            return
        self._closed = True
        if self._writer is None:
            return
        with contextlib.closing(self._writer):
            self._flush()
        self._partial.replace(self._path)

    def _open(self) -> None:
        there = self._path.exists()
        if there and not self._resume:
            raise RunFileError(
                f"{str(self._path)!r} exists: numbers of two runs would mix. Choose another name, or go on with it by "
                "resume=True."
            )
        old = self._parquet.ParquetFile(self._path) if there else None
        if old is not None and not old.schema_arrow.equals(self._schema):
            raise RunFileError(
                f"{str(self._path)!r} has columns {', '.join(old.schema_arrow.names)}, which are not those of this "
                "sink: it cannot be gone on with. Choose another name."
            )
        self._writer = self._parquet.ParquetWriter(self._partial, self._schema)
        if old is not None:
            with old:
                for i in range(old.num_row_groups):
                    self._writer.write_table(old.read_row_group(i))

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            columns = dict(zip(self._schema.names, zip(*rows, strict=True), strict=True))
            self._writer.write_table(self._arrow.table(columns, schema=self._schema))
