r"""How long a series of training remembers, or why it cannot be told.

    tau = 1 + 2 (rho_1 + rho_2 + ...)

:func:`dyntune.numerics.series.integrated_time` sums up to Sokal's window and refuses what is too short. Training adds
two difficulties. A slow drift is no memory, and yet makes one: noise of which a share s of the variance is a trend has
``rho_k -> s``, and within a window of five tau sums to ``1 / (1 - 10 s)``, so that a trend of a twentieth of the
variance passes for twice the memory and is not refused for being short. And values carry noise of their own, which
shrinks every lag but lag 0; where the same thing is measured twice with independent noise, its covariance takes the
place of lag 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dyntune.errors import ShapeMismatchError
from dyntune.numerics.series import TOLERANCE, WINDOW, autocorrelation
from dyntune.records import Estimate, Status

__all__ = ["Memory", "memory_of"]

Floats: TypeAlias = npt.NDArray[np.float64]

LEVEL = 0.95
NORMAL = 1.959964  # of the two-sided 95% interval
# A line and a parabola are what a drift looks like over a stretch that is short for it; each one more takes off
# memory that is real, by 10 tau / N of it.
TREND_DEGREE = 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What :func:`memory_of` found.

    Args:
        time: Integrated autocorrelation time, in steps; refused with its reason where the series does not say.
        error: Standard error of `time` by Sokal's formula, in steps; None where it is refused.
        lag_one: Autocorrelation at lag 1; negative where the series alternates, which `time` does not show.
        correlation: Autocorrelation at lags 0, 1, ... up to the window's end; empty where the series does not vary.
        independent: How many independent rows the rows speak for: their number over 1 + the sum of their squared
            correlations, so 1 where all move together. Noise and short series make it come out too small.
    """

    time: Estimate
    error: float | None
    lag_one: Estimate
    correlation: tuple[float, ...]
    independent: float = 1.0

    @property
    def highest(self) -> float:
        """Upper end of the 95% interval of `time` that counts rows as they are independent; infinite if refused."""
        if self.time.value is None:
            return math.inf
        return float(self.time.value * (self.time.high / self.time.value) ** (1 / math.sqrt(self.independent)))


def memory_of(series: npt.ArrayLike, *, again: npt.ArrayLike | None = None) -> Memory:
    """Autocorrelation time of a series, or of several rows whose autocorrelations are averaged.

    Refused: a series that does not vary; one shorter than 50 tau, as random walks and trends are at any length; one
    whose tau changes by more than its 95% error when a line and a parabola are taken off; one that alternates.

    Args:
        series: Shape (N,), or (rows, N), evenly spaced.
        again: The same once more with independent noise, such as means over odd and over even steps; same shape. The
            noise of single values then does not count as forgetting.

    Returns:
        Time in steps of the series. Its interval is ``tau exp(+-1.96 error / tau)``, since times are skewed to the
        right; the error is Sokal's, ``tau^2 2 (2 M + 1) / N``, as if the rows were one: they need not be independent.

    Raises:
        InvalidArgumentError: Fewer than two values.
        ShapeMismatchError: `again` has another shape.
        NonFiniteError: A value is NaN or infinite.

    Accuracy:
        Of AR(1) series with tau from 1 to 200, the interval held the truth in 884 of 915 that were 100 tau long (85
        more were refused), and in 784 of 796 that were 1000 tau long; that of lag 1 in 1726 of 1800
        (``pytest -rP -k coverage tests/dynamics/test_memory.py``). Random walks were refused, 300 of 300.
    Cost:
        O(rows N log N), twice.
    Assumes:
        a stationary series; a drift that neither a parabola nor the length gives away is not seen.
    Source:
        Sokal (1997), "Monte Carlo methods in statistical mechanics", section 3 (window, error); Wolff (2004),
        arXiv:hep-lat/0306017 (the bias of the mean that is taken off, corrected here); Bartlett (1946), Suppl. J. R.
        Stat. Soc. 8 (error of lag 1).

    Example:
        >>> noise = np.random.default_rng(0).standard_normal(2000)
        >>> found = memory_of(noise)
        >>> bool(1.0 in found.time), bool(0.0 in found.lag_one)
        (True, True)
        >>> memory_of(np.cumsum(noise)).time.status.name
        'REFUSED'
    """
    rows = np.atleast_2d(np.asarray(series, dtype=np.float64))
    other = None if again is None else np.atleast_2d(np.asarray(again, dtype=np.float64))
    if other is not None and other.shape != rows.shape:
        raise ShapeMismatchError(f"again has shape {other.shape}, the series {rows.shape}: both measure the same.")
    rho = _correlation(rows, other)
    count = rows.shape[1]
    if not math.isfinite(rho[0]):
        reason = "the series does not vary" if other is None else "the series varies by no more than its noise"
        return Memory(time=_refused(reason), error=None, lag_one=_refused(reason, "1"), correlation=())
    tau, last = _windowed(rho)
    error = tau * math.sqrt(2 * (2 * last + 1) / count)
    steady = _unsteady(rows, other, rho)
    time = _refused(steady) if steady else _time(tau, error, last, count)
    return Memory(
        time=time,
        error=None if time.value is None else error,
        lag_one=_lag_one(rho, last, steady),
        correlation=tuple(rho[: last + 1].tolist()),
        independent=_independent(rows, rows if other is None else other),
    )


