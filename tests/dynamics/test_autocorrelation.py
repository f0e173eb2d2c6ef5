"""Autocorrelation of gradients on models whose answer is known: noise, attenuation, moving parameters, epochs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dyntune.dynamics.autocorrelation import GradientAutocorrelation, lag_one_expectation
from dyntune.dynamics.momentum import moment_cosine, moment_products
from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from dyntune.numerics.sketch import CountSketch
from dyntune.records import Status


def recorded(gradients, *, halves=None, steps=None, sketched=False, **options):
    """All steps recorded; halves: (first, second) per step."""
    recorder = GradientAutocorrelation(sketched=sketched, **options)
    for i, gradient in enumerate(gradients):
        parts = None if halves is None else tuple(torch.as_tensor(h) for h in halves[i])
        recorder.update(torch.as_tensor(gradient), step=i if steps is None else steps[i], halves=parts)
    return recorder.read()


def noisy(rng, *, count, dimension, ratio):
    """Halves of `count` batches about one mean gradient of length 1, with tr Sigma / B = ratio."""
    mean = np.zeros(dimension)
    mean[0] = 1.0
    return [mean + rng.standard_normal((2, dimension)) * math.sqrt(2 * ratio / dimension) for _ in range(count)]


def test_products_are_those_of_the_gradients():
    g = np.random.default_rng(0).standard_normal((30, 5))
    found = recorded(g, lags=3)
    for lag in (1, 2, 3):
        pairs = [(g[t] @ g[t - lag], (g[t] @ g[t] + g[t - lag] @ g[t - lag]) / 2) for t in range(lag, 30)]
        # stretches of eight pairs, each scaled by its own mean squared length of the later gradient
        count = len(pairs) // 8
        cuts = [slice(8 * i, 8 * i + 8 if i < count - 1 else None) for i in range(count)]
        scale = [sum(g[t] @ g[t] for t in list(range(lag, 30))[cut]) for cut in cuts]
        top, bottom = ([sum(p[j] for p in pairs[cut]) / s for cut, s in zip(cuts, scale, strict=True)] for j in (0, 1))
        assert found.raw[lag - 1].value == pytest.approx(sum(top) / sum(bottom), rel=1e-12)


def test_gaps_end_a_burst():
    g = np.random.default_rng(1).standard_normal((8, 3))
    steps = [0, 1, 2, 10, 11, 20, 22, 23]
    found = recorded(g, lags=2, steps=steps)
    assert found.num_bursts == 4
    assert ", 4 pairs in 3 units" in found.raw[0].method
    assert ", 1 pairs in 1 units" in found.raw[1].method
    assert found.raw[1].value == pytest.approx(2 * g[2] @ g[0] / (g[2] @ g[2] + g[0] @ g[0]))
    assert found.raw[1].status is Status.UNCERTAIN
    assert math.isinf(found.raw[1].high)
    assert recorded(g[:2], lags=2).raw[1].status is Status.REFUSED


@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_noise_attenuates_and_the_correction_undoes_it(ratio):
    halves = noisy(np.random.default_rng(2), count=400, dimension=500, ratio=ratio)
    found = recorded([h.mean(0) for h in halves], halves=halves, lags=2, batch_size=64)
    for raw, corrected in zip(found.raw, found.corrected, strict=True):
        # half a width is two standard errors: intervals of 95%, doubled
        assert abs(raw.value - 1 / (1 + ratio)) < 2 * max(raw.high - raw.value, raw.value - raw.low)
        assert abs(corrected.value - 1) < 2 * max(corrected.high - corrected.value, corrected.value - corrected.low)
        assert corrected.high - corrected.low < 0.5
    noise = found.noise_to_signal
    assert abs(noise.value - ratio) < 2 * max(noise.high - noise.value, noise.value - noise.low)


def test_the_corrected_interval_covers():
    held = 0
    rng = np.random.default_rng(3)
    for _ in range(200):
        halves = noisy(rng, count=81, dimension=200, ratio=1.0)
        lag = recorded([h.mean(0) for h in halves], halves=halves, lags=1).corrected[0]
        held += lag.low <= 1 <= lag.high
    # 190 of 200 expected, standard deviation 3.1; neighbouring stretches share a step, which costs a little
    assert held > 190 - 4 * 3.1


def test_too_much_noise_is_not_identifiable():
    """U is 1 give or take 2 * 100 / sqrt(500) per step, 1.2 in the mean of 60: seldom twice its own error."""
    rng, refused, held = np.random.default_rng(4), 0, 0
    for _ in range(60):
        halves = noisy(rng, count=60, dimension=500, ratio=100.0)
        found = recorded([h.mean(0) for h in halves], halves=halves, lags=1)
        lag = found.corrected[0]
        refused += lag.reason.startswith("not identifiable") and lag.status is Status.REFUSED
        held += lag.low <= 1 <= lag.high
        assert found.raw[0].value is not None
    assert refused > 40  # a normal number of mean 0.83 exceeds 2 in 12%: 7 of 60 expected, deviation 2.5
    assert held >= 50  # a refusal leaves everything possible; 57 expected


def test_sketches_see_what_gradients_do():
    rng, sketch = np.random.default_rng(5), CountSketch(1024, seed=0)
    halves = [h.astype(np.float32) for h in noisy(rng, count=120, dimension=20_000, ratio=1.0)]
    drawn = [[sketch([torch.from_numpy(x)], ["w"]) for x in h] for h in halves]
    found = recorded([(a + b) / 2 for a, b in drawn], halves=drawn, lags=2, sketched=True)
    exact = recorded([h.mean(0) for h in halves], halves=halves, lags=2)
    for sketched, truth in zip(found.raw, exact.raw, strict=True):
        # 3 / sqrt(1024): errors of sketches of many gradients partly average out
        assert abs(sketched.value - truth.value) < 0.09
    assert abs(found.corrected[0].value - 1) < 0.2
    assert found.raw[0].high - found.raw[0].low > exact.raw[0].high - exact.raw[0].low


def test_two_terms_of_moving_parameters():
    """Noisy SGD on a quadratic from one point, many times: <g_1, g_0> is |G|^2 - lr (G.HG + tr(H Sigma) / B)."""
    rng, lr, draws = np.random.default_rng(6), 0.4, 40_000
    curvature = np.array([2.0, 1.0, 0.1])
    deviation = np.array([0.5, 1.0, 2.0])  # of a batch, per coordinate
    start = np.array([1.0, -1.0, 3.0])
    first = curvature * start + deviation * rng.standard_normal((draws, 3))
    second = curvature * (start - lr * first) + deviation * rng.standard_normal((draws, 3))
    products = (first * second).sum(1)
    gradient = curvature * start
    expected = lag_one_expectation(
        signal=gradient @ gradient,
        signal_curvature=gradient @ (curvature * gradient),
        noise_curvature=float(curvature @ deviation**2),
        lr=lr,
    )
    assert abs(products.mean() - expected) < 4 * products.std() / math.sqrt(draws)
    without = lag_one_expectation(
        signal=gradient @ gradient, signal_curvature=gradient @ (curvature * gradient), noise_curvature=0.0, lr=lr
    )
    assert abs(products.mean() - without) > 20 * products.std() / math.sqrt(draws)


def epochs(rng, rows, batch, count):
    """Halves of batches, shuffled without replacement, with the number of their epoch."""
    for epoch in range(count):
        order = rng.permutation(len(rows))
        for i in range(0, len(rows), batch):
            chosen = rows[order[i : i + batch]]
            yield epoch, np.stack([chosen[: batch // 2].mean(0), chosen[batch // 2 :].mean(0)])


def test_epochs_without_replacement_are_corrected():
    """Frozen parameters, N = 32, B = 8: noise of two batches of an epoch has correlation -8 / 24."""
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((32, 50))
    rows += 0.15 - rows.mean(0)  # |G|^2 = 1.125, tr Sigma / B about 6
    with_it, without = (GradientAutocorrelation(lags=1, sketched=False, **o) for o in OPTIONS)
    for step, (epoch, halves) in enumerate(epochs(rng, rows, 8, 400)):
        parts = tuple(torch.from_numpy(h) for h in halves)
        for recorder in (with_it, without):
            recorder.update(torch.from_numpy(halves.mean(0)), step=step, halves=parts, epoch=epoch)
    corrected, plain = with_it.read().corrected[0], without.read()
    assert abs(corrected.value - 1) < 2 * (corrected.high - corrected.value)
    assert corrected.high - corrected.low < 0.2
    # Left alone, U is off by -tr Sigma / N like the products within an epoch, of which there are three in four.
    trace = rows.var(axis=0, ddof=1).sum()
    signal = 50 * 0.15**2
    raw = plain.raw[0]
    noise = trace * (1 / 8 - 1 / 32)
    # 3 of 4 pairs lie in one epoch
    expected = (signal - 0.75 * noise * 8 / 24) / (signal + noise)
    assert abs(raw.value - expected) < 2 * (raw.high - raw.value)
    assert raw.high < signal / (signal + noise)
    assert plain.corrected[0].value is None or not plain.corrected[0].low <= 1 <= plain.corrected[0].high


OPTIONS = ({"batch_size": 8, "population": 32}, {"batch_size": 8})


@pytest.mark.parametrize("x", [1.95, 2.0, 2.05])
def test_full_batch_descent_on_a_parabola(x):
    g = [np.array([(1 - x) ** t, 0.0]) for t in range(60)]
    found = recorded(g, lags=2)
    assert found.raw[0].value == pytest.approx(-1, abs=2 * abs(abs(1 - x) - 1) ** 2 + 1e-12)  # -2a / (1 + a^2)
    assert found.raw[1].value == pytest.approx(1, abs=(2 * abs(abs(1 - x) - 1)) ** 2 + 1e-12)
    assert found.amplitude.value == pytest.approx((1 - x) ** 2, rel=1e-12)
    assert found.amplitude.high - found.amplitude.low < 1e-6
    assert found.best == found.raw


def test_scale_does_not_matter():
    g = np.random.default_rng(8).standard_normal((40, 4))
    one, other = recorded(g, lags=2), recorded(1e-12 * g, lags=2)
    assert other.raw[0].value == pytest.approx(one.raw[0].value, rel=1e-9)
    assert other.amplitude.high == pytest.approx(one.amplitude.high, rel=1e-9)


def test_white_noise_beside_the_moment_of_before():
    """cos(g_t, m_{t-1}) is 0; with the moment of after the step it would be sqrt(1 - beta1^2)."""
    generator = torch.Generator().manual_seed(0)
    moment, beta, n = torch.zeros(100_000), 0.9, 100_000
    for _ in range(60):  # 0.9^60 = 0.002 of the start is left
        gradient = torch.randn(n, generator=generator)
        before, moment = moment, beta * moment + (1 - beta) * gradient
    assert abs(float(moment_cosine(moment_products([gradient], [before])))) < 4 / math.sqrt(n)
    assert float(moment_cosine(moment_products([gradient], [moment]))) == pytest.approx(0.436, abs=4 / math.sqrt(n))


def test_moment_products_of_shards_add_up():
    g, m = torch.randn(2, 3_000, generator=torch.Generator().manual_seed(1))
    whole = moment_products([g], [m])
    assert whole.tolist() == pytest.approx(
        [float(g.double() @ m.double()), float(g.double() @ g.double()), float(m.double() @ m.double())],
        rel=1e-5,
        abs=1e-3,
    )
    assert (moment_products([g[:7]], [m[:7]]) + moment_products([g[7:]], [m[7:]])).tolist() == pytest.approx(
        whole.tolist(), rel=1e-5
    )


def test_broken_gradients_are_refused():
    g = np.ones((20, 2))
    g[5, 0] = math.nan
    assert "NaN" in recorded(g, lags=1).raw[0].reason
    assert "zero" in recorded(np.zeros((20, 2)), lags=1).raw[0].reason


def test_bad_arguments_are_named():
    with pytest.raises(InvalidArgumentError, match="lags=0"):
        GradientAutocorrelation(lags=0)
    with pytest.raises(InvalidArgumentError, match="population=10 with batch_size=None"):
        GradientAutocorrelation(population=10)
    with pytest.raises(InvalidArgumentError, match="no step"):
        GradientAutocorrelation().read()
    recorder = GradientAutocorrelation()
    recorder.update(torch.ones(3), step=5)
    with pytest.raises(InvalidArgumentError, match="step=5 after step 5"):
        recorder.update(torch.ones(3), step=5)
    with pytest.raises(ShapeMismatchError, match="one width"):
        recorder.update(torch.ones(4), step=6)
    with pytest.raises(ShapeMismatchError, match="1 gradients and 0 moments"):
        moment_products([torch.ones(1)], [])


def test_nothing_above_one_is_given():
    """Noise of thirty times the signal over nine steps: the ratio often comes out far above 1."""
    found = [
        recorded(np.mean(halves, axis=1), halves=halves, lags=1, steps=None).corrected[0]
        for halves in (noisy(np.random.default_rng(s), count=9, dimension=50, ratio=30.0) for s in range(60))
    ]
    known = [f for f in found if f.value is not None]
    assert 0 < len(known) < 60
    assert max(f.value for f in known) == 1.0  # where it was cut
    assert all(f.low <= f.value <= f.high for f in known)
    assert all(f.high == 1.0 for f in known if f.value == 1.0)
    assert any(f.reason.endswith("cannot be above 1") or "not identifiable" in f.reason for f in found)
