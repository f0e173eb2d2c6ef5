"""Level and scatter of a healthy series."""

from __future__ import annotations

import numpy as np
import pytest

from dyntune.detect.baseline import Baseline
from dyntune.detect.steps import BLOCK
from tests.detect.series import Array


def learnt(series: Array, *, signed: bool = False) -> Baseline:
    baseline = Baseline(signed=signed)
    for block in series.reshape(-1, BLOCK):
        baseline.learn(block, top=float(np.fmax.reduce(baseline.scores(block))))
    return baseline


def test_scores_are_standard_deviations_of_normal_noise() -> None:
    rng = np.random.default_rng(0)
    baseline = learnt(np.exp(3.0 + 0.2 * rng.standard_normal(64 * BLOCK)))
    scores = baseline.scores(np.exp(3.0 + 0.2 * np.array([0.0, 1.0, 5.0])))
    # The scale is a MAD of 256 points (relative error 7%), the level a median of 64 (error 0.16): three times both.
    np.testing.assert_allclose(scores, [0.0, 1.0, 5.0], atol=0.5 + 0.21 * 5)
    assert baseline.level == pytest.approx(np.exp(3.0), rel=0.1)


@pytest.mark.parametrize("factor", [1e-12, 1e3, 1e200])
def test_scores_do_not_depend_on_the_unit(factor: float) -> None:
    rng = np.random.default_rng(1)
    series, new = np.exp(rng.standard_normal(20 * BLOCK)), np.array([0.1, 1.0, 40.0])
    # Logarithms near 500 are rounded to 1e-13, scatter is of order 1.
    np.testing.assert_allclose(learnt(factor * series).scores(factor * new), learnt(series).scores(new), atol=1e-11)


def test_scores_of_a_signed_series_do_not_depend_on_the_unit() -> None:
    rng = np.random.default_rng(2)
    series, new = rng.standard_normal(20 * BLOCK), np.array([-3.0, 0.0, 9.0])
    scores = learnt(series).scores(new)
    np.testing.assert_allclose(learnt(1e3 * series).scores(1e3 * new), scores, rtol=1e-9)


def test_a_value_that_is_not_positive_makes_the_series_signed() -> None:
    baseline = learnt(np.ones(4 * BLOCK))
    assert not baseline.signed
    baseline.learn(np.array([0.5, -0.5]))
    assert baseline.signed
    assert not baseline.ready


def test_a_trend_is_no_deviation() -> None:
    """A loss that falls by a thousandth a step: points of the next block are where they are expected."""
    n = 20 * BLOCK
    rng = np.random.default_rng(3)
    falling = np.exp(-1e-3 * np.arange(n + BLOCK) + 0.02 * rng.standard_normal(n + BLOCK))
    scores = learnt(falling[:n]).scores(falling[n:])
    assert abs(np.median(scores)) < 1.0
    assert scores.max() < 6.0
    assert learnt(falling[:n]).scores(falling[n:] * 1.5).min() > 5.0


def test_outliers_hardly_move_it() -> None:
    rng = np.random.default_rng(4)
    clean = np.exp(0.1 * rng.standard_normal(20 * BLOCK))
    dirty = clean.copy()
    dirty[::20] = 1e6
    new = np.array([2.0])
    # With a twentieth of outliers on one side the largest tenth begins at 1.62 standard deviations, not at 1.28.
    assert learnt(dirty).scores(new) == pytest.approx(learnt(clean).scores(new), rel=0.35)


def test_a_constant_series_has_finite_scores_and_rounding_is_no_deviation() -> None:
    baseline = learnt(np.full(20 * BLOCK, 0.3))
    scores = baseline.scores(np.array([0.3, 0.3 * (1 + 1e-7), 0.6]))
    assert scores[0] == 0.0
    assert scores[1] < 1.0
    assert 1e3 < scores[2] < np.inf


def test_what_is_not_finite_is_not_learnt_and_has_no_finite_score() -> None:
    rng = np.random.default_rng(5)
    series = np.exp(0.1 * rng.standard_normal(20 * BLOCK))
    baseline, plain = learnt(series), learnt(series)
    baseline.learn(np.array([np.nan, np.inf]))
    np.testing.assert_array_equal(baseline.scores(series), plain.scores(series))
    assert np.isposinf(baseline.scores(np.array([np.inf])))


def test_squares_are_judged_by_their_own_skew() -> None:
    """Squares of normal numbers: 3.6 standard deviations of the number are 25 of the MAD of the square."""
    rng = np.random.default_rng(7)
    scores = learnt(rng.standard_normal(20 * BLOCK) ** 2, signed=True).scores(np.array([3.6**2]))
    assert 4.0 < scores[0] < 10.0


def test_restart_forgets() -> None:
    baseline = learnt(np.random.default_rng(6).random(64 * BLOCK))
    assert baseline.threshold(1e5).calibrated
    baseline.restart()
    assert not baseline.ready
    assert np.isnan(baseline.scores(np.ones(2))).all()
    assert not baseline.threshold(1e5).calibrated
