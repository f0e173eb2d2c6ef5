"""``dyntune export run.jsonl --to csv -o run.csv``: a recorded run for another tool."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dyntune.errors import InvalidArgumentError, RunFileError
from dyntune.monitor.load import load_run
from dyntune.monitor.sink import Sink, export

__all__ = ["add"]

DESCRIPTION = """\
Writes the numbers and events of a recorded run for another tool. CSV and Parquet have a row for each, with the columns
step, kind, name, value, detail. Rows that a resumed training took back are left out.

Exit status: 0; 1 on an error; 2 for wrong usage."""


def add(commands: Any, *, say: Callable[[str], None]) -> None:
    """Add the command to a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers()`` returned.
        say: Prints one line.
    """
    parser = commands.add_parser(
        "export",
        help="a recorded run as CSV, Parquet or for TensorBoard",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log", metavar="run.jsonl", help="the log; of several processes, rank 0 is exported")
    parser.add_argument("--to", required=True, choices=("csv", "parquet", "tensorboard"), help="what to write")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="PATH", help="a new file or folder")
    parser.set_defaults(run=lambda arguments: _run(arguments, say))


def _run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    out: Path = arguments.out
    if not out.absolute().parent.is_dir():
        raise InvalidArgumentError(f"-o {out}: the folder {out.parent} does not exist; make it first.")
    if out.exists():
        raise RunFileError(f"-o {out} exists: numbers of two runs would mix. Choose another name.")
    run = load_run(arguments.log)
    try:
        export(run, _sink(arguments.to, out))
    except OSError as error:
        sys.stderr.write(f"dyntune: -o {out}: {error.strerror or error}; the run could not be exported.\n")
        return 1
    numbers = sum(value is not None for row in run.rows for value in row.values.values())
    events = len(run.events)
    say(f"{numbers} numbers and {events} event{'' if events == 1 else 's'} of {len(run)} rows: {out}")
    return 0


def _sink(kind: str, out: Path) -> Sink:
    if kind == "csv":
        from dyntune.integrations.csv_file import CSVSink

        return CSVSink(out)
    if kind == "parquet":
        from dyntune.integrations.parquet import ParquetSink

        return ParquetSink(out)
    from dyntune.integrations.tensorboard import TensorBoardSink

    return TensorBoardSink(out)
