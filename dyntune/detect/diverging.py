"""Growth that flips its sign at every step, before the loss shows it: :class:`Diverging`."""

from __future__ import annotations

from collections.abc import Iterable

from dyntune.dynamics.edge import Regime
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row, Rows

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
            for at, regime in enumerate(rows.label("regime")):
                if regime is not None:
                    on = regime == Regime.DIVERGING.name.lower()
                    if on and not self._on:
                        yield self._alert(rows[at])
                    self._on = on

    def _alert(self, row: Row) -> Alert:
        return Alert(
            kind="diverging",
            severity="critical",
            step=row.step,
            text=f"training is diverging: {row.labels.get('regime_reason', '')}.",
            advice="Go back to a checkpoint and lower the learning rate.",
            evidence={name: row.values[name] for name in COLUMNS if name in row.values},
            causes=(Cause.LR_TOO_HIGH,),
            recommender="dyntune.suggest_lr",
        )
