"""What bursts said of successive gradients over a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dyntune.dynamics.edge import Regime
from dyntune.monitor.rows import Rows
from dyntune.monitor.run import Run
from dyntune.report.axis import Axis
from dyntune.report.chart import WIDTH
from dyntune.report.page import Table
from dyntune.report.words import text

__all__ = ["Regimes", "regimes"]

LATEST = 20  # bursts that are told one by one

_REGIME_LOOKS = {
    Regime.SMOOTH: "calm",
    Regime.STATIONARY_NOISE: "calm",
    Regime.DAMPED: "calm",
    Regime.EDGE: "edge",
    Regime.DIVERGING: "bad",
    Regime.UNDETERMINED: "unclear",
}


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


def regimes(run: Run, steps: Axis) -> Regimes | None:
    """None where no burst says one."""
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
            rows=tuple((f"{step:,}", _spoken(r), text(reason)) for step, r, reason in found[-LATEST:]),
        ),
    )


def _spoken(regime: Regime) -> str:
    return regime.name.lower().replace("_", " ")
