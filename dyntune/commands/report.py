"""``dyntune report run.jsonl -o report.html``: a recorded run as a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dyntune.commands.glance import printable
from dyntune.errors import InvalidArgumentError
from dyntune.monitor.load import load_run

__all__ = ["add"]

DESCRIPTION = """\
Writes one HTML page of a recorded run: is it stable, how far from the edge, what happened at each alert, what to
change. The page needs nothing but itself. The run may still be going on.

Exit status: 0, whatever the run is like; 1 on an error; 2 for wrong usage."""

BEGINNING = b"<!doctype html>"


def add(commands: Any, *, say: Callable[[str], None]) -> None:
    """Add the command to a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers()`` returned.
        say: Prints one line.
    """
    parser = commands.add_parser(
        "report",
        help="a recorded run as a page",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log", metavar="run.jsonl", help="the log, or a folder with one")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), metavar="PATH", help="the page (default: %(default)s)"
    )
    parser.add_argument("--title", metavar="TEXT", help="default: the name of the log")
    parser.set_defaults(run=lambda arguments: _run(arguments, say))


def _run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    out: Path = arguments.out
    if not out.absolute().parent.is_dir():
        raise InvalidArgumentError(f"-o {out}: the folder {out.parent} does not exist; make it first.")
    try:
        _check_no_other_file(out)
        run = load_run(arguments.log)
        from dyntune.report import run_page, write  # matplotlib: not for a log that cannot be read

        page = run_page(run, title=arguments.title)
        write(page, out)
    except OSError as error:
        sys.stderr.write(f"dyntune: -o {out}: {error.strerror}; the page could not be written.\n")
        return 1
    say(printable(page.verdict.sentence))
    say(f"The page: {out.resolve()}")
    return 0


def _check_no_other_file(out: Path) -> None:
    """Pages may be written anew; a log that was named by mistake may not.

    Raises:
        InvalidArgumentError: There is a file that is no page.
    """
    if not out.exists():
        return
    if out.is_file():
        with out.open("rb") as file:
            beginning = file.read(len(BEGINNING))
        if beginning.lower() == BEGINNING or not beginning:
            return
    raise InvalidArgumentError(f"-o {out} exists and is no HTML page: it is not overwritten. Choose another name.")
