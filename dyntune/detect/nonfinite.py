"""Numbers that are NaN or infinite, and where they came from: :class:`NonFinite`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row, Rows

__all__ = ["NonFinite"]

NAMES: Mapping[str, str] = {"train/loss": "loss", "grad/norm": "length of the gradient"}
# Columns of single layers and tensors, in the order in which a training step makes them.
LAYERS: Mapping[str, str] = {
    "activation/log_rms/": "the output of",
    "grad/log_rms/": "the gradient of",
    "update/ratio/": "the update of",
}
GREW = 3.0  # times the start: a loss that overflows has passed that, one of which a single batch is NaN has not
GROWN = (Cause.LR_TOO_HIGH, Cause.EXPLODING, Cause.NON_FINITE)
ADVICE = "Go back to a checkpoint from before, lower the learning rate, and look at the data there."
ADVICE_BACKWARD = (
    "The loss is finite, so the derivative of an operation is not: look for a square root, a norm or a division at "
    "zero, or half precision that overflows backwards."
)


class NonFinite:
    """A loss or a gradient that is NaN or infinite; said once, and again after it was finite in between.

    Names the first layer or tensor that a measurement at that step or later finds not finite, if there is one: in a
    further alert where the measurement comes after.

    Where the loss had outgrown its start threefold just before, it is a divergence that overflowed, and the causes say
    so.

    False alarms: none by construction, since a number that is not finite is no training signal.

    Example:
        >>> from dyntune.monitor.rows import Row
        >>> rows = Rows.of([Row(step=7, values={"train/loss": float("nan")})])
        >>> [a.text for a in NonFinite().update(rows)]
        ['the loss is nan.']
    """

    def __init__(self) -> None:
        self._bad: dict[str, int] = {}  # since when
        self._named = False
        self._start = self._last = math.nan  # losses

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        if self._bad or not all(map(rows.all_finite, NAMES)):
            for row in rows:
                yield from self._row(row)
        elif "train/loss" in rows.names:
            losses = rows.column("train/loss")[rows.has("train/loss")]
            losses = losses[np.isfinite(losses)]  # the others were refused
            if losses.size:
                self._start = float(losses[0]) if math.isnan(self._start) else self._start
                self._last = float(losses[-1])

    def _row(self, row: Row) -> Iterable[Alert]:
        for name, said in NAMES.items():
            value = row.values.get(name)
            if value is None:
                continue
            if math.isfinite(value):
                self._bad.pop(name, None)
                if name == "train/loss":
                    self._last = value
                    self._start = value if math.isnan(self._start) else self._start
            elif name not in self._bad:
                self._bad[name] = row.step
                yield self._alert(row, name, said, value)
        if not self._bad:
            self._named = False
        elif not self._named and (where := _first(row.values)):
            self._named = True
            yield self._named_alert(row.step, where)

    def _alert(self, row: Row, name: str, said: str, value: float) -> Alert:
        loss = row.values.get("train/loss")
        backward = name == "grad/norm" and loss is not None and math.isfinite(loss)
        grew = self._last > GREW * abs(self._start)
        return Alert(
            kind="non-finite",
            severity="critical",
            step=row.step,
            text=f"the {said} is {value}"
            + (f" while the loss is {loss:.4g}." if backward else ".")
            + (f" It had grown from {self._start:.4g} to {self._last:.4g}." if grew else ""),
            advice=ADVICE_BACKWARD if backward else ADVICE,
            evidence={name: value} | ({"train/loss": loss} if backward else {}),
            causes=GROWN if grew else (Cause.NON_FINITE,),
            recommender="dyntune.suggest_lr" if grew else "",
        )

    def _named_alert(self, step: int, where: tuple[str, str, str]) -> Alert:
        column, said, layer = where
        return Alert(
            kind="non-finite",
            severity="critical",
            step=step,
            since=min(self._bad.values()),
            text=f"{said} {layer} is the first that is not finite.",
            advice=ADVICE,
            evidence={column: math.nan},
            causes=(Cause.NON_FINITE,),
            where=(layer,),
        )


def _first(values: Mapping[str, float | None]) -> tuple[str, str, str] | None:
    """Column, what it is of, and layer of the first entry that is not finite (zero has a logarithm: -inf)."""
    for prefix, said in LAYERS.items():
        columns = [name for name in values if name.startswith(prefix)]
        if prefix != "activation/log_rms/":
            columns.reverse()  # gradients are made from the last layer to the first
        for name in columns:
            value = values[name]
            if value is not None and not math.isfinite(value) and value != -math.inf:
                return name, said, name.removeprefix(prefix)
    return None
