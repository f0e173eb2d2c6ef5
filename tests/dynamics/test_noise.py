"""Noise scale: unbiased terms, exact without replacement, intervals that cover, refused where unknown."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from dyntune.dynamics.noise import noise_scale, noise_terms, noise_terms_of_halves
from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from dyntune.records import Status


def steps(rng, *, count, dimension, ratio, sizes):
    """Signals and noises of steps whose micro-batches have normal noise; |G| = 1, tr Sigma = ratio * (rows a step)."""
    mean = np.zeros(dimension)
    mean[0] = 1.0
    rows = sum(sizes)
    spread = math.sqrt(ratio * rows / dimension)  # of one row, per coordinate
    signals, noises = [], []
    for _ in range(count):
        parts = [mean + spread / math.sqrt(b) * rng.standard_normal(dimension) for b in sizes]
        whole = sum(b * g for b, g in zip(sizes, parts, strict=True)) / rows
        terms = noise_terms(torch.tensor([g @ g for g in parts]), sizes, torch.tensor(whole @ whole))
        signals.append(float(terms.signal))
        noises.append(float(terms.noise))
    return np.array(signals), np.array(noises)


@pytest.mark.parametrize("sizes", [(8, 8), (4, 4, 4, 4), (2, 14), (1, 2, 3, 10)])
def test_terms_are_unbiased_whatever_the_sizes(sizes):
    signals, noises = steps(np.random.default_rng(0), count=4000, dimension=50, ratio=2.0, sizes=sizes)
    for found, truth in ((signals, 1.0), (noises, 32.0)):
        assert abs(found.mean() - truth) < 4 * found.std() / math.sqrt(4000)


def test_halves_and_norms_say_the_same():
    first, second = torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = (first + second) / 2
    norms = torch.stack([first @ first, second @ second])
    for population in (None, 100):
        a = noise_terms(norms, [8, 8], mean @ mean, population=population)
        b = noise_terms_of_halves(first, second, 16, population=population)
        assert float(a.signal) == pytest.approx(float(b.signal), rel=1e-12)
        assert float(a.noise) == pytest.approx(float(b.noise), rel=1e-12)


def test_batches_without_replacement_are_corrected_exactly():
    rows = np.random.default_rng(0).standard_normal((6, 3)) + 1.0
    found = []
    for order in permutations(range(6)):  # every way to draw a batch of four in halves
        a, b = (torch.tensor(rows[list(half)].mean(0)) for half in (order[:2], order[2:4]))
        terms = noise_terms_of_halves(a, b, 4, population=6)
        found.append((float(terms.signal), float(terms.noise)))
    signal, noise = np.mean(found, axis=0)
    mean = rows.mean(0)
    assert signal == pytest.approx(mean @ mean, rel=1e-12)
    assert noise == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-12)
    plain = noise_terms_of_halves(*(torch.tensor(rows[i : i + 2].mean(0)) for i in (0, 2)), 4)
    assert float(plain.signal) != pytest.approx(mean @ mean)  # the correction is not for nothing


@pytest.mark.parametrize(("ratio", "dimension"), [(1.0, 200), (5.0, 1000), (5.0, 20)])
def test_the_interval_covers(ratio, dimension):
    truth, held, answered = 16 * ratio, 0, 0
    rng = np.random.default_rng(2)
    for _ in range(400):
        found = noise_scale(*steps(rng, count=30, dimension=dimension, ratio=ratio, sizes=(8, 8)))
        answered += found.value is not None
        held += found.low <= truth <= found.high
    # 380 of 400 expected, standard deviation 4.4; refusals have a one-sided bound instead, which holds more often
    assert held > 380 - 4 * 4.4
    assert answered > 200


def test_ratio_of_averages_where_an_average_of_ratios_fails():
    signals, noises = steps(np.random.default_rng(3), count=2000, dimension=100, ratio=20.0, sizes=(8, 8))
    found = noise_scale(signals, noises)
    assert found.low < 320 < found.high
    assert (signals < 0).any()  # a single step may say so, and its ratio means nothing
    assert abs(np.mean(noises / signals) - 320) > 100


def test_no_signal_is_not_identifiable():
    rng = np.random.default_rng(4)
    signals, noises = steps(rng, count=30, dimension=100, ratio=1e6, sizes=(8, 8))
    found = noise_scale(signals, noises)
    assert found.status is Status.REFUSED
    assert found.reason.startswith("not identifiable")
    assert found.low < 16e6
    assert math.isinf(found.high)
    assert noise_scale([1.0], [2.0]).value is None
    assert "NaN" in noise_scale([1.0, math.nan], [2.0, 2.0]).reason


def test_scale_and_units():
    signals, noises = steps(np.random.default_rng(5), count=40, dimension=100, ratio=1.0, sizes=(8, 8))
    one, other = noise_scale(signals, noises), noise_scale(1e6 * signals, 1e6 * noises)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), rel=1e-9)
    assert noise_scale(signals, noises, block=7).value == pytest.approx(one.value, rel=0.1)


def test_bad_arguments_are_named():
    with pytest.raises(InvalidArgumentError, match="two or more"):
        noise_terms(torch.ones(1), [4], torch.tensor(1.0))
    with pytest.raises(ShapeMismatchError, match="one width"):
        noise_terms_of_halves(torch.ones(3), torch.ones(4), 2)
    with pytest.raises(InvalidArgumentError, match="block=3"):
        noise_scale([1.0, 1.0], [1.0, 1.0], block=3)
