"""What the parts of a monitor share: :class:`Session`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter, thread_time
from typing import Any

import torch

from dyntune.monitor.breaker import Breaker
from dyntune.monitor.budget import Budget
from dyntune.monitor.processes import Place
from dyntune.monitor.recorder import Recorder
from dyntune.records import Estimate

__all__ = ["Session"]

# A signal that is measured less often than this is reported as blind to what passes in between.
RARE = 1000.0


class Session:
    """One monitored training: its steps so far, what it may cost, what has failed, where the record goes.

    Args:
        optimizer: What steps.
        names: Of parameters, by identity.
        place: Of this process among others.
        budget: What may be spent.
        breaker: What becomes of errors.
        recorder: Where rows and events go.
        number: Of the first step.
    """

    def __init__(
        self,
        *,
        optimizer: torch.optim.Optimizer,
        names: dict[int, str],
        place: Place,
        budget: Budget,
        breaker: Breaker,
        recorder: Recorder,
        number: int,
    ) -> None:
        self.optimizer, self.names, self.place = optimizer, names, place
        self.budget, self.breaker, self.recorder = budget, breaker, recorder
        self.number = self.began = number  # of the next step, and of the first
        self.probing = False
        self.elsewhere = 0.0  # seconds of the present hook that other accounts bear

    @property
    def last(self) -> int:
        """Number of the last step; one below the first before it."""
        return self.number - 1

    @property
    def made(self) -> int:
        """Steps made."""
        return self.number - self.began

    @contextmanager
    def probe(self) -> Iterator[None]:
        """While the monitor runs the model."""
        self.probing = True
        try:
            yield
        finally:
            self.probing = False

    def guarded(self, part: str, action: Callable[[], None], *, book: str | None = None) -> None:
        """Do something that may fail, on this part's account."""
        if not self.breaker.closed(part):
            return
        try:
            self.timed(book or part, action)
            self.breaker.succeeded(part)
        except Exception as error:
            self.breaker.failed(part, error)

    def timed(self, kind: str, action: Callable[[], None]) -> None:
        """Do something on this account.

        What waits for the device or for memory counts by the wall clock. Records do not, and count by this thread's: on
        a busy machine the wall clock would add other programs' time to a few microseconds of theirs.
        """
        wall, own, elsewhere = perf_counter(), thread_time(), self.elsewhere
        inner = self.budget.spent
        try:
            action()
        finally:
            spent = thread_time() - own
            inner = self.budget.spent - inner  # booked by what was called
            self.budget.book(kind, max((spent if kind == "log" else perf_counter() - wall) - inner, 0.0))
            self.elsewhere = elsewhere + spent

    def own(self) -> dict[str, float | Estimate | None]:
        """Columns of the monitor itself."""
        return {
            "monitor/overhead": self.budget.share,
            "monitor/overhead_s": self.budget.spent,
            "monitor/step_s": self.budget.bare,
            "monitor/errors": self.breaker.errors,
        }

    def say_if_rare(self, kind: str, signal: str, *, share: float) -> None:
        """Record that a signal is blind to what passes between two measurements, if these are far apart."""
        period = self.budget.period(kind, share=share)
        if period > RARE:
            often = f"once in about {period:.0f} steps" if period < float("inf") else "only once"
            self.recorder.blind(
                signal,
                f"to what passes quickly: with overhead={self.budget.overhead:g} measured {often}, since it takes "
                f"{1e3 * self.budget.costs[kind]:.3g} ms",
                step=self.last,
            )

    def event(self, name: str, **detail: Any) -> None:
        """Something that happened at the last step."""
        self.recorder.event(name, step=self.last if self.last >= 0 else None, **detail)
