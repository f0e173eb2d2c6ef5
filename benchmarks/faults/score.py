"""What alarms are worth: detection, causes, lead times and false alarms, each with an interval.

Runs of a cell (a generator in an architecture; for healthy runs, a kind in one) are alike, so intervals come from a
bootstrap over cells. Beside them stand exact ones for runs as if each were independent: they are what counts where all
or none of the runs are hits, of which a bootstrap learns nothing.

- Alarms of one kind less than 200 steps after one that counts are the same alarm; never across the onset.
- An alarm detects a fault from the onset on. Before it, it is a false one.
- At the severity "critical" only critical alarms are looked at, at "warning" all: for faults and healthy runs alike.
- Causes are ranked as a user meets them: those of the first alarm from the onset on, then those that later ones add.
- Lead time: the fixed rule's first alarm from the onset on less the detector's. Where one of them is silent it is
  censored at 200 steps, which is also where longer ones end; where both are, there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.faults.alarm import SEVERITIES, Alarm
from benchmarks.faults.harm import LEVELS
from benchmarks.lr.metrics import share
from dyntune.monitor.alerts import Cause

MERGED = 200  # steps; also where lead times end
PER = 100_000  # steps that false alarms are counted on
LEVEL = 0.95
RESAMPLES = 2000
# Where training blows up or jumps, which a rule on the loss could see: what lead times are asked of. A loss that is NaN
# exceeds no threshold, so the fixed rule never sees one: values that are not finite are no part of this.
SUDDEN = frozenset(
    {
        Cause.LR_TOO_HIGH,
        Cause.WARMUP_MISSING,
        Cause.BETA2_TOO_SMALL,
        Cause.STALE_SECOND_MOMENT,
        Cause.EXPLODING,
        Cause.BAD_BATCH,
    }
)

Point = tuple[str, float]  # detector and level


@dataclass(frozen=True)
class Judged:
    """A run and what detectors said of it.

    Args:
        name: Of the run.
        kind: ``"faults"``, ``"twins"`` or ``"healthy"``.
        cell: Generator or kind, and architecture.
        steps: How many there were.
        cause: Of a fault.
        severity: Of a fault: ``"mild"``, ``"medium"`` or ``"severe"``.
        onset: Of a fault.
        alarms: By detector and level; no point is absent that was looked at.
    """

    name: str
    kind: str
    cell: str
    steps: int
    cause: str | None
    severity: str | None
    onset: int | None
    alarms: Mapping[Point, tuple[Alarm, ...]]


def merged(alarms: Iterable[Alarm], onset: int | None) -> list[Alarm]:
    """Repetitions of alarms left out; in order of time."""
    last: dict[tuple[str, str, bool], int] = {}
    kept = []
    for alarm in sorted(alarms, key=lambda a: a.time):
        key = (alarm.kind, alarm.severity, onset is not None and alarm.time >= onset)
        if alarm.time - last.get(key, -MERGED) >= MERGED:
            last[key] = alarm.time
            kept.append(alarm)
    return kept


def at_severity(alarms: Iterable[Alarm], severity: str) -> list[Alarm]:
    """Those as severe as that or more so."""
    wanted = SEVERITIES[: SEVERITIES.index(severity) + 1]
    return [alarm for alarm in alarms if alarm.severity in wanted]


def hits(run: Judged, point: Point, severity: str) -> list[Alarm]:
    """Alarms from the onset on, in order of time."""
    assert run.onset is not None
    found = [alarm for alarm in at_severity(run.alarms[point], severity) if alarm.time >= run.onset]
    return sorted(found, key=lambda alarm: alarm.time)


def false_ones(run: Judged, point: Point, severity: str) -> list[Alarm]:
    """Alarms before the onset; of a healthy run, all."""
    found = at_severity(run.alarms[point], severity)
    return found if run.onset is None else [alarm for alarm in found if alarm.time < run.onset]


# -- intervals --------------------------------------------------------------------------------------------------------


def resampled(count: int, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each of so many cells is drawn, with replacement; shape (resamples, cells)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def ends(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def clustered_ratio(counts: Sequence[float], totals: Sequence[float], cells: Sequence[str]) -> tuple[float, float]:
    """Interval of sum(counts) / sum(totals) by a bootstrap over cells."""
    names, place = np.unique(np.asarray(cells), return_inverse=True)
    weights = resampled(len(names))
    above, below = (weights @ np.bincount(place, np.asarray(item, dtype=float)) for item in (counts, totals))
    return ends(above / below)


def rate_of(successes: Sequence[bool], cells: Sequence[str]) -> dict[str, Any] | None:
    """Share of runs with its intervals; None of no runs."""
    if not successes:
        return None
    low, high = clustered_ratio(successes, [1.0] * len(successes), cells)
    return {**share(sum(successes), len(successes)), "cells": len(set(cells)), "cell_low": low, "cell_high": high}


def poisson_rate(count: int, steps: int, *, per: int = PER, level: float = LEVEL) -> dict[str, float]:
    """Alarms per so many steps with the exact interval, and the one-sided upper limit: of none, 3 / steps."""
    low, high = (
        stats.chi2.ppf((1 - level) / 2, 2 * count) / 2 if count else 0.0,
        stats.chi2.ppf((1 + level) / 2, 2 * count + 2) / 2,
    )
    upper = stats.chi2.ppf(level, 2 * count + 2) / 2
    rate = {"rate": count, "low": low, "high": high, "upper": upper}
    return {"count": count, "steps": steps} | {name: float(per * value / steps) for name, value in rate.items()}


# -- figures ----------------------------------------------------------------------------------------------------------


def detection(runs: Sequence[Judged], point: Point, severity: str) -> dict[str, Any] | None:
    """Share of faulty runs with an alarm from the onset on."""
    return rate_of([bool(hits(run, point, severity)) for run in runs], [run.cell for run in runs])


def ranked_causes(run: Judged, point: Point, severity: str) -> list[str]:
    """The causes named from the onset on, as a user meets them."""
    return list(dict.fromkeys(cause for alarm in hits(run, point, severity) for cause in alarm.causes))


def named(runs: Sequence[Judged], point: Point, severity: str, *, within: int) -> dict[str, Any] | None:
    """Share of faulty runs whose cause is among the first so many; a run without alarm names none."""
    right = [run.cause in ranked_causes(run, point, severity)[:within] for run in runs]
    return rate_of(right, [run.cell for run in runs])


def lead_time(run: Judged, point: Point, severity: str, rule: Point) -> float | None:
    """Steps by which the fixed rule comes later; see the head of this file."""
    ours, fixed = hits(run, point, severity), hits(run, rule, "critical")
    if not ours:
        return -MERGED if fixed else None
    return float(np.clip(fixed[0].time - ours[0].time, -MERGED, MERGED)) if fixed else MERGED


def leads(runs: Sequence[Judged], point: Point, severity: str, rule: Point) -> dict[str, Any] | None:
    """Median lead time, in steps."""
    found = [(run, lead) for run in runs if (lead := lead_time(run, point, severity, rule)) is not None]
    if not found:
        return None
    values = np.array([lead for _, lead in found])
    names, place = np.unique([run.cell for run, _ in found], return_inverse=True)
    medians = [np.median(np.repeat(values, row[place])) for row in resampled(len(names))]
    low, high = ends(np.array(medians))
    return {
        "runs": len(found),
        "neither": len(runs) - len(found),
        "missed": sum(not hits(run, point, severity) for run, _ in found),
        "rule_silent": sum(not hits(run, rule, "critical") for run, _ in found),
        "median": float(np.median(values)),
        "cell_low": low,
        "cell_high": high,
    }


def false_alarms(runs: Sequence[Judged], point: Point, severity: str) -> dict[str, Any] | None:
    """False alarms per 100,000 steps of runs in which nothing is wrong."""
    if not runs:
        return None
    counts = [len(false_ones(run, point, severity)) for run in runs]
    steps = [run.steps for run in runs]
    low, high = clustered_ratio(counts, steps, [run.cell for run in runs])
    found = poisson_rate(sum(counts), sum(steps)) | {"cell_low": PER * low, "cell_high": PER * high}
    return found | {"runs": len(runs), "runs_with_one": sum(map(bool, counts))}


def figures(runs: Sequence[Judged], point: Point, severity: str, rule: Point | None) -> dict[str, Any]:
    """Everything about one detector at one level and severity; without `rule`, no lead times."""
    faults = [run for run in runs if run.kind == "faults"]
    by_severity = {level: [run for run in faults if run.severity == level] for level in LEVELS}
    sudden = [run for run in faults if run.cause in SUDDEN and run.severity != "mild"]
    each: dict[str, Callable[[list[Judged]], Any]] = {
        "detection": lambda some: detection(some, point, severity),
        "top_1": lambda some: named(some, point, severity, within=1),
        "top_3": lambda some: named(some, point, severity, within=3),
        "top_1_of_detected": lambda some: named(
            [r for r in some if hits(r, point, severity)], point, severity, within=1
        ),
        "top_3_of_detected": lambda some: named(
            [r for r in some if hits(r, point, severity)], point, severity, within=3
        ),
    }
    found = {name: {level: score(some) for level, some in by_severity.items()} for name, score in each.items()}
    if rule is not None:
        groups = by_severity | {"sudden": sudden}
        found["lead"] = {name: leads(some, point, severity, rule) for name, some in groups.items()}
    for kind in ("healthy", "twins"):
        found[kind] = false_alarms([run for run in runs if run.kind == kind], point, severity)
    # Steps before the onset are the twin's, bit by bit, so they are counted but add no healthy steps.
    found["before_onset"] = sum(len(false_ones(run, point, severity)) for run in faults)
    return found


def by_family(runs: Sequence[Judged], point: Point, severity: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each generator and severity: runs, detected, and right causes first and among three."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if run.kind == "faults":
            assert run.severity is not None
            row = table.setdefault(run.cell.split("/")[0], {})
            cell = row.setdefault(run.severity, {"runs": 0, "detected": 0, "top_1": 0, "top_3": 0})
            ranked = ranked_causes(run, point, severity)
            cell["runs"] += 1
            cell["detected"] += bool(hits(run, point, severity))
            cell["top_1"] += run.cause in ranked[:1]
            cell["top_3"] += run.cause in ranked[:3]
    return table


def advantage(runs: Sequence[Judged], ours: Point, severity: str, other: Point, *, level: str) -> dict[str, float]:
    """Detection of one detector less another's on the same faults, with its interval over cells."""
    some = [run for run in runs if run.kind == "faults" and run.severity == level]
    gains = [bool(hits(r, ours, severity)) - bool(hits(r, other, "critical")) for r in some]
    low, high = clustered_ratio(gains, [1.0] * len(gains), [run.cell for run in some])
    return {"gain": float(np.mean(gains)), "cell_low": low, "cell_high": high}


def budget(runs: Sequence[Judged], point: Point, severity: str) -> int:
    """All alarms of a detector over all runs, right and wrong."""
    return sum(len(at_severity(run.alarms[point], severity)) for run in runs)
