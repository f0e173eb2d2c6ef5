"""The memory of a series: AR(1) whose time is known, coverage of the interval, and what has to be refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from dyntune.dynamics.memory import _independent, memory_of
from dyntune.errors import InvalidArgumentError, NonFiniteError, ShapeMismatchError
from dyntune.numerics.series import integrated_time
from dyntune.records import Status


def ar1(tau: float, count: int, rng: np.random.Generator, rows: int = 1) -> np.ndarray:
    """Stationary AR(1) of variance 1 with integrated time tau = (1 + a) / (1 - a)."""
    a = (tau - 1) / (tau + 1)
    noise = rng.standard_normal((rows, count))
    noise[:, 1:] *= math.sqrt(1 - a * a)
    return lfilter([1.0], [1.0, -a], noise)


@pytest.mark.parametrize("tau", [1, 3, 10, 50, 200])
def test_known_times_of_many_rows(tau: int) -> None:
    found = memory_of(ar1(tau, 1000 * tau, np.random.default_rng(1), rows=16 if tau < 200 else 4))
    assert found.time.status is Status.OK
    assert found.error is not None
    # The window leaves out exp(-5); an error of one row is halved at least by four.
    assert found.time.value == pytest.approx(tau, abs=2 * found.error / 2 + 0.01 * tau)
    assert found.lag_one.value == pytest.approx((tau - 1) / (tau + 1), abs=0.02)
    assert found.correlation[0] == 1.0
    assert len(found.correlation) >= 5 * tau * 0.8


@pytest.mark.slow
def test_coverage() -> None:
    """The figures of the docstring: run with -rP to read them."""
    answered = held = lag = draws = 0
    for length in (100, 1000):
        answered = held = 0
        for tau in (1, 3, 10, 50, 200):
            rng = np.random.default_rng(0)
            count = max(length * tau, 200)
            for _ in range(200 if count < 30_000 else 100):
                found = memory_of(ar1(tau, count, rng)[0])
                draws += 1
                lag += (tau - 1) / (tau + 1) in found.lag_one
                if found.time.value is not None:
                    answered += 1
                    held += tau in found.time
        print(f"{length} tau: {held} of {answered} answered")  # noqa: T201
        # 95% of about 900, four standard errors below; above, an interval that always holds is not one either
        assert 0.92 < held / answered < 0.995
    print(f"lag 1: {lag} of {draws}")  # noqa: T201
    assert lag / draws > 0.93


def test_error_is_sokals() -> None:
    x = ar1(5, 4000, np.random.default_rng(2))
    found, plain = memory_of(x), integrated_time(x)
    assert plain.value is not None
    assert found.error == pytest.approx((plain.high - plain.low) / 2 / 1.959964, rel=1e-12)


def test_noise_of_single_values_is_no_forgetting() -> None:
    """Two noisy readings of one AR(1): the time is its own, and without the second one far too short."""
    rng = np.random.default_rng(3)
    x = ar1(20, 20_000, rng, rows=8)
    one, two = (x + 3 * rng.standard_normal(x.shape) for _ in range(2))
    found = memory_of(one, again=two)
    assert found.error is not None
    assert found.time.value == pytest.approx(20, abs=2 * found.error)
    plain = memory_of((one + two) / 2).time.value
    assert plain is not None
    assert plain < 10  # 1 + 19 / (1 + 9 / 2) = 4.5


def test_noise_alone_is_no_memory() -> None:
    one, two = np.random.default_rng(4).standard_normal((2, 8, 2000))
    found = memory_of(one, again=two)
    assert found.time.value is None
    assert "no more than its noise" in found.time.reason


def test_random_walks_are_refused() -> None:
    rng = np.random.default_rng(5)
    found = [memory_of(rng.standard_normal(n).cumsum()).time for n in (200, 1000, 5000) for _ in range(20)]
    assert [f for f in found if f.value is not None] == []


@pytest.mark.parametrize("shape", [np.arange(1000.0), np.arange(1000.0) ** 2, np.exp(-np.arange(1000) / 200.0)])
def test_pure_trends_are_refused(shape: np.ndarray) -> None:
    for scale in (1e-12, 1.0, 1e12):
        found = memory_of(scale * shape)
        assert found.time.value is None
        assert found.error is None
        assert found.lag_one.status is Status.UNCERTAIN


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_a_trend_that_would_pass_for_memory_is_refused(share: float) -> None:
    """Long enough for Sokal's demand, and twice or ten times too long: only taking the trend off shows it."""
    noise = np.random.default_rng(6).standard_normal(5000)
    drift = np.linspace(-1, 1, 5000) * math.sqrt(3 * share / (1 - share))
    assert integrated_time(noise + drift).value is not None
    assert "trend makes up the difference" in memory_of(noise + drift).time.reason


