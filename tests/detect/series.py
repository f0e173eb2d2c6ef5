"""Series with known properties, and runs made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from dyntune.monitor.alerts import Alert, Detector
from dyntune.monitor.rows import Rows, Table

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
