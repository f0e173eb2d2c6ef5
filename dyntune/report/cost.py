"""What the monitor cost, and what went wrong in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from dyntune.monitor.run import Run
from dyntune.report.words import MOST_LINES, named, percent, text

__all__ = ["cost", "failures", "spent"]


def spent(run: Run) -> float | None:
    """Share of training time that the monitor took: as it closed, else the latest that was recorded."""
    for event in reversed(named(run, "closed")):
        share = event.detail.get("overhead")
        if isinstance(share, (int, float)) and math.isfinite(share):
            return float(share)
    if "monitor/overhead" not in run:
        return None
    values = run.series("monitor/overhead")[1]
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else None


def _budget(run: Run) -> float | None:
    """The share that the monitor was allowed."""
    places = [run.provenance, *(run.provenance.get(key) for key in ("monitor", "options"))]
    for place in places:
        allowed = place.get("overhead") if isinstance(place, Mapping) else None
        if isinstance(allowed, (int, float)) and math.isfinite(allowed):
            return float(allowed)
    return None


def cost(run: Run) -> Iterator[str]:
    """One sentence each."""
    share, budget = spent(run), _budget(run)
    if share is None:
        yield "What the monitor cost was not recorded."
    else:
        allowed = "" if budget is None else f", of {100 * budget:g} % allowed"
        within = "" if budget is None else (" (within the budget)" if share <= budget else " (above the budget)")
        yield f"The monitor took {percent(share)} of training time{allowed}{within}."
    if "monitor/step_s" in run:
        values = run.series("monitor/step_s")[1]
        known = values[np.isfinite(values)]
        if known.size:
            yield f"A step by itself took {1000 * float(known[-1]):.3g} ms."
    for event in named(run, "closed")[-1:]:
        told = [
            f"{key} {text(event.detail[key])}" for key in ("steps", "bursts", "probes", "errors") if key in event.detail
        ]
        if told:
            yield f"Counts: {', '.join(told)}."


def failures(run: Run) -> Iterator[str]:
    """Errors of the monitor itself, alike ones counted."""
    counted: dict[str, int] = {}
    for event in run.events:
        detail = event.detail
        if event.name == "error":
            said = f"{detail.get('where', '?')}: {detail.get('error', '')}: {detail.get('message', '')}"
        elif event.name == "disabled":
            said = f"switched off: {detail.get('part', '?')}: {detail.get('reason', '')}"
        else:
            continue
        said = text(said)
        counted[said] = counted.get(said, 0) + 1
    for said, count in list(counted.items())[:MOST_LINES]:
        yield f"{said} ({count} times)" if count > 1 else said