def test_stationary_series_are_rarely_taken_for_trends() -> None:
    rng = np.random.default_rng(7)
    refused = sum(memory_of(ar1(10, 1000, rng)).time.value is None for _ in range(100))
    assert refused <= 15  # 12 of 200 in the coverage test; 15 is four standard errors above 6%


def test_white_noise_remembers_one_step() -> None:
    found = memory_of(np.random.default_rng(8).standard_normal(100_000))
    assert found.time.value == pytest.approx(1.0, abs=0.03)  # error sqrt(2 * 11 / N) = 0.015
    assert 0.0 in found.lag_one


def test_a_series_of_period_two_shows_in_lag_one() -> None:
    x = np.resize([1.0, -1.0], 1000) + 0.1 * np.random.default_rng(9).standard_normal(1000)
    found = memory_of(x)
    assert found.time.value is None
    assert "alternates" in found.time.reason
    assert found.lag_one.value == pytest.approx(-0.99, abs=0.005)  # -1 / (1 + 0.01)
    assert found.lag_one.status is Status.OK


def test_constants_and_bad_values() -> None:
    assert "does not vary" in memory_of(np.full(100, 3.0)).time.reason
    assert memory_of(np.full(100, 3.0)).correlation == ()
    with pytest.raises(NonFiniteError):
        memory_of([1.0, math.nan, 2.0])
    with pytest.raises(NonFiniteError):
        memory_of([1.0, 2.0, 2.0], again=[1.0, math.nan, 2.0])
    with pytest.raises(InvalidArgumentError):
        memory_of([1.0])
    with pytest.raises(ShapeMismatchError):
        memory_of([1.0, 2.0, 3.0], again=[1.0, 2.0])


def test_scale_and_level_do_not_matter() -> None:
    x = ar1(5, 3000, np.random.default_rng(10))
    one, other = memory_of(x), memory_of(1e-9 * (x + 100))
    assert other.time.value == pytest.approx(one.time.value, rel=1e-9)


def test_a_short_series_that_bounces_has_no_negative_time() -> None:
    """Its lags may sum to less than -1/2 by chance, while the error is too large to call it alternating."""
    found = [memory_of(-np.cos(np.pi * np.arange(n)) + 0.3 * np.random.default_rng(n).standard_normal(n)).time
             for n in range(6, 60)]  # fmt: skip
    assert all(t.value is None or t.low <= t.value for t in found)
    assert sum(t.value is None and "alternates" in t.reason for t in found) > 20


def test_rows_count_as_they_are_independent() -> None:
    """One row and its copies are one; independent ones nearly their number, and both ways of summing agree."""
    rng = np.random.default_rng(8)
    x = ar1(5, 4000, rng, rows=8)
    assert memory_of(np.repeat(x[:1], 8, axis=0)).independent == pytest.approx(1.0)
    assert 7 < memory_of(x).independent <= 8  # correlations of 800 independent values are 0.035 each
    few, many = x[:, :9], x[:, :7]  # fewer rows than values, and more
    for part in (few, many):
        centred = part - part.mean(axis=1, keepdims=True)
        s = centred @ centred.T
        assert _independent(part, part) == pytest.approx(np.trace(s) ** 2 / (s**2).sum())
    found = memory_of(x)
    assert found.time.value is not None
    assert found.time.value < found.highest < found.time.high
    assert memory_of(x[:1]).highest == pytest.approx(memory_of(x[:1]).time.high)
    assert memory_of(rng.standard_normal(50).cumsum()).highest == math.inf
