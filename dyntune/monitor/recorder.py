"""Rows and events on their way to the file, the sinks and the detectors: :class:`Recorder`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dyntune.monitor.alerts import Alert, Detector
from dyntune.monitor.rows import Rows
from dyntune.monitor.run import Event, Run
from dyntune.monitor.sink import GuardedSink, Sink
from dyntune.monitor.writer import RunWriter
from dyntune.records import Estimate

__all__ = ["Recorder"]

UNITS: Mapping[str, str] = {
    "train/loss": "loss",
    "train/skipped": "steps",
    "train/pass": "passes",
    "grad/norm": "loss / parameter",
    "grad/log_rms": "ln(loss / parameter)",
    "activation/log_rms": "ln(activation)",
    "curvature/block": "loss / parameter^2",
    "curvature/products": "products",
    "monitor/overhead_s": "s",
    "monitor/step_s": "s",
    "monitor/errors": "errors",
}


class Recorder:
    """Writes to the run, and hands rows to the sinks and the detectors.

    Args:
        writer: Of the run.
        sinks: See :class:`dyntune.monitor.sink.Sink`; each is guarded.
        detectors: See :class:`dyntune.monitor.alerts.Detector`.
        failed: Called with ``"detectors"`` and the error of one.
        closed: Whether a part is still on.
    """

    def __init__(
        self,
        writer: RunWriter,
        sinks: Sequence[Sink],
        detectors: Sequence[Detector],
        failed: Callable[[str, Exception], None],
        closed: Callable[[str], bool],
    ) -> None:
        self.writer = writer
        self.alerts: list[Alert] = []
        self._sinks, self._detectors = tuple(map(GuardedSink, sinks)), tuple(detectors)
        self._events: list[Event] = []  # that the sinks have not been given yet
        self._failed, self._closed = failed, closed
        self._blind: set[tuple[str, str]] = set()
        self._declared: set[str] = set()
        self._seen = writer.num_rows  # by sinks and detectors

    @property
    def run(self) -> Run:
        """What was recorded so far."""
        return self.writer.run

    def row(
        self, step: int, values: Mapping[str, float | Estimate | None], *, labels: Mapping[str, str] | None = None
    ) -> None:
        """Numbers of a step."""
        for name in values:
            if name not in self._declared:
                self._declare(name, values[name])
        self.writer.row(step, values, labels=labels)
        self._recorded(values)

    def rows(self, first: int, count: int, values: Mapping[str, Any]) -> None:
        """Numbers of consecutive steps, as :meth:`dyntune.monitor.writer.RunWriter.rows` takes them."""
        for name in values:
            if name not in self._declared:
                self._declare(name, None)
        self.writer.rows(first, count, values)
        self._recorded(values)

    def _recorded(self, names: Iterable[str]) -> None:
        """Hand on what is new of these columns."""
        if not self._sinks and not self._detectors:
            return
        rows = self.writer.rows_since(self._seen, names)
        self._seen += len(rows)
        for alert in self._detected(rows):
            self.alert(alert)
        for row in rows if self._sinks else ():
            metrics = {name: value for name, value in row.values.items() if value is not None}
            self._pass_on(row.step, metrics)

    def event(self, name: str, *, step: int | None = None, **detail: Any) -> None:
        """Something that happened; sinks are given it with the next row."""
        self.writer.event(name, step=step, **detail)
        if self._sinks:
            self._events.append(Event(name=name, step=step, detail=detail))

    def _pass_on(self, step: int, metrics: Mapping[str, float]) -> None:
        events, self._events = tuple(self._events), []
        for sink in self._sinks:
            sink.write(step, metrics, events)

    def blind(self, signal: str, reason: str, *, step: int | None = None) -> None:
        """A signal that cannot be had; recorded once for each reason."""
        if (signal, reason) not in self._blind:
            self._blind.add((signal, reason))
            self.event("blind", step=step, signal=signal, reason=reason)

    def alert(self, alert: Alert) -> None:
        """Raise an alert."""
        self.alerts.append(alert)
        about: dict[str, Any] = {
            "kind": alert.kind,
            "severity": alert.severity,
            "text": alert.text,
            "advice": alert.advice,
        }
        if alert.causes:
            about["causes"] = [cause.value for cause in alert.causes]
        if alert.where:
            about["where"] = list(alert.where)
        if alert.since is not None:
            about["since"] = alert.since
        if alert.recommender:
            about["recommender"] = alert.recommender
        self.event("alert", step=alert.step, **about, evidence=dict(alert.evidence))

    def close(self, step: int) -> None:
        """Close the file and the sinks."""
        try:
            if self._events:
                self._pass_on(step, {})
            for sink in self._sinks:
                sink.close()
        finally:
            self.writer.close()

    def _declare(self, name: str, value: Any) -> None:
        self._declared.add(name)
        if not isinstance(value, Estimate):  # those are declared with their method by the writer
            unit = UNITS.get(name) or UNITS.get(name.rsplit("/", 1)[0]) or UNITS.get("/".join(name.split("/")[:2]), "1")
            self.writer.declare(name, unit=unit)

    def _detected(self, rows: Rows) -> list[Alert]:
        found: list[Alert] = []
        for detector in self._detectors if self._closed("detectors") else ():
            try:
                found += detector.update(rows)
            except Exception as error:
                self._failed("detectors", error)
        return sorted(found, key=lambda alert: alert.step)
