"""Correlograms of gradients and squares: AR(1) with known lags, the band's coverage, rare coordinates, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from dyntune.dynamics.trace import LEAST, Correlogram, correlogram, trace_correlograms
from dyntune.errors import NonFiniteError, ShapeMismatchError
from dyntune.numerics.series import autocorrelation


def ar1(a: float, shape: tuple[int, int], rng: np.random.Generator, shared: float = 0.0) -> np.ndarray:
    """Stationary series of unit variance, a row a step, of which a share of the variance is common to all."""
    noise = math.sqrt(1 - shared) * rng.standard_normal(shape) + math.sqrt(shared) * rng.standard_normal((shape[0], 1))
    noise[0] /= math.sqrt(1 - a * a)
    return lfilter([math.sqrt(1 - a * a)], [1.0, -a], noise, axis=0)


def found(rows: np.ndarray, seed: int = 0) -> Correlogram:
    result = correlogram(rows, seed=seed)
    assert result is not None
    return result


def test_lags_are_those_of_the_definition() -> None:
    rows = ar1(0.7, (120, 5), np.random.default_rng(0))
    result = found(rows)
    centred = rows - rows.mean(axis=0)
    for k in (0, 1, 7, 30):
        by_hand = ((centred[k:] * centred[: len(rows) - k]).sum(axis=0) / (centred**2).sum(axis=0)).mean()
        assert result.values[k] == pytest.approx(by_hand, abs=1e-12)
    assert result.lags == tuple(range(31))
    assert (result.low[0], result.high[0]) == (1.0, 1.0)


def test_the_time_of_ar1_is_in_its_interval() -> None:
    result = found(ar1(0.5, (4000, 4), np.random.default_rng(1)))
    assert 3.0 in result.time  # (1 + a) / (1 - a)
    assert [0.5**k for k in range(5)] == pytest.approx(result.values[:5], abs=0.03)  # 2 sqrt(tau / N / 4) = 0.027


def test_coverage_of_the_band() -> None:
    """95% at lags 1 to 4; short, since the blocks are."""
    rng, inside, count = np.random.default_rng(2), np.zeros(4), 400
    for i in range(count):
        result = found(ar1(0.6, (200, 32), rng, shared=0.5), seed=i)
        inside += [result.low[k] <= 0.6**k <= result.high[k] for k in range(1, 5)]
    print("held", (inside / count).round(3).tolist())  # noqa: T201
    assert (inside / count > 0.8).all()
    assert (inside / count < 0.98).all()


def test_series_that_are_one_have_the_band_of_one() -> None:
    """Forty copies say no more than one; independent ones do, by the root of forty."""
    rng = np.random.default_rng(3)
    one = ar1(0.3, (600, 1), rng)
    copies, apart = found(np.repeat(one, 40, axis=1)), found(ar1(0.3, (600, 40), rng))
    single = found(one)
    width = [np.subtract(r.high, r.low)[1:20] for r in (single, copies, apart)]
    assert width[1] == pytest.approx(width[0], rel=1e-9)
    assert 4 < np.mean(width[0] / width[2]) < 9  # sqrt(40) = 6.3


def test_scales_of_the_series_do_not_matter() -> None:
    rows = ar1(0.4, (200, 6), np.random.default_rng(4))
    scaled = found(rows * 10.0 ** np.arange(-6, 6, 2))
    assert scaled.values == pytest.approx(found(rows).values, abs=1e-12)
    gradient, squared = trace_correlograms(rows * 1e-200)
    again = trace_correlograms(rows)
    assert gradient is not None
    assert squared is not None
    assert squared.values == pytest.approx(again[1].values, abs=1e-9)  # type: ignore[union-attr]


def test_squares_of_a_moving_scale_are_alike_and_gradients_are_not() -> None:
    rng = np.random.default_rng(5)
    scale = np.exp(ar1(0.9, (3000, 1), rng))
    gradient, squared = trace_correlograms(scale * rng.standard_normal((3000, 8)))
    assert gradient is not None
    assert squared is not None
    assert abs(gradient.values[1]) < 0.1
    assert squared.values[1] > 0.2
    assert squared.low[1] > 0


def test_a_bounce_has_a_negative_first_lag() -> None:
    gradient, _ = trace_correlograms(ar1(-0.9, (500, 3), np.random.default_rng(6)))
    assert gradient is not None
    assert gradient.high[1] < 0 < gradient.low[2]


def test_rare_coordinates_are_left_out() -> None:
    rng = np.random.default_rng(7)
    dense = ar1(0.5, (300, 4), rng)
    rare = rng.standard_normal((300, 9)) * (rng.random((300, 9)) < 0.1)
    both = trace_correlograms(np.concatenate([rare, dense], axis=1))
    assert both[0] == trace_correlograms(dense)[0]
    assert trace_correlograms(rare) == (None, None)
    assert trace_correlograms(np.zeros((300, 4))) == (None, None)


def test_what_says_nothing_is_none() -> None:
    assert correlogram(np.ones((100, 3))) is None
    assert correlogram(np.random.default_rng(0).standard_normal((LEAST - 1, 3))) is None
    assert found(np.random.default_rng(0).standard_normal((LEAST, 3))).lags == (0, 1, 2, 3, 4)
    assert trace_correlograms(np.zeros((0, 3))) == (None, None)
    # A series that does not vary beside one that does is left out of the mean.
    rows = np.random.default_rng(1).standard_normal((100, 2))
    rows[:, 1] = 3.0
    assert found(rows).values == pytest.approx(autocorrelation(rows[:, 0], max_lag=25), abs=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ShapeMismatchError):
        correlogram(np.zeros(30))
    with pytest.raises(ShapeMismatchError):
        trace_correlograms(np.zeros((3, 3, 3)))
    rows = np.ones((40, 2))
    for bad in (math.nan, math.inf):
        rows[5, 1] = bad
        with pytest.raises(NonFiniteError):
            correlogram(rows)
