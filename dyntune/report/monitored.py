"""A recorded run as a page: verdict first, then what speaks for it, what happened, and what was not seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from dyntune.monitor.ratios import GRADIENT_NORM, LEARNING_RATE, LOSS, first_column, stability_ratios
from dyntune.monitor.rows import Array
from dyntune.monitor.run import Run
from dyntune.monitor.verdict import Verdict, verdict
from dyntune.plots.style import number
from dyntune.report.alerts import Alert, alerts
from dyntune.report.chart import Chart, steps_axis
from dyntune.report.cost import cost, failures, spent
from dyntune.report.courses import distance, edge, training
from dyntune.report.page import Table
from dyntune.report.record import notes, others, provenance
from dyntune.report.regimes import Regimes, regimes
from dyntune.report.strips import Strips, tensor_strips
from dyntune.report.words import named, percent, text

__all__ = ["RunPage", "run_page"]


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
    steps = steps_axis(run.steps.astype(np.float64), _alert_steps(run))
    told, quiet = alerts(run, steps)
    return RunPage(
        title=title or (PurePath(run.path).name if run.path else "Training run"),
        lead=_lead(run),
        steps=(steps.low, steps.high),
        verdict=verdict(run),
        tiles=tuple(_tiles(run)),
        edge=edge(run, steps),
        edge_note=distance(run),
        regimes=regimes(run, steps),
        alerts=told,
        quiet=quiet,
        charts=tuple(training(run, steps)),
        strips=tensor_strips(run, steps),
        cost=tuple(cost(run)),
        blind=tuple((text(e.detail.get("signal", "?")), text(e.detail.get("reason", ""))) for e in named(run, "blind")),
        failures=tuple(failures(run)),
        others=others(run),
        provenance=provenance(run),
        notes=tuple(notes(run)),
    )


def _alert_steps(run: Run) -> Array:
    return np.array([e.step for e in named(run, "alert") if e.step is not None], dtype=np.float64)


def _lead(run: Run) -> str:
    steps = run.steps
    if not steps.size:
        return "Nothing was recorded yet."
    words = [f"Steps {int(steps.min()):,} to {int(steps.max()):,}, {len(run):,} row{'' if len(run) == 1 else 's'}"]
    made = run.provenance.get("optimizer")
    if isinstance(made, Mapping) and made.get("class"):
        words.append(text(made["class"]))
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
    found = named(run, "alert")
    yield "alerts", f"{len(found):,}", f"{sum(e.detail.get('severity') == 'critical' for e in found):,} critical"
    share = spent(run)
    if share is not None:
        yield "overhead", percent(share), "of training time"
