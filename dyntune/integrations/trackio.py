"""Numbers of a run to Trackio: :class:`TrackioSink`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dyntune.errors import InvalidArgumentError, MissingDependencyError
from dyntune.integrations.text import detail, storable
from dyntune.monitor.run import Event

__all__ = ["TrackioSink"]


class TrackioSink:
    """Logs metrics to a run of yours, under ``dyntune/``, and events as its alerts.

    Args:
        run: What ``trackio.init(...)`` returned. It is left open.

    Raises:
        MissingDependencyError: The package trackio is not installed.
        InvalidArgumentError: `run` is no run.

    Example::

        run = trackio.init(project="mnist")
        with dyntune.Monitor(model, optimizer, sinks=[TrackioSink(run)]) as monitor:
            ...
    """

    def __init__(self, run: Any) -> None:
        try:
            import trackio
            from trackio.run import Run
        except ImportError as error:
            raise MissingDependencyError(
                "the Trackio sink needs the package trackio, which is not installed: pip install 'dyntune[trackio]'."
            ) from error
        if not isinstance(run, Run):
            raise InvalidArgumentError(
                f"run is a {type(run).__name__}, not a Trackio run: there is nowhere to log to. Give what "
                "trackio.init(project=...) returned."
            )
        self._run = run
        self._level = trackio.AlertLevel.WARN
        self._closed = False

    def write(self, step: int, values: Mapping[str, float], events: Sequence[Event]) -> None:
        """See :class:`dyntune.monitor.sink.Sink`."""
        if self._closed:
            raise InvalidArgumentError("the Trackio sink is closed; make another.")
        if values:
            self._run.log({storable(f"dyntune/{name}"): float(value) for name, value in values.items()}, step=step)
        for event in events:
            at = step if event.step is None else event.step
            self._run.alert(storable(event.name), detail(event), level=self._level, step=at)

    def close(self) -> None:
        """Nothing: the run is yours to finish."""
        self._closed = True
