"""The command line: ``dyntune demo``, ``lr``, ``watch``, ``explain``, ``report`` and ``export``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from dyntune import __version__
from dyntune.commands import explain, export, lr, report, watch
from dyntune.errors import DyntuneError

__all__ = ["main"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; default those of the process.

    Returns:
        The exit status: 0; 1 when the command failed; 2 for wrong usage; 130 when interrupted.

    Example:
        >>> main(["demo", "--out", "/nowhere/at/all.html"])
        2
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    if arguments.run is None:
        parser.print_help()
        return USAGE
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except DyntuneError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dyntune", description="Measure how PyTorch models train, and choose their knobs by it."
    )
    parser.add_argument("--version", action="version", version=f"dyntune {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="a tour on a small language model, with a page of results (one to two minutes)",
        description="Trains a small transformer on text that Python brings along, and writes a page of results.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("dyntune-demo.html"), metavar="PATH", help="the page (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="seconds instead of minutes; the numbers mean little")
    demo.set_defaults(run=_demo)
    lr.add(commands, say=_say)
    explain.add(commands, say=_say)
    export.add(commands, say=_say)
    report.add(commands, say=_say)
    watch.add(commands, say=_say)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if not out.parent.is_dir():
        return _fail(f"--out {out}: the folder {out.parent} does not exist; make it, or choose another.", USAGE)
    from dyntune.demo import Size, demo_page, tour
    from dyntune.report import write

    result = tour(size=Size.quick() if arguments.quick else Size(), seed=arguments.seed, say=_say)
    try:
        write(demo_page(result), out)
    except OSError as error:
        return _fail(f"--out {out}: {error.strerror}; the page could not be written.")
    _say(f"The page with all figures: {out.resolve()}")
    return OK


def _say(line: str) -> None:
    """One line on the terminal; wrapped at words where rich is installed."""
    if find_spec("rich") is None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        return
    from rich.console import Console

    Console(markup=False, emoji=False, soft_wrap=not sys.stdout.isatty()).print(line)


def _fail(message: str, status: int = FAILED) -> int:
    sys.stderr.write(f"dyntune: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