def _correlation(rows: Floats, other: Floats | None) -> Floats:
    """Autocorrelation at all lags; lag 0 is 1, the others are over the covariance with `other` where there is one."""
    if other is None:
        return autocorrelation(rows)
    autocorrelation(other, max_lag=0)  # checks its values
    middle = (rows + other) / 2
    rho = autocorrelation(middle)
    if not math.isfinite(rho[0]):
        return rho
    centred = middle - middle.mean(axis=1, keepdims=True)
    # Sums over rows before the division: a single row's covariance may be zero or negative. Longest-varying rows count
    # most, which are those that say something.
    count = rows.shape[1]
    size = 1 << (2 * count - 1).bit_length()
    power = (np.abs(np.fft.rfft(centred, size, axis=1)) ** 2).sum(axis=0)
    sums = np.fft.irfft(power, size)[:count]
    product = ((rows - rows.mean(axis=1, keepdims=True)) * (other - other.mean(axis=1, keepdims=True))).sum(axis=0)
    shared = float(product.sum())
    # Against independent noise the sum is zero, give or take its own spread over time.
    if shared <= NORMAL * float(np.sqrt((product**2).sum())):
        return np.full(count, np.nan)
    found: Floats = np.concatenate([[1.0], sums[1:] / shared])
    return found


def _independent(rows: Floats, other: Floats) -> float:
    """(tr S)^2 / |S|_F^2 of the rows' covariance S with the other measurement, whose noise is another."""
    one, two = (x - x.mean(axis=1, keepdims=True) for x in (rows, other))
    if len(rows) < rows.shape[1]:  # the smaller of the two matrices that say it
        squares = float(((one @ two.T) ** 2).sum())
    else:
        squares = float(((one.T @ one) * (two.T @ two)).sum())
    found = float((one * two).sum()) ** 2 / squares if squares > 0 else 1.0
    return min(max(found, 1.0), float(len(rows)))


def _windowed(rho: Floats) -> tuple[float, int]:
    """Sum up to the first lag of at least five times itself, and that lag."""
    sums = 2 * np.cumsum(rho) - 1
    ended = np.arange(len(rho)) >= WINDOW * sums
    last = int(np.argmax(ended)) if ended.any() else len(rho) - 1
    return float(sums[last]), last


def _unsteady(rows: Floats, other: Floats | None, rho: Floats) -> str:
    """Why the series is not stationary, or too short to tell; empty where nothing speaks against it."""
    count = rows.shape[1]
    tau, last = _windowed(rho)
    memory = _corrected(tau, last, count)
    if count < TOLERANCE * memory:
        return (
            f"{count} values are fewer than {TOLERANCE:g} times the {memory:.3g} steps that they seem to remember: a "
            f"trend, a random walk, or too short a series. Measure {math.ceil(TOLERANCE * memory)} steps or more"
        )
    without = _correlation(_flattened(rows), None if other is None else _flattened(other))
    if not math.isfinite(without[0]):
        return "nothing is left of the series when a parabola is taken off: it is a trend"
    rest, end = _windowed(without)
    if tau - rest > NORMAL * max(rest, 1.0) * math.sqrt(2 * (2 * end + 1) / count):
        return (
            f"the series seems to remember {tau:.3g} steps, and {rest:.3g} when a parabola is taken off: a trend makes "
            "up the difference. Measure a stretch without one, or take it off first (detrended)"
        )
    return ""


def _corrected(tau: float, last: int, count: int) -> float:
    """Taking off the sample mean lowers each lag by tau / N, and there are 2 M + 1 of them."""
    return tau * (1 + (2 * last + 1) / count)


def _flattened(rows: Floats) -> Floats:
    """Rows without their line and parabola."""
    count = rows.shape[1]
    places = np.linspace(-1, 1, count)
    basis = np.linalg.qr(np.stack([places**k for k in range(min(TREND_DEGREE + 1, count))], axis=1))[0]
    flat: Floats = rows - (rows @ basis) @ basis.T
    return flat


def _time(tau: float, error: float, last: int, count: int) -> Estimate:
    relative = math.sqrt(2 * (2 * last + 1) / count)
    # In white noise the sum is 1 give or take this; of a short series it may come out below zero all the same, which is
    # no time.
    if tau + NORMAL * relative < 1 or tau <= 0:
        return _refused(
            f"the series alternates: its lags sum to {(tau - 1) / 2:.2f} before the window ends. Lag 1 says by how "
            "much; a mean over it is better than one of independent values"
        )
    value = _corrected(tau, last, count)
    factor = math.exp(NORMAL * relative)
    return Estimate(
        value=value,
        low=value / factor,
        high=value * factor,
        level=LEVEL,
        unit="steps",
        method=f"Sokal's window at lag {last} of {count} values, standard error {error:.3g}",
        covers="sampling",
    )


def _lag_one(rho: Floats, last: int, steady: str) -> Estimate:
    """Lag 1 with Bartlett's error: sum over v of (rho_{v+1} + rho_{v-1} - 2 rho_1 rho_v)^2, over N."""
    lags = np.arange(1, max(last, 1) + 1)
    lags = lags[lags + 1 < len(rho)]
    one = float(rho[1])
    spread = rho[lags + 1] + rho[lags - 1] - 2 * one * rho[lags]
    half = NORMAL * math.sqrt(float((spread**2).sum()) / len(rho))
    return Estimate(
        value=one,
        low=one - half,
        high=one + half,
        level=LEVEL,
        unit="1",
        method="autocorrelation at lag 1",
        covers="sampling",
        status=Status.UNCERTAIN if steady else Status.OK,
        reason=steady,
    )


def _refused(reason: str, unit: str = "steps") -> Estimate:
    return Estimate.refused(reason, unit=unit, method="Sokal's window")
