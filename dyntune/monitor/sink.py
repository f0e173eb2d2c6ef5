"""Where a monitor's numbers go besides its log: the protocol :class:`Sink`, its guard, and :func:`export`."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from dyntune.monitor.run import Event, Run

__all__ = ["GuardedSink", "Sink", "SinkWarning", "export"]


class SinkWarning(RuntimeWarning):
    """A sink failed and gets nothing any more. Given once for each."""


@runtime_checkable
class Sink(Protocol):
    """Takes a run's numbers, step by step: a file, a board, a service.

    :mod:`dyntune.integrations` has those for TensorBoard, Weights & Biases, MLflow, Trackio, CSV and Parquet; anything
    with these two methods is one.
    """

    def write(self, step: int, values: Mapping[str, float], events: Sequence[Event]) -> None:
        """Take what was measured at a step.

        Args:
            step: Never lower than in the call before, unless the training was resumed from an earlier checkpoint.
            values: By metric name, such as ``curvature/lambda_max``; NaN and infinite where the measured number is.
                What was refused is not in it. Empty where there are only events.
            events: What happened since the call before.
        """

    def close(self) -> None:
        """Bring everything to where it belongs. May be called twice; nothing is written afterwards."""


class GuardedSink:
    """A sink that cannot harm the training: the first exception disables it, with one warning.

    Args:
        sink: What is guarded.

    Example:
        >>> class Broken:
        ...     def write(self, step, values, events):
        ...         raise OSError("no space left")
        ...
        ...     def close(self):
        ...         pass
        >>> guarded = GuardedSink(Broken())
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     guarded.write(3, {"loss": 1.0}, ())
        ...     guarded.write(4, {"loss": 1.0}, ())
        >>> len(caught), guarded.trouble
        (1, 'OSError: no space left')
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._closed = False
        self.trouble: str | None = None  # why it is disabled; None while it works

    def write(self, step: int, values: Mapping[str, float], events: Sequence[Event] = ()) -> None:
        """Pass on what was measured, unless the sink has failed or was closed. Raises nothing but interrupts."""
        if self.trouble is not None or self._closed:
            return
        try:
            self._sink.write(step, values, events)
        except Exception as error:
            self._disable(error, f"at step {step}")

    def close(self) -> None:
        """Close the sink once, also a disabled one: what it took before it failed may still be saved."""
        if self._closed:
            return
        self._closed = True
        try:
            self._sink.close()
        except Exception as error:
            if self.trouble is None:
                self._disable(error, "when it was closed")

    def _disable(self, error: Exception, when: str) -> None:
        self.trouble = f"{type(error).__name__}: {error}"
        message = (
            f"sink {type(self._sink).__name__} failed {when} ({self.trouble}) and gets nothing any more; the training "
            "and its log go on. Replay the log into a sink with dyntune.monitor.sink.export."
        )
        try:
            warnings.warn(message, SinkWarning, stacklevel=3)
        except SinkWarning:  # a filter that turns warnings into errors must not end the training either
            return


def export(run: Run, sink: Sink) -> None:
    """Replay a recorded run into a sink, and close it.

    Rows that a later attempt superseded are left out; events are those of all attempts. An event is passed on with the
    first row of its step or a later one, and with the last row where there is none; one without a step comes with its
    predecessor.

    Args:
        run: What :func:`dyntune.load_run` returned, or a monitor's ``run``.
        sink: Where to; not guarded: what it raises reaches the caller.

    Raises:
        Exception: What the sink raises; it is closed all the same.

    Cost:
        One pass over the rows, about a thousand of which are in memory at a time.

    Example:
        >>> from dyntune.monitor.run import Row
        >>> class Shown:
        ...     def write(self, step, values, events):
        ...         print(step, values)
        ...
        ...     def close(self):
        ...         print("closed")
        >>> rows = (Row(step=0, values={"loss": 1.0}), Row(step=1, values={"loss": None, "grad/norm": 2.0}))
        >>> export(Run(rows=rows), Shown())
        0 {'loss': 1.0}
        1 {'grad/norm': 2.0}
        closed
    """
    try:
        waiting = deque(_dated(run.events))
        step = 0
        for row in run.rows:
            step, events = row.step, []
            while waiting and waiting[0][0] <= step:
                events.append(waiting.popleft()[1])
            values = {name: value for name, value in row.values.items() if value is not None}
            if values or events:
                sink.write(step, values, events)
        if waiting:
            sink.write(step, {}, [event for _, event in waiting])
    finally:
        sink.close()


def _dated(events: Sequence[Event]) -> list[tuple[int, Event]]:
    """Events by the step that they are passed on at."""
    dated, step = [], 0
    for event in events:
        step = step if event.step is None else event.step
        dated.append((step, event))
    return sorted(dated, key=lambda pair: pair[0])
