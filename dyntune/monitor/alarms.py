"""Alerts as a record holds them, whoever wrote it: :class:`Alarm`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dyntune.monitor.run import Event, Run
from dyntune.monitor.telling import plain

__all__ = ["Alarm", "alarms", "taken_back", "texts"]


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """An alert as a record holds it, whoever wrote that.

    Args:
        kind: What was seen.
        severity: ``"critical"`` or ``"warning"``.
        step: Where it was seen; None where nothing says it.
        since: The first step that shows it; `step` where nothing says it.
        text: What.
        advice: What to do.
        causes: The likeliest first.
        where: Parameters or layers.
        evidence: Numbers by name.
        recommender: What measures a better value; empty where nothing does.
    """

    kind: str
    severity: str
    step: int | None
    since: int | None
    text: str
    advice: str = ""
    causes: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    recommender: str = ""

    @property
    def critical(self) -> bool:
        """Whether it is one that training does not survive."""
        return self.severity == "critical"


def alarms(run: Run) -> tuple[Alarm, ...]:
    """Those of steps that count, in the order in which their trouble began."""
    kept = [event for event in run.events if event.name == "alert" and not taken_back(run, event)]
    return tuple(sorted(map(_alarm, kept), key=lambda a: -1 if a.since is None else a.since))


def taken_back(run: Run, event: Event) -> bool:
    """Whether training was resumed from before it, so that its step was made again."""
    return event.step is not None and any(
        later.name == "resumed" and later.attempt > event.attempt and later.step is not None and event.step > later.step
        for later in run.events
    )


def _alarm(event: Event) -> Alarm:
    detail = event.detail
    since, evidence = detail.get("since"), detail.get("evidence")
    return Alarm(
        kind=plain(detail.get("kind", "")),
        severity=plain(detail.get("severity", "")),
        step=event.step,
        since=since if isinstance(since, int) and not isinstance(since, bool) else event.step,
        text=plain(detail.get("text") or detail.get("kind") or "an alarm without words"),
        advice=plain(detail.get("advice") or ""),
        causes=texts(detail.get("causes")),
        where=texts(detail.get("where")),
        evidence=dict(evidence) if isinstance(evidence, Mapping) else {},
        recommender=plain(detail.get("recommender") or ""),
    )


def texts(item: object) -> tuple[str, ...]:
    """What should be a list of texts."""
    if isinstance(item, str):
        return (plain(item),)
    return tuple(map(plain, item)) if isinstance(item, (list, tuple)) else ()
