"""``dyntune explain run.jsonl``: what happened in a run, in words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dyntune.errors import InvalidArgumentError
from dyntune.monitor.story import Story, explain

__all__ = ["add"]

DESCRIPTION = """\
Tells what happened in a recorded run: until when it was healthy, what went wrong first, the likeliest cause with its
evidence, and what to do. Without an alarm it says so, and what was not measured. The run may still be going on, or have
been killed.

Exit status: 0, whatever the run is like; 1 on an error; 2 for wrong usage."""

# How files begin that may be written anew, by ending.
BEGINNINGS = {".svg": b"<svg", ".png": b"\x89PNG"}


def add(commands: Any, *, say: Callable[[str], None]) -> None:
    """Add the command to a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers()`` returned.
        say: Prints one line.
    """
    parser = commands.add_parser(
        "explain",
        help="what happened in a run, in words",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log", metavar="run.jsonl", help="the log, or a folder with one")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the evidence: an .svg or .png file")
    parser.set_defaults(run=lambda arguments: _run(arguments, say))


def _run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    out: Path | None = arguments.plot
    if out is not None:
        _check(out)
    story = explain(arguments.log)
    for line in story.text.splitlines():
        say(line)
    if out is None:
        return 0
    try:
        _draw(story, out)
    except OSError as error:
        sys.stderr.write(f"dyntune: --plot {out}: {error.strerror or error}; the figure could not be written.\n")
        return 1
    say(f"The figure: {out.resolve()}")
    return 0


def _check(out: Path) -> None:
    """Figures may be written anew; a log that was named by mistake may not.

    Raises:
        InvalidArgumentError: No figure, no folder, or a file that is none.
    """
    beginning = BEGINNINGS.get(out.suffix.lower())
    if beginning is None:
        raise InvalidArgumentError(f"--plot {out}: give a name that ends in .svg or .png.")
    if not out.absolute().parent.is_dir():
        raise InvalidArgumentError(f"--plot {out}: the folder {out.parent} does not exist; make it first.")
    if out.is_file():
        with out.open("rb") as file:
            found = file.read(len(beginning))
        if found in (beginning, b""):
            return
    if out.exists():
        raise InvalidArgumentError(
            f"--plot {out} exists and is no {out.suffix} file: it is not overwritten. Choose another name."
        )


def _draw(story: Story, out: Path) -> None:
    figure = story.plot()
    if out.suffix.lower() == ".png":
        figure.savefig(out, dpi=150)
        return
    from dyntune.plots.svg import to_svg

    out.write_text(to_svg(figure, name="story", description=story.text, standalone=True), encoding="utf-8")
