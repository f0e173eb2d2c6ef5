"""Thresholds to an average run length."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dyntune.detect.calibration import CRITICAL, ENOUGH, WARNING, prior_threshold, tail_threshold
from dyntune.detect.steps import BLOCK
from tests.detect.series import NOISE


@pytest.mark.parametrize("length", [WARNING, CRITICAL])
def test_the_prior_is_the_quantile_of_students_t(length: float) -> None:
    exact = stats.t.isf(1.0 / length, 4) / (stats.t.isf(0.25, 4) * 1.4826)
    assert prior_threshold(length).value == pytest.approx(exact, rel=0.01)  # of the tail 3 / x^4 at 1e-5: 0.5%
    assert not prior_threshold(length).calibrated


def test_few_maxima_are_no_evidence() -> None:
    maxima = np.linspace(2.0, 3.0, ENOUGH - 1)
    assert tail_threshold(maxima, WARNING) == prior_threshold(WARNING)
    assert tail_threshold(np.linspace(2.0, 3.0, ENOUGH), WARNING).calibrated
    assert "too few healthy steps" in prior_threshold(WARNING).said


@pytest.mark.parametrize("name", ["gaussian", "student", "correlated", "correlated_student"])
def test_the_threshold_holds_its_run_length(name: str) -> None:
    """Thresholds of 200 windows of 128 blocks each: their mean rate on other steps is at most the one asked for."""
    rng = np.random.default_rng(0)
    length = 1e4
    maxima = NOISE[name](200 * 128 * BLOCK, rng).reshape(200, 128, BLOCK).max(2)
    thresholds = np.array([tail_threshold(window, length).value for window in maxima])
    fresh = np.sort(NOISE[name](2_000_000, rng))
    rate = 1.0 - np.searchsorted(fresh, thresholds) / fresh.size
    assert rate.mean() < 1.0 / length
    exact = fresh[int((1.0 - 1.0 / length) * fresh.size)]
    assert np.median(thresholds) < 2.5 * exact  # it still has reach: light tails are taken for those of t4


def test_few_maxima_that_are_large_raise_the_prior() -> None:
    """Sixteen times as many steps: twice as high, where the tail falls like x^-4."""
    found = tail_threshold(np.array([3.0, 40.0]), 2 * BLOCK * 16.0)
    assert found.value == pytest.approx(80.0)
    assert not found.calibrated


def test_thresholds_follow_the_scale_of_scores_and_grow_with_the_run_length() -> None:
    maxima = np.random.default_rng(1).standard_t(4, (128, BLOCK)).max(1)
    short, long = (tail_threshold(maxima, length).value for length in (WARNING, CRITICAL))
    assert short < long
    assert tail_threshold(10.0 * maxima, WARNING).value == pytest.approx(10.0 * short, rel=1e-12)
    assert math.isfinite(tail_threshold(np.ones(ENOUGH), WARNING).value)
