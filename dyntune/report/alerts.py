"""Alerts of a run as its page tells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dyntune.monitor.run import Event, Run
from dyntune.report.axis import Axis
from dyntune.report.words import MOST_LINES, capital, named, text

__all__ = ["Alert", "alerts"]

MOST_ALERTS = 20  # that are told one by one; alike ones that follow each other count as one
_MORE = {"causes": "likely cause", "where": "where", "since": "since step"}  # besides the evidence, where recorded


@dataclass(frozen=True, kw_only=True)
class Alert:
    """An alert, or several alike that follow each other.

    Args:
        number: From 1.
        when: Its steps in words.
        place: In percent of the steps of the page; None for no step in particular.
        severity: As recorded.
        text: What is wrong.
        evidence: ``name: value``.
        advice: What to change.
    """

    number: int
    when: str
    place: float | None
    severity: str
    text: str
    evidence: tuple[str, ...]
    advice: str


def alerts(run: Run, steps: Axis) -> tuple[tuple[Alert, ...], str]:
    """What happened, and what is said where nothing did or more than can be shown."""
    groups: list[list[Event]] = []
    for event in named(run, "alert"):
        if groups and _kind(groups[-1][0]) == _kind(event):
            groups[-1].append(event)
        else:
            groups.append([event])
    if not groups:
        return (), "No alert was raised."
    more = len(groups) - MOST_ALERTS
    quiet = f"The first {MOST_ALERTS} are shown; {more} more are in the log." if more > 0 else ""
    return tuple(_alert(i, group, steps) for i, group in enumerate(groups[:MOST_ALERTS], 1)), quiet


def _kind(event: Event) -> tuple[object, object]:
    return event.detail.get("kind"), event.detail.get("severity")


def _alert(index: int, group: list[Event], steps: Axis) -> Alert:
    first, detail = group[0], group[0].detail
    evidence = detail.get("evidence", {})
    if isinstance(evidence, Mapping):
        lines = [f"{text(str(name).replace('_', ' '))}: {text(item)}" for name, item in evidence.items()]
    else:
        items = evidence if isinstance(evidence, (list, tuple)) else [evidence]
        lines = [text(item) for item in items]
    lines += [f"{name}: {_listed(detail[key])}" for key, name in _MORE.items() if detail.get(key)]
    times = f", {len(group):,} times up to step {group[-1].step:,}" if len(group) > 1 and group[-1].step else ""
    at = first.step
    by = detail.get("recommender")
    better = f"{text(by)} measures a better value." if by else ""
    return Alert(
        number=index,
        when=f"Step {at:,}{times}" if at is not None else "No step in particular",
        place=None if at is None else round(100 * float(steps.place(np.array([float(at)]))[0]), 2),
        severity=text(detail.get("severity", "")),
        text=capital(text(detail.get("text") or detail.get("kind") or "An alert without words.")),
        evidence=tuple(lines[:MOST_LINES]),
        advice=" ".join(filter(None, (text(detail.get("advice", "")), better))),
    )


def _listed(item: object) -> str:
    return text("; ".join(map(str, item)) if isinstance(item, (list, tuple)) else item)
