"""Autocorrelation against sums, integrated time against AR(1), trends and alternation refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dyntune.errors import InvalidArgumentError, NonFiniteError
from dyntune.numerics.series import autocorrelation, block_bootstrap, detrended, integrated_time
from dyntune.records import Status


def ar1(coefficient, count, seed=0, rows=None):
    """A stationary series x_t = a x_{t-1} + noise of variance 1."""
    from scipy.signal import lfilter

    rng = np.random.default_rng(seed)
    shape = (count,) if rows is None else (rows, count)
    noise = rng.standard_normal(shape)
    noise[..., 1:] *= math.sqrt(1 - coefficient**2)
    return lfilter([1.0], [1.0, -coefficient], noise, axis=-1)


def test_fft_equals_the_sums():
    x = ar1(0.7, 37)
    y = x - x.mean()
    direct = [float(y[k:] @ y[: len(y) - k]) / float(y @ y) for k in range(37)]
    assert autocorrelation(x) == pytest.approx(direct, abs=1e-13)
    assert autocorrelation(100 + 5 * x) == pytest.approx(direct, abs=1e-12)


def test_lags_of_ar1():
    rho = autocorrelation(ar1(0.9, 100_000), max_lag=5)
    # Bartlett: standard error of lag k of AR(1) is below sqrt((1 + a^2) / (1 - a^2) / N) = 0.0098
    assert rho == pytest.approx([0.9**k for k in range(6)], abs=4 * 0.0098)


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.9, 0.97])
def test_integrated_time_of_ar1(coefficient):
    truth = (1 + coefficient) / (1 - coefficient)
    found = integrated_time(ar1(coefficient, 200_000, seed=1))
    assert found.status is Status.OK
    # half the width is 1.96 standard errors; the window leaves out exp(-5) of the sum
    assert abs(found.value - truth) < 2 * (found.high - found.value) + 0.01 * truth


def test_its_interval_covers():
    truth = (1 + 0.8) / (1 - 0.8)
    held = [truth in integrated_time(ar1(0.8, 5000, seed=s)) for s in range(300)]
    # a window that is chosen on the data costs some percent; 3.3 standard errors of 300 draws are 0.05
    assert np.mean(held) > 0.85


def test_rows_are_averaged():
    many = ar1(0.9, 2000, rows=50)
    assert autocorrelation(many) == pytest.approx(np.mean([autocorrelation(row) for row in many], axis=0), abs=1e-12)
    assert integrated_time(many).value == pytest.approx(19, rel=0.15)


def test_a_trend_is_refused_and_found_after_detrending():
    noise = ar1(0.5, 20_000)
    drifting = noise + 20 * np.linspace(0, 1, 20_000) ** 2
    refused = integrated_time(drifting)
    assert refused.value is None
    assert "fewer than 50 times" in refused.reason
    found = integrated_time(detrended(drifting, window=2001))
    assert found.value == pytest.approx(3.0, abs=2 * (found.high - found.value))


def test_a_short_series_is_refused():
    assert integrated_time(ar1(0.99, 2000)).value is None


def test_alternation_is_reported_not_summed():
    rng = np.random.default_rng(0)
    x = np.resize([1.0, -1.0], 1000) + 0.1 * rng.standard_normal(1000)
    assert autocorrelation(x, max_lag=2)[1:] == pytest.approx([-0.99, 0.99], abs=0.01)
    found = integrated_time(x)
    assert found.value is None
    assert "alternates (lag 1 is -0.99)" in found.reason
    assert (found.low, found.high) == (0.0, 1.0)
    assert integrated_time(ar1(-0.5, 5000)).value is None


def test_white_noise_is_seldom_called_alternating():
    refused = [integrated_time(np.random.default_rng(s).standard_normal(500)).value is None for s in range(400)]
    # the normal 97.5% end: 10 of 400 on average, and 20 with probability 0.003
    assert sum(refused) < 20


def test_a_constant_is_refused():
    assert "does not vary" in integrated_time(np.full(100, 0.1)).reason
    assert np.isnan(autocorrelation(np.full(100, 0.1))).all()


@pytest.mark.parametrize("window", [3, 11, 49])
def test_local_lines_are_least_squares(window):
    x = ar1(0.5, 50) + 1e6
    found = detrended(x, window=window)
    for t in (0, 1, 20, 25, 49):
        at = np.arange(max(0, t - window // 2), min(50, t + window // 2 + 1))
        line = np.polynomial.Polynomial.fit(at, x[at], 1)
        assert found[t] == pytest.approx(x[t] - line(t), abs=1e-7)  # of 1e6


def test_differences_of_white_noise_have_lag_one_of_minus_half():
    x = np.random.default_rng(0).standard_normal(20_000)
    assert autocorrelation(detrended(x, method="difference"), max_lag=1)[1] == pytest.approx(-0.5, abs=4 / 141)


def test_block_bootstrap_knows_the_error_of_a_mean():
    tau, count = 9.0, 5000
    errors = [block_bootstrap(ar1(0.8, count, seed=s), block=100).std() for s in range(10)]
    assert np.mean(errors) == pytest.approx(math.sqrt(tau / count), rel=0.1)
    columns = block_bootstrap(np.stack([ar1(0.8, 500), -ar1(0.8, 500)], axis=1), block=20)
    assert columns[:, 0] == pytest.approx(-columns[:, 1])


def test_what_is_no_series_is_said():
    with pytest.raises(NonFiniteError, match="1 values"):
        autocorrelation([1.0, math.nan, 2.0])
    with pytest.raises(InvalidArgumentError, match="two or more"):
        integrated_time([1.0])
    with pytest.raises(InvalidArgumentError, match="max_lag=3"):
        autocorrelation([1.0, 2.0, 4.0], max_lag=3)
    with pytest.raises(InvalidArgumentError, match="window=4"):
        detrended(np.arange(10.0), window=4)
    with pytest.raises(InvalidArgumentError, match="block=11"):
        block_bootstrap(np.arange(10.0), block=11)
