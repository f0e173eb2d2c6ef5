"""A recorded run as a page: verdict first, then what speaks for it, what happened, and what was not seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from dyntune.dynamics.edge import Regime
from dyntune.monitor.ratios import GRADIENT_NORM, LEARNING_RATE, LOSS, first_column, nearest_ratio, stability_ratios
from dyntune.monitor.rows import Array, Rows
from dyntune.monitor.run import Column, Event, Run
from dyntune.monitor.verdict import Verdict, verdict
from dyntune.plots.style import number
from dyntune.report.axis import LOG_RATIO, Axis
from dyntune.report.chart import WIDTH, Chart, Series, chart, steps_axis
from dyntune.report.envelope import envelope
from dyntune.report.page import Table
from dyntune.report.strips import Strips, tensor_strips

__all__ = ["Alert", "Regimes", "RunPage", "run_page"]

MOST_ALERTS = 20  # that are told one by one; alike ones that follow each other count as one
MOST_LINES = 200  # of a table of details
MOST_TEXT = 300  # characters of a detail
MOST_RATES = 4  # learning rates of parameter groups in one chart: more cannot be told apart
FAR = 8.0  # stability ratio from which 1 would lie too low on a linear axis to see what is below
LOOKS = ("blue", "green", "muted", "orange")

_REGIME_LOOKS = {
    Regime.SMOOTH: "calm",
    Regime.STATIONARY_NOISE: "calm",
    Regime.DAMPED: "calm",
    Regime.EDGE: "edge",
    Regime.DIVERGING: "bad",
    Regime.UNDETERMINED: "unclear",
}


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


@dataclass(frozen=True, kw_only=True)
class Regimes:
    """What successive gradients said over the run.

    Args:
        paths: (look, path in a box of 1000 by 10).
        counts: (look, name, bursts).
        table: The latest bursts with their reasons.
    """

    paths: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, str, int], ...]
    table: Table


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """A report of a run; :func:`dyntune.report.write` writes it.

    Args:
        title: The run's name.
        lead: Its extent in one line.
        steps: First and last step that the charts show.
        verdict: What it comes to.
        tiles: (name, value, remark) of the numbers to see first.
        edge: How far from the edge; None where nothing says it.
        edge_note: The latest distance in words, or why there is none.
        regimes: None where no burst was recorded.
        alerts: What happened.
        quiet: Said where there are no alerts, or more than are shown.
        charts: Loss, learning rate, gradient norm.
        strips: Signals by tensor.
        cost: What the monitor cost, one sentence each.
        blind: (signal, reason) of what could not be seen.
        failures: What went wrong in the monitor itself.
        others: Columns that are not drawn; None without.
        provenance: Where the numbers come from.
        notes: What is missing from the record.
    """

    title: str
    lead: str
    steps: tuple[float, float]
    verdict: Verdict
    tiles: tuple[tuple[str, str, str], ...]
    edge: Chart | None
    edge_note: str
    regimes: Regimes | None
    alerts: tuple[Alert, ...]
    quiet: str
    charts: tuple[Chart, ...]
    strips: tuple[Strips, ...]
    cost: tuple[str, ...]
    blind: tuple[tuple[str, str], ...]
    failures: tuple[str, ...]
    others: Table | None
    provenance: Table | None
    notes: tuple[str, ...]


def run_page(run: Run, *, title: str | None = None) -> RunPage:
    """Lay a run out as a page.

    Args:
        run: What :func:`dyntune.load_run` returned, or a monitor's. Any column may be missing; series of any length are
            drawn as their middle and range.
        title: Default: the name of its file.

    Returns:
        The page, for :func:`dyntune.report.render` or :func:`dyntune.report.write`; the same for the same run.

    Example:
        >>> from dyntune.monitor.run import Row
        >>> from dyntune.report import render
        >>> page = run_page(Run(rows=[Row(step=0, values={"train/loss": 2.0, "stability/lr_ratio": 0.5})]))
        >>> page.verdict.state.name, "Stable: the learning rate is at 0.5" in render(page)
        ('STABLE', True)
    """
    steps = steps_axis(run.steps.astype(np.float64), _event_steps(run))
    alerts, quiet = _alerts(run, steps)
    edge = _edge(run, steps)
    return RunPage(
        title=title or (PurePath(run.path).name if run.path else "Training run"),
        lead=_lead(run),
        steps=(steps.low, steps.high),
        verdict=verdict(run),
        tiles=tuple(_tiles(run)),
        edge=edge,
        edge_note=_distance(run),
        regimes=_regimes(run, steps),
        alerts=alerts,
        quiet=quiet,
        charts=tuple(_charts(run, steps)),
        strips=tensor_strips(run, steps),
        cost=tuple(_cost(run)),
        blind=tuple(
            (_text(e.detail.get("signal", "?")), _text(e.detail.get("reason", ""))) for e in _named(run, "blind")
        ),
        failures=tuple(_failures(run)),
        others=_others(run),
        provenance=_provenance(run),
        notes=tuple(_notes(run)),
    )


def _named(run: Run, name: str) -> list[Event]:
    return [event for event in run.events if event.name == name]


def _event_steps(run: Run) -> Array:
    return np.array([e.step for e in _named(run, "alert") if e.step is not None], dtype=np.float64)


def _text(item: object) -> str:
    """A detail on one line."""
    text = number(item) if isinstance(item, float) else str(item)
    text = {"True": "yes", "False": "no"}.get(text, text)
    text = " ".join(text.split())
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _lead(run: Run) -> str:
    steps = run.steps
    if not steps.size:
        return "Nothing was recorded yet."
    words = [f"Steps {int(steps.min()):,} to {int(steps.max()):,}, {len(run):,} row{'' if len(run) == 1 else 's'}"]
    made = run.provenance.get("optimizer")
    if isinstance(made, Mapping) and made.get("class"):
        words.append(_text(made["class"]))
    if run.world > 1:
        words.append(f"rank {run.rank} of {run.world}")
    if run.attempts > 1:
        words.append(f"{run.attempts} attempts")
    return ", ".join(words) + "."


def _tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    for ratio in stability_ratios(run):
        if ratio.last is not None:
            yield (
                "stability ratio",
                number(float(ratio.values[ratio.last])),
                f"{ratio.kind}; step {int(ratio.steps[ratio.last]):,}",
            )
    for words, names in (("loss", LOSS), ("learning rate", LEARNING_RATE), ("gradient norm", GRADIENT_NORM)):
        name = first_column(run, names)
        if name is None:
            continue
        steps, values = run.series(name)
        at = int(np.argmax(steps))
        finite = np.abs(values[np.isfinite(values)])
        remark = f"step {int(steps[at]):,}"
        if words == "loss" and finite.size:
            remark = f"lowest {number(float(values[np.isfinite(values)].min()))}; {remark}"
        yield words, number(float(values[at])), remark
    alerts = _named(run, "alert")
    yield "alerts", f"{len(alerts):,}", f"{sum(e.detail.get('severity') == 'critical' for e in alerts):,} critical"
    spent = _spent(run)
    if spent is not None:
        yield "overhead", _percent(spent), "of training time"


def _distance(run: Run) -> str:
    ratio = nearest_ratio(stability_ratios(run))
    if ratio is None or ratio.last is None:
        return "No stability ratio was established: how far the edge is cannot be said from this run."
    value, step = float(ratio.values[ratio.last]), int(ratio.steps[ratio.last])
    of = "threshold along the step" if ratio.kind == "along the step" else f"{ratio.kind} threshold"
    if not value > 0:
        return f"At step {step:,} curvature was not positive: no learning rate is at the {of} there."
    if value < 1:
        return (
            f"At the curvature of step {step:,} the learning rate could be {number(1 / value)} times as large before "
            f"it reaches the {of}. Curvature answers to the rate, so this is a distance and not a suggestion."
        )
    return f"At the curvature of step {step:,} the learning rate is {number(value)} times the one at the {of}."


def _edge(run: Run, steps: Axis) -> Chart | None:
    ratios = stability_ratios(run)
    if not ratios:
        return None
    names = {
        "deterministic": "deterministic (full batch)",
        "stochastic": "stochastic (small batches)",
        "along the step": "along the step",
    }
    return chart(
        "Stability ratio",
        [
            Series(name=names[r.kind], points=envelope(r.steps, r.values, r.low, r.high), look=look)
            for r, look in zip(ratios, LOOKS, strict=False)
        ],
        steps=steps,
        note=(
            "How far the learning rate has come towards the largest one that is stable at that step's curvature. 1 is "
            "the threshold that the name says. Training is drawn to it, and the best learning rates train there: 1 is "
            "no danger by itself."
        ),
        levels=((1.0, "threshold"),),
        from_zero=True,
        log_ratio=math.inf if max(float(np.nanmax(r.values, initial=0.0)) for r in ratios) < FAR else LOG_RATIO,
    )


def _charts(run: Run, steps: Axis) -> Iterator[Chart]:
    for title, names, note in (
        ("Loss", LOSS, "As it was given to the monitor, batch by batch."),
        ("Learning rate", LEARNING_RATE, ""),
        ("Gradient norm", GRADIENT_NORM, "Length of the whole gradient, as the optimizer takes it."),
    ):
        name = first_column(run, names)
        if name is None:
            continue
        columns = [name]
        if names is LEARNING_RATE:
            columns += [n for n in run.names if n.startswith(f"{name}/")][: MOST_RATES - 1]
        series = [
            Series(
                name=title.lower() if len(columns) == 1 else f"group {c.removeprefix(name).strip('/') or '0'}",
                points=envelope(*run.series(c), *run.interval(c)),
                look=look,
            )
            for c, look in zip(columns, LOOKS, strict=False)
        ]
        unit = run.columns.get(name, Column(name=name)).unit.replace("^2", "²")
        binned = any(s.points.binned for s in series)
        more = "Line: the median of a stretch of steps; shaded: from the lowest to the highest." if binned else ""
        shown = "" if unit in ("1", title.lower()) else unit
        # A rate that is warmed up and decayed to nothing is read more easily as it is.
        ratio = math.inf if names is LEARNING_RATE else LOG_RATIO
        note = " ".join(filter(None, (note, more)))
        yield chart(title, series, steps=steps, unit=shown, note=note, from_zero=True, log_ratio=ratio)


def _alerts(run: Run, steps: Axis) -> tuple[tuple[Alert, ...], str]:
    groups: list[list[Event]] = []
    for event in _named(run, "alert"):
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
        lines = [f"{_text(str(name).replace('_', ' '))}: {_text(item)}" for name, item in evidence.items()]
    else:
        items = evidence if isinstance(evidence, (list, tuple)) else [evidence]
        lines = [_text(item) for item in items]
    times = f", {len(group):,} times up to step {group[-1].step:,}" if len(group) > 1 and group[-1].step else ""
    at = first.step
    return Alert(
        number=index,
        when=f"Step {at:,}{times}" if at is not None else "No step in particular",
        place=None if at is None else round(100 * float(steps.place(np.array([float(at)]))[0]), 2),
        severity=_text(detail.get("severity", "")),
        text=_capital(_text(detail.get("text") or detail.get("kind") or "An alert without words.")),
        evidence=tuple(lines[:MOST_LINES]),
        advice=_text(detail.get("advice", "")),
    )


def _regimes(run: Run, steps: Axis) -> Regimes | None:
    assert isinstance(run.rows, Rows)  # since its __post_init__
    found = [
        (int(step), Regime[name.upper()], reason or "")
        for step, name, reason in zip(
            run.steps.tolist(), run.rows.label("regime"), run.rows.label("regime_reason"), strict=True
        )
        if name and name.upper() in Regime.__members__
    ]
    if not found:
        return None
    starts = WIDTH * steps.place(np.array([float(step) for step, _, _ in found]))
    stride = float(np.median(np.diff(starts))) if len(found) > 1 else 0.0
    paths: dict[str, list[str]] = {look: [] for look in dict.fromkeys(_REGIME_LOOKS.values())}
    for start, (_, regime, _) in zip(np.round(starts, 1).tolist(), found, strict=True):
        end = min(start + max(stride, 4.0), float(WIDTH))  # 4: wide enough to be seen
        start = min(start, WIDTH - 4.0)
        paths[_REGIME_LOOKS[regime]].append(f"M{start:g} 0H{end:g}V10H{start:g}z")
    tally = {regime: sum(r is regime for _, r, _ in found) for regime in Regime}
    return Regimes(
        paths=tuple((look, "".join(pieces)) for look, pieces in paths.items() if pieces),
        counts=tuple((_REGIME_LOOKS[r], _spoken(r), count) for r, count in tally.items() if count),
        table=Table(
            header=("step", "regime", "why"),
            rows=tuple((f"{step:,}", _spoken(r), _text(reason)) for step, r, reason in found[-MOST_ALERTS:]),
        ),
    )


def _spoken(regime: Regime) -> str:
    return regime.name.lower().replace("_", " ")


def _spent(run: Run) -> float | None:
    """Share of training time that the monitor took: as it closed, else the latest that was recorded."""
    for event in reversed(_named(run, "closed")):
        spent = event.detail.get("overhead")
        if isinstance(spent, (int, float)) and math.isfinite(spent):
            return float(spent)
    if "monitor/overhead" not in run:
        return None
    values = run.series("monitor/overhead")[1]
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else None


def _percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 1 else f"{100 * share:.2g} %"


def _budget(run: Run) -> float | None:
    """The share that the monitor was allowed."""
    places = [run.provenance, *(run.provenance.get(key) for key in ("monitor", "options"))]
    for place in places:
        allowed = place.get("overhead") if isinstance(place, Mapping) else None
        if isinstance(allowed, (int, float)) and math.isfinite(allowed):
            return float(allowed)
    return None


def _cost(run: Run) -> Iterator[str]:
    spent, budget = _spent(run), _budget(run)
    if spent is None:
        yield "What the monitor cost was not recorded."
    else:
        allowed = "" if budget is None else f", of {100 * budget:g} % allowed"
        within = "" if budget is None else (" (within the budget)" if spent <= budget else " (above the budget)")
        yield f"The monitor took {_percent(spent)} of training time{allowed}{within}."
    if "monitor/step_s" in run:
        values = run.series("monitor/step_s")[1]
        known = values[np.isfinite(values)]
        if known.size:
            yield f"A step by itself took {1000 * float(known[-1]):.3g} ms."
    for event in _named(run, "closed")[-1:]:
        told = [
            f"{key} {_text(event.detail[key])}"
            for key in ("steps", "bursts", "probes", "errors")
            if key in event.detail
        ]
        if told:
            yield f"Counts: {', '.join(told)}."


def _failures(run: Run) -> Iterator[str]:
    counted: dict[str, int] = {}
    for event in run.events:
        detail = event.detail
        if event.name == "error":
            text = f"{detail.get('where', '?')}: {detail.get('error', '')}: {detail.get('message', '')}"
        elif event.name == "disabled":
            text = f"switched off: {detail.get('part', '?')}: {detail.get('reason', '')}"
        else:
            continue
        counted[_text(text)] = counted.get(_text(text), 0) + 1
    for text, count in list(counted.items())[:MOST_LINES]:
        yield f"{text} ({count} times)" if count > 1 else text


def _others(run: Run) -> Table | None:
    shown = {*LOSS, *LEARNING_RATE, *GRADIENT_NORM, *(r.column for r in stability_ratios(run))}
    strips = ("grad/log_rms/", "adam/staleness/", "adam/below_eps/", "update/ratio/", "curvature/block/")
    names = [n for n in run.names if n not in shown and not n.startswith((*strips, "train/lr/"))]
    rows = []
    for name in names[:MOST_LINES]:
        values = run.series(name)[1]
        known = values[np.isfinite(values)]
        cells = (
            [number(float(v)) for v in (known[-1], known.min(), np.median(known), known.max())] if known.size else []
        )
        unit = run.columns.get(name, Column(name=name)).unit.replace("^2", "²")
        rows.append((_text(name), f"{values.size:,}", *(cells or ["none"] * 4), unit))
    if not rows:
        return None
    if len(names) > MOST_LINES:
        rows.append((f"and {len(names) - MOST_LINES:,} more", *[""] * 6))
    return Table(header=("column", "values", "last", "lowest", "median", "highest", "unit"), rows=tuple(rows))


def _provenance(run: Run) -> Table | None:
    rows = [*_flat("", run.provenance), *_flat("assumed", run.assumed)]
    if run.id is not None:
        rows.insert(0, ("run", _text(run.id)))
    return Table(header=("what", "value"), rows=tuple(rows[:MOST_LINES])) if rows else None


def _flat(prefix: str, item: object) -> Iterator[tuple[str, str]]:
    if isinstance(item, Mapping):
        for key, value in item.items():
            yield from _flat(f"{prefix} {_text(str(key))}".strip(), value)
    elif isinstance(item, (list, tuple)) and any(isinstance(entry, Mapping) for entry in item):
        for i, entry in enumerate(item):
            yield from _flat(f"{prefix} {i}", entry)
    else:
        yield prefix, _text(item)


def _notes(run: Run) -> Iterator[str]:
    counted: dict[str, Any] = {
        "bad lines were set aside": len(run.quarantined),
        "places where records are missing": run.gaps,
        "records could not be written": run.lost,
        "records were cut short": run.torn,
        "records of a kind unknown to this version": run.unknown,
        "rows were made again by a later attempt": len(run.superseded),
    }
    for what, count in counted.items():
        if count:
            yield f"{count:,} {what}."
    if run.missing:
        yield f"No file of rank {', '.join(map(str, run.missing))}."
    for rank, step in run.short.items():
        yield f"Rank {rank} ends early, {'without a row' if step is None else f'at step {step:,}'}."
    for name, reason in run.unreadable.items():
        yield f"Unreadable: {_text(name)}: {_text(reason)}"
