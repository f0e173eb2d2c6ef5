"""What a person sees while a suggestion is measured: a bar on terminals and in notebooks, or calls of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from tqdm import tqdm

from dyntune.pilot.twin import CostMeter
from dyntune.records import short_number

__all__ = ["ProgressLike", "Reporter", "reporting"]

Reporter: TypeAlias = Callable[[str, float, "float | None"], None]
ProgressLike: TypeAlias = "bool | Reporter | None"

SHOW_AFTER = 1.0  # seconds: what is faster needs no bar
BAR = "{desc}: {percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f} gradients, {elapsed}{postfix}"


class _Bar(tqdm):  # type: ignore[misc]
    """tqdm without its thread: every charge moves the bar, so that nothing has to look after it."""

    monitor_interval = 0


class _Cell:
    """Where tqdm writes in a notebook: a display that is updated, since a stream would keep every line."""

    encoding = "utf-8"  # tqdm then draws with blocks

    def __init__(self) -> None:
        self._handle: Any = None

    def write(self, text: str) -> int:
        """Show a line in the place of the one before; moves between the lines of several bars mean nothing here."""
        from IPython.display import display

        if not text.startswith("\r"):
            return len(text)
        shown = {"text/plain": text.strip()}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(shown, raw=True)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


class _ShownMeter(CostMeter):
    """Counts gradient-equivalents, and moves a bar with them: one stage alone may take minutes."""

    def __init__(self, limit: float, bar: _Bar) -> None:
        super().__init__(limit)
        self._bar = bar

    def charge(self, cost: float) -> None:
        """Add to what was spent."""
        super().charge(cost)
        self._bar.update(cost)


@contextmanager
def reporting(progress: ProgressLike, *, limit: float) -> Iterator[tuple[CostMeter, Reporter | None]]:
    """A meter for the budget, and whom to tell of each stage.

    Args:
        progress: None: a bar once :data:`SHOW_AFTER` is over, on a terminal or in a notebook. True: a bar at once,
            wherever standard error leads. False: nothing. A function: called with (stage that ended,
            gradient-equivalents spent, best learning rate so far or None).
        limit: The budget in gradient-equivalents.
    """
    if callable(progress):
        yield CostMeter(limit), progress
        return
    output = _output(always=progress is True) if progress is not False else None
    if output is None:
        yield CostMeter(limit), None
        return
    # miniters=0: a charge may be seconds of work, and none is to be left out.
    options = {"bar_format": BAR, "leave": False, "miniters": 0, "delay": 0.0 if progress else SHOW_AFTER}
    with _Bar(total=limit, desc="learning rate", file=output, **options) as bar:

        def tell(stage: str, spent: float, best: float | None) -> None:  # noqa: ARG001 - the meter moves the bar
            guess = "none yet" if best is None else short_number(best)
            bar.set_postfix_str(f"{stage} done, best so far: {guess}", refresh=False)
            bar.update(0)

        yield _ShownMeter(limit, bar), tell


def _output(*, always: bool) -> Any:
    """Where a bar would be seen; None where it would not."""
    if _in_notebook():
        return _Cell()
    seen = always or (sys.stderr is not None and sys.stderr.isatty())
    return sys.stderr if seen else None


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook (IPython in a terminal is none)."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
