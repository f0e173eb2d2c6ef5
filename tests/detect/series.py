"""Series with known properties, and runs made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from dyntune.monitor.alerts import Alert, Detector
from dyntune.monitor.rows import Row, Rows, Table

Array = npt.NDArray[np.float64]


def gaussian(n: int, rng: np.random.Generator) -> Array:
    return rng.standard_normal(n)


def student(n: int, rng: np.random.Generator) -> Array:
    """t with 4 degrees of freedom, as heavy as losses of small batches."""
    return rng.standard_t(4, n)


def correlated(n: int, rng: np.random.Generator) -> Array:
    """AR(1) with 0.9, of unit variance."""
    return np.asarray(lfilter([np.sqrt(1 - 0.81)], [1.0, -0.9], rng.standard_normal(n)))


def correlated_student(n: int, rng: np.random.Generator) -> Array:
    """AR(1) with 0.9 and innovations of Student's t with 4 degrees of freedom."""
    return np.asarray(lfilter([np.sqrt(1 - 0.81)], [1.0, -0.9], rng.standard_t(4, n)))


def trending(n: int, rng: np.random.Generator) -> Array:
    """Heavy tails around a level that falls fast and then slowly; in units of the noise."""
    return rng.standard_t(4, n) - 3.0 * np.log1p(np.arange(n) / 300.0)


NOISE = {f.__name__: f for f in (gaussian, student, correlated, correlated_student, trending)}


def rows_of(columns: Mapping[str, Any], *, first: int = 0, pieces: int | None = None) -> list[Rows]:
    """Columns over consecutive steps as rows, in pieces of so many."""
    count = len(next(iter(columns.values())))
    table = Table()
    table.extend(first, count, {name: np.asarray(values).tolist() for name, values in columns.items()})
    rows = table.rows()
    if pieces is None:
        return [rows]
    places = np.arange(count)
    return [rows.where((places >= at) & (places < at + pieces)) for at in range(0, count, pieces)]


def alarms(detectors: Sequence[Detector], rows: Iterable[Rows]) -> list[Alert]:
    return [alert for some in rows for detector in detectors for alert in detector.update(some)]


def falling(n: int, rng: np.random.Generator, *, start: float = 2.3, end: float = 0.2, noise: float = 0.1) -> Array:
    """A healthy loss: it falls from `start` towards `end` within some hundred steps."""
    level = end + (start - end) * np.exp(-np.arange(n) / 200.0)
    return np.asarray(level * np.exp(noise * rng.standard_normal(n)))


PIECES = (1, 10, 64, 999)


def run_of_rows(
    count: int, columns: Mapping[str, Any] | None = None, extra: Iterable[Row] = (), *, first: int = 0
) -> list[Row]:
    """Steps with a loss of 1 (or `columns`), and further rows after the step that they belong to, as a monitor has."""
    found = {name: np.broadcast_to(np.asarray(values, dtype=float), count) for name, values in (columns or {}).items()}
    found = {"train/loss": np.ones(count)} | found
    rows = [
        Row(step=first + i, values={name: float(values[i]) for name, values in found.items()}) for i in range(count)
    ]
    return sorted([*rows, *extra], key=lambda row: row.step)  # stable: after the step itself


def told_of(make: Callable[[], Detector | Sequence[Detector]], rows: Sequence[Row]) -> list[Alert]:
    """Alarms, which are the same however the rows are cut."""

    def found(size: int) -> list[Alert]:
        made = make()
        detectors = made if isinstance(made, Sequence) else [made]
        pieces = [Rows.of(rows[at : at + size]) for at in range(0, len(rows), size)]
        return sorted(alarms(detectors, pieces), key=lambda alert: (alert.step, repr(alert)))

    whole = found(max(len(rows), 1))
    for size in PIECES:
        assert list(map(repr, found(size))) == list(map(repr, whole)), f"in pieces of {size}"  # of NaN as well
    return whole


def hostile(columns: Sequence[str], labels: Mapping[str, str] | None = None) -> dict[str, list[Row]]:
    """Runs that are not as they should be, by name: numbers of these columns that make no sense."""
    count = 400
    rng = np.random.default_rng(0)
    texts = dict(labels or {})

    def every(value: float | None, *, loss: float | None = 1.0, first: int = 0) -> list[Row]:
        numbers = dict.fromkeys(columns, value)
        return [
            Row(step=first + i, values={"train/loss": loss} | numbers, labels=texts if i % 40 == 3 else {})
            for i in range(count)
        ]

    wild = [
        Row(
            step=i,
            values={n: float(rng.choice([math.nan, math.inf, -math.inf, 0.0])) for n in ("train/loss", *columns)},
            labels=texts if i % 40 == 3 else {},
        )
        for i in range(count)
    ]
    return {
        "nan": every(math.nan),
        "infinite": every(math.inf),
        "minus infinite": every(-math.inf),
        "zero": every(0.0),
        "refused": every(None),
        "loss is nan": every(math.nan, loss=math.nan),
        "loss is infinite": every(math.nan, loss=math.inf),
        "loss is zero": every(math.nan, loss=0.0),
        "loss is negative": every(math.nan, loss=-1.0),
        "wild": wild,
        "without columns": [Row(step=i, values={"other": 1.0}) for i in range(count)],
        "without numbers": [Row(step=i, values={}) for i in range(count)],
        "resumed": every(math.nan, first=5000),
        "without rows": [],
    }
