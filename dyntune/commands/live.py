"""A run on a terminal that is redrawn in place. Importing this loads rich."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dyntune.commands.glance import Glance, printable
from dyntune.monitor.verdict import State

__all__ = ["LiveScreen", "picture"]

# Told apart without their colour by the words beside them.
_STYLES = {State.STABLE: "green", State.EDGE: "blue", State.DIVERGING: "bold red", State.UNDETERMINED: "yellow"}


class LiveScreen:
    """Shows a run in place of what it showed before.

    Args:
        alerts: How many of the latest are shown.
        console: Where; default the terminal.
    """

    def __init__(self, *, alerts: int, console: Console | None = None) -> None:
        self._most = alerts
        self._live = Live(Text(""), console=console, auto_refresh=False)

    def __enter__(self) -> LiveScreen:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture and the cursor as they should be."""
        self._live.__exit__(kind, error, trace)

    def show(self, seen: Glance) -> None:
        """Redraw."""
        self._live.update(picture(seen, alerts=self._most), refresh=True)


def picture(seen: Glance, *, alerts: int) -> RenderableType:
    """What is drawn. Everything is Text, in which rich sees no markup.

    Args:
        seen: The run.
        alerts: How many of the latest.
    """
    head = seen.title if seen.step is None else f"{seen.title}, step {seen.step:,}"
    table = Table.grid(padding=(0, 2))
    for signal in seen.signals:
        table.add_row(Text(signal.name), Text(signal.value, style="bold"), Text(signal.course, style="cyan"))
    words = [Text(printable(seen.verdict.sentence), style=_STYLES[seen.verdict.state])]
    words += [Text(f"- {printable(line)}") for line in seen.verdict.advice]
    latest = [Text(line, style="red") for line in seen.alerts[-alerts:]]
    if len(seen.alerts) > alerts:
        latest.insert(0, Text(f"{len(seen.alerts) - alerts:,} earlier alerts"))
    parts: list[RenderableType] = [*words, Text(""), table, *([Text(""), *latest] if latest else [])]
    return Panel(Group(*parts), title=Text(head), title_align="left", expand=False)
