"""The metrics against closed forms and the relations that define them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.lr import metrics


def test_regret_is_zero_at_the_best_and_one_without_training():
    best, initial = [0.2, 0.4], [2.0, 2.2]
    assert metrics.regret(best, best, initial) == 0
    assert metrics.regret(initial, best, initial) == 1
    assert metrics.regret([1.1, 1.3], best, initial) == pytest.approx(0.5)  # halfway: (1.2 - 0.3) / (2.1 - 0.3)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 50.0])
def test_a_failed_run_counts_as_no_training(bad):
    assert metrics.regret([bad], [0.5], [2.0]) == 1


def test_regret_may_be_negative():
    assert metrics.regret([0.5], [1.0], [2.0]) == pytest.approx(-0.5)


def test_regret_does_not_depend_on_the_unit_or_the_zero_of_the_loss():
    rng = np.random.default_rng(0)
    loss, best, initial = rng.random(5), rng.random(5) / 2, 1 + rng.random(5)
    plain = metrics.regret(loss, best, initial)
    assert metrics.regret(7 * loss + 3, 7 * best + 3, 7 * initial + 3) == pytest.approx(plain, rel=1e-12)  # rounding


def test_regret_needs_something_to_have_been_learnt():
    with pytest.raises(ValueError, match="nothing was learnt"):
        metrics.regret([1.0], [2.0], [2.0])


@pytest.mark.parametrize(
    ("train", "peak", "found", "expected"),
    [
        (1.0, 2.5, metrics.OK, metrics.OK),
        (1.6, 2.5, metrics.OK, metrics.MIDPOINT),  # midpoint of 2 and 1: 1.5
        (1.0, 4.1, metrics.OK, metrics.PEAK),
        (math.inf, math.inf, metrics.NON_FINITE, metrics.NON_FINITE),
        (math.nan, 1.0, metrics.OK, metrics.NON_FINITE),
        (math.inf, 4.1, metrics.PEAK, metrics.PEAK),
    ],
)
def test_failure(train, peak, found, expected):
    assert metrics.failure(train, peak, found, initial=2.0, best=1.0) == expected


@pytest.mark.parametrize("edge", range(1, 33))
def test_onset_is_found_with_the_fewest_questions(edge):
    asked = []
    found = metrics.onset(lambda k: asked.append(k) or k >= edge, 0, 32)
    assert found == edge
    assert len(asked) == len(set(asked)) <= 5  # log2(32)
    assert not {0, 32} & set(asked)  # the ends are known


def test_octaves_are_symmetric():
    assert metrics.octaves(0.1, 0.4) == metrics.octaves(0.4, 0.1) == pytest.approx(2)


def test_best_and_interpolated_loss():
    curve = {0.01: [1.0, 3.0], 0.1: [1.0, 1.2], 1.0: [4.0, 4.0]}
    assert metrics.best_lr(curve) == 0.1
    assert metrics.loss_at(curve, 0.1) == pytest.approx(1.1)
    assert metrics.loss_at(curve, math.sqrt(0.1)) == pytest.approx((1.1 + 4) / 2)  # halfway in the logarithm
    assert metrics.loss_at(curve, 1e-9) == 2.0
    assert metrics.loss_at(curve, 1e9) == 4.0


@pytest.mark.parametrize(("count", "total"), [(0, 20), (7, 20), (20, 20)])
def test_share_is_the_exact_interval(count, total):
    exact = stats.binomtest(count, total).proportion_ci(0.95, method="exact")
    found = metrics.share(count, total)
    assert (found["low"], found["high"]) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert found["rate"] == count / total


def test_spread_is_in_octaves():
    assert metrics.spread([1.0, 2.0, 4.0]) == pytest.approx(1.0)
    assert metrics.spread([0.3, 0.3]) == 0


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    found = metrics.mean_interval(values)
    normal = 1.96 * 2 / math.sqrt(400)
    assert found["mean"] == pytest.approx(values.mean())
    # 400 values: their deviation is within 10% of 2 (three standard errors), and the bootstrap's own noise is below.
    assert found["high"] - found["low"] == pytest.approx(2 * normal, rel=0.15)
    assert metrics.mean_interval([1.5] * 5) == {"mean": 1.5, "low": 1.5, "high": 1.5}
