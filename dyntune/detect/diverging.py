"""Growth that flips its sign at every step, before the loss shows it: :class:`Diverging`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dyntune.dynamics.edge import Regime
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows

__all__ = ["Diverging"]

COLUMNS = ("grad/autocorr_lag1", "grad/autocorr_lag2", "grad/amplitude", "stability/step_curvature")


class Diverging:
    """A burst that was classified as diverging; said once for as long as it lasts.

    The class asks for curvature above the limit, a gradient that flips its sign and grows, and a loss above its start,
    each by its interval: see :func:`dyntune.dynamics.edge.classify`. Training at the edge of stability is none.
    """

    def __init__(self) -> None:
        self._on = False

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        if "regime" in rows.label_names:
            for row in rows:
                if "regime" in row.labels:
                    yield from self._row(row.step, row.values, row.labels)

    def _row(self, step: int, values: Mapping[str, float | None], labels: Mapping[str, str]) -> Iterable[Alert]:
        on = labels["regime"] == Regime.DIVERGING.name.lower()
        if on and not self._on:
            yield Alert(
                kind="diverging",
                severity="critical",
                step=step,
                text=f"training is diverging: {labels.get('regime_reason', '')}.",
                advice="Go back to a checkpoint and lower the learning rate.",
                evidence={name: values[name] for name in COLUMNS if name in values},
                causes=(Cause.LR_TOO_HIGH,),
                recommender="dyntune.suggest_lr",
            )
        self._on = on
