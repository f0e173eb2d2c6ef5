"""What is wrong with training, and who looks for it: :class:`Alert` and :class:`Detector`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from dyntune.dynamics.edge import Regime
from dyntune.monitor.rows import Rows

__all__ = ["Alert", "Detector", "Diverging", "NonFinite", "default_detectors"]


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something is wrong with training.

    Args:
        kind: ``"non-finite"`` or ``"diverging"``.
        severity: ``"critical"``, or ``"warning"``.
        step: Where it was seen.
        text: What.
        advice: What to do.
        evidence: The numbers behind it, by column.
    """

    kind: str
    severity: Literal["critical", "warning"]
    step: int
    text: str
    advice: str
    evidence: Mapping[str, float | str | None] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"step {self.step}, {self.severity}: {self.text} {self.advice}"


class Detector(Protocol):
    """Looks at everything that is recorded, in the order in which it is recorded: some ten steps at a time.

    A recorded run can be looked at in the same way, ``detector.update(run.rows)``. An exception from a detector is one
    of the monitor's: recorded, and after three in a row detectors are off.
    """

    def update(self, rows: Rows) -> Iterable[Alert]:
        """Rows that are new: a sequence of :class:`~dyntune.monitor.rows.Row`, and columns by ``rows.column(name)``."""


class NonFinite:
    """A loss or a gradient that is NaN or infinite; said once, and again after it was finite in between.

    Example:
        >>> from dyntune.monitor.rows import Row
        >>> rows = Rows.of([Row(step=7, values={"train/loss": float("nan")})])
        >>> [a.text for a in NonFinite().update(rows)]
        ['the loss is nan.']
    """

    NAMES: Mapping[str, str] = {"train/loss": "loss", "grad/norm": "length of the gradient"}

    def __init__(self) -> None:
        self._bad: set[str] = set()

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`Detector`."""
        if self._bad or not all(map(rows.all_finite, self.NAMES)):
            for row in rows:
                yield from self._row(row.step, row.values)

    def _row(self, step: int, values: Mapping[str, float | None]) -> Iterable[Alert]:
        for name, said in self.NAMES.items():
            value = values.get(name)
            if value is None:
                continue
            if math.isfinite(value):
                self._bad.discard(name)
            elif name not in self._bad:
                self._bad.add(name)
                yield Alert(
                    kind="non-finite",
                    severity="critical",
                    step=step,
                    text=f"the {said} is {value}.",
                    advice="Go back to a checkpoint from before, lower the learning rate, and look at the data there.",
                    evidence={name: value},
                )


class Diverging:
    """A burst that was classified as diverging; said once for as long as it lasts."""

    def __init__(self) -> None:
        self._on = False

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`Detector`."""
        if "regime" in rows.label_names:
            for row in rows:
                if "regime" in row.labels:
                    yield from self._row(row.step, row.values, row.labels)

    def _row(self, step: int, values: Mapping[str, float | None], labels: Mapping[str, str]) -> Iterable[Alert]:
        on = labels["regime"] == Regime.DIVERGING.name.lower()
        if on and not self._on:
            names = ("grad/autocorr_lag1", "grad/autocorr_lag2", "grad/amplitude", "stability/step_curvature")
            yield Alert(
                kind="diverging",
                severity="critical",
                step=step,
                text=f"training is diverging: {labels.get('regime_reason', '')}.",
                advice="Go back to a checkpoint and lower the learning rate.",
                evidence={name: values[name] for name in names if name in values},
            )
        self._on = on


def default_detectors() -> tuple[Detector, ...]:
    """Those of ``detectors="default"``: none has a threshold whose false-alarm rate would have to be measured."""
    return (NonFinite(), Diverging())
