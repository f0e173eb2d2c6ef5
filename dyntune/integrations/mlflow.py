"""Numbers of a run to MLflow: :class:`MLflowSink`."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dyntune.errors import InvalidArgumentError, MissingDependencyError
from dyntune.integrations.text import detail, storable
from dyntune.monitor.run import Event

__all__ = ["MLflowSink"]

# Limits of MLflow's REST interface: metrics in a call of log_batch, letters of a name and of a tag's value.
METRICS, NAME, VALUE = 1000, 250, 5000

TAG = "dyntune.event."

# What is written at once, in numbers: a call for each step would be a request to the server for each.
BATCH = 200

_REFUSED = re.compile(r"[^\w\-. /]|/(?=/|$)|^/")  # also ":", which Windows does not take


class MLflowSink:
    """Logs metrics to a run of yours, under ``dyntune/``, and events as its tags ``dyntune.event.0`` and so on.

    A name that MLflow refuses is written with ``_`` in place of what it refuses and the first letters of a hash at its
    end, so that different names stay different.

    Args:
        run_id: The run; default the active one. It is left open.
        tracking_uri: Where it is; default ``mlflow.get_tracking_uri()``.

    Raises:
        MissingDependencyError: MLflow is not installed.
        InvalidArgumentError: No run was given and none is active.

    Example::

        with mlflow.start_run(), dyntune.Monitor(model, optimizer, sinks=[MLflowSink()]) as monitor:
            ...
    """

    def __init__(self, run_id: str | None = None, *, tracking_uri: str | None = None) -> None:
        try:
            import mlflow
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise MissingDependencyError(
                "the MLflow sink needs MLflow, which is not installed: pip install 'dyntune[mlflow]'."
            ) from error
        active: Any = mlflow.active_run()
        if run_id is None and active is None:
            raise InvalidArgumentError(
                "no MLflow run is active, so there is nowhere to log to. Make the sink inside mlflow.start_run(), or "
                "give the run's identifier."
            )
        self._run_id = active.info.run_id if run_id is None else run_id
        self._client: Any = MlflowClient(tracking_uri=tracking_uri or mlflow.get_tracking_uri())
        self._metric = mlflow.entities.Metric
        self._waiting: list[Any] = []
        self._events: int | None = None
        self._closed = False

    def write(self, step: int, values: Mapping[str, float], events: Sequence[Event]) -> None:
        """See :class:`dyntune.monitor.sink.Sink`. Sent when 200 numbers wait, with an event, and at the end."""
        if self._closed:
            raise InvalidArgumentError("the MLflow sink is closed; make another.")
        now = round(1000 * time.time())
        self._waiting += [self._metric(_name(name), float(value), now, step) for name, value in values.items()]
        if events or len(self._waiting) >= BATCH:
            self._send()
        for event in events:
            about = storable(detail(event, name=event.name, step=event.step))
            self._client.set_tag(self._run_id, f"{TAG}{self._next_event()}", about[:VALUE])

    def close(self) -> None:
        """Send what waits; the run is yours to end."""
        if not self._closed:
            self._closed = True
            self._send()

    def _next_event(self) -> int:
        if self._events is None:  # an attempt before this one may have left some
            tags = self._client.get_run(self._run_id).data.tags
            self._events = sum(tag.startswith(TAG) for tag in tags)
        self._events += 1
        return self._events - 1

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), METRICS):
            self._client.log_batch(self._run_id, metrics=waiting[start : start + METRICS])


def _name(name: str) -> str:
    """A name that MLflow takes: it stores metrics in files named so."""
    full = f"dyntune/{name}"
    kept = "/".join("_" if part.strip(".") == "" else part for part in _REFUSED.sub("_", full).split("/"))
    if kept == full and len(full) <= NAME:
        return full
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{kept[: NAME - 9]}_{digest}"
