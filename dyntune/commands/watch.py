"""``dyntune watch run.jsonl``: a run while it trains, in a terminal."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TextIO

from dyntune.commands.glance import Glance, glance, printable
from dyntune.errors import InvalidArgumentError, RunFileError
from dyntune.monitor.load import load_run
from dyntune.monitor.run import Run
from dyntune.monitor.tail import Tail

__all__ = ["add", "follow"]

DESCRIPTION = """\
Shows a run while it trains, from its log: the verdict, stability ratio, loss, learning rate, gradient norm and alerts.
Only the file is read; training does not notice. Ends with the training, or at Ctrl-C.

Exit status: 0; 1 on an error; 2 for wrong usage."""

ALERTS = 5  # of the latest that a screen shows


class Screen(Protocol):
    """Where a run is shown."""

    def show(self, seen: Glance) -> None:
        """Show what is new."""


def add(commands: Any, *, say: Callable[[str], None]) -> None:
    """Add the command to a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers()`` returned.
        say: Prints one line.
    """
    parser = commands.add_parser(
        "watch",
        help="a run while it trains, in the terminal",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log", metavar="run.jsonl", help="the log; it need not exist yet")
    parser.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between looks at the file (default: %(default)s)",
    )
    parser.add_argument("--plain", action="store_true", help="lines, also where the output is a terminal")
    parser.add_argument("--once", action="store_true", help="show how it stands, and end")
    parser.set_defaults(run=lambda arguments: _run(arguments, say))


def _run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    if not 0 < arguments.interval <= threading.TIMEOUT_MAX:
        raise InvalidArgumentError(f"--interval {arguments.interval}: give a number of seconds above 0.")
    try:
        if arguments.once:
            sys.stdout.write(_encodable("\n".join(glance(load_run(arguments.log)).lines()), sys.stdout) + "\n")
            sys.stdout.flush()
            return 0
        return _watch(arguments, say)
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else flushing at exit fails once more
        return 0


def _watch(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    tail = Tail(arguments.log)
    folder = Path(arguments.log).absolute().parent
    if not folder.is_dir():
        raise RunFileError(f"run {arguments.log!r}: the folder {str(folder)!r} does not exist. Check the path.")
    rich = not arguments.plain and sys.stdout.isatty() and find_spec("rich") is not None
    wait = threading.Event()
    try:
        if not tail.poll():
            say(f"Waiting for {arguments.log} (Ctrl-C ends).")
        with _live() if rich else nullcontext(Lines(sys.stdout)) as screen:
            ended = follow(tail, screen, lambda: wait.wait(arguments.interval))
    except KeyboardInterrupt:
        ended = None
    if ended is None:
        say("No longer watching; the training goes on." if tail.records else "No longer waiting.")
    else:
        say(f"The run has ended. {printable(glance(ended).verdict.sentence)}")
    return 0


def follow(tail: Tail, screen: Screen, wait: Callable[[], object]) -> Run:
    """Show a run until its monitor is closed.

    Args:
        tail: Its file.
        screen: Shows it whenever there is something new.
        wait: Called between looks at the file.

    Returns:
        The run as it ended.
    """
    shown = 0
    while True:
        tail.poll()
        if tail.records != shown:
            shown = tail.records
            run = tail.run()
            seen = glance(run)
            screen.show(seen)
            if seen.ended:
                return run
        wait()


class Lines:
    """A line for every look that finds something new, and one for each alert: for logs, pipes and plain terminals.

    Args:
        out: Where to.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._alerts = 0
        self._last: str | None = None

    def show(self, seen: Glance) -> None:
        """Print it."""
        if len(seen.alerts) < self._alerts:  # another run in the place of the first
            self._alerts = 0
        new = list(seen.alerts[self._alerts :])
        self._alerts = len(seen.alerts)
        if seen.line != self._last:
            new.append(seen.line)
            self._last = seen.line
        for line in new:
            self._out.write(_encodable(line, self._out) + "\n")
        self._out.flush()


def _encodable(text: str, out: TextIO) -> str:
    """`text` as far as the output can show it."""
    encoding = getattr(out, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


def _live() -> AbstractContextManager[Screen]:
    from dyntune.commands.live import LiveScreen

    return LiveScreen(alerts=ALERTS)
