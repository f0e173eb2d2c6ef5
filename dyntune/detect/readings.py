"""The latest numbers of every layer and tensor, by kind: :class:`Readings`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dyntune.monitor.rows import Rows

__all__ = ["Known", "Reading", "Readings"]

KINDS = (
    "grad/log_rms/",
    "update/ratio/",
    "adam/below_eps/",
    "adam/staleness/",
    "units/dead/",
    "activation/log_rms/",
    "attention/entropy/",
)
SINGLE = (
    *("attention/max_logit", "logits/max_abs", "logits/log_z", "logits/entropy"),
    *("grad/autocorr_raw_lag1", "grad/autocorr_raw_lag1.low"),
)


@dataclass(frozen=True)
class Reading:
    """What one row says.

    Args:
        step: Of the row.
        kinds: By prefix, number by layer or tensor.
        single: By column.
    """

    step: int
    kinds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    single: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """The first and the latest measurement of each kind.

    Args:
        first: By prefix or column, the first reading that has it.
        latest: The latest one.
    """

    first: Mapping[str, Reading] = field(default_factory=dict)
    latest: Mapping[str, Reading] = field(default_factory=dict)

    def of(self, kind: str) -> Mapping[str, float]:
        """Latest numbers of a kind, by layer or tensor; empty before there are some."""
        return self.latest[kind].kinds[kind] if kind in self.latest else {}

    def single(self, column: str) -> float:
        """Latest number of a column; NaN before there is one."""
        return self.latest[column].single[column] if column in self.latest else math.nan


class Readings:
    """Keeps the first and the latest measurement of each kind.

    Measurements count once a later step is judged (:meth:`advance`), in whatever portions rows are handed over.

    Attributes:
        known: Of what was advanced to.

    Example:
        >>> from dyntune.monitor.rows import Row
        >>> readings = Readings()
        >>> rows = Rows.of([Row(step=3, values={"units/dead_max": 0.5, "units/dead/1": 0.5})])
        >>> readings.take(rows)
        >>> readings.advance(3), readings.known.of("units/dead/")
        ([], {})
        >>> [reading.step for reading in readings.advance(4)], readings.known.of("units/dead/")
        ([3], {'1': 0.5})
    """

    def __init__(self) -> None:
        self.known = Known()
        self._waiting: list[Reading] = []

    def take(self, rows: Rows) -> None:
        """Measurements among these rows."""
        self._waiting += self._read(rows)

    def advance(self, step: int) -> list[Reading]:
        """What was measured before this step counts from now on; returns what is new."""
        if not self._waiting:
            return []
        new = [reading for reading in self._waiting if reading.step < step]
        self._waiting = [reading for reading in self._waiting if reading.step >= step]
        first, latest = dict(self.known.first), dict(self.known.latest)
        for reading in new:
            for key in (*reading.kinds, *reading.single):
                first.setdefault(key, reading)
                latest[key] = reading
        if new:
            self.known = Known(first, latest)
        return new

    def _read(self, rows: Rows) -> list[Reading]:
        names = rows.names
        wanted = [(name, next(filter(name.startswith, KINDS))) for name in names if name.startswith(KINDS)]
        single = [name for name in SINGLE if name in names]
        found: dict[int, tuple[dict[str, dict[str, float]], dict[str, float]]] = {}
        for name, kind in wanted:
            layer = name.removeprefix(kind)
            for at, value in rows.numbers(name):
                found.setdefault(at, ({}, {}))[0].setdefault(kind, {})[layer] = value
        for name in single:
            for at, value in rows.numbers(name):
                found.setdefault(at, ({}, {}))[1][name] = value
        return [Reading(int(rows.steps[at]), *found[at]) for at in sorted(found)]
