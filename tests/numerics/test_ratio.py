"""Fieller's interval: its defining equation, its coverage, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import stdtrit

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.ratio import ratio_of_means


def test_ends_are_where_the_difference_is_just_significant():
    rng = np.random.default_rng(0)
    y = 3 + rng.standard_normal(20)
    x = 2 * y + rng.standard_normal(20)
    found = ratio_of_means(x, y, level=0.9)
    assert found.value == pytest.approx(x.mean() / y.mean())
    for end in (found.low, found.high):
        d = x - end * y
        assert abs(d.mean()) / (d.std(ddof=1) / math.sqrt(20)) == pytest.approx(stdtrit(19, 0.95), rel=1e-9)
    assert found.divisor_error == pytest.approx(y.std(ddof=1) / math.sqrt(20) / y.mean())


@pytest.mark.parametrize(("count", "mean"), [(6, 4.0), (30, 1.0)])
def test_it_covers_as_often_as_it_says(count, mean):
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        y = mean + rng.standard_normal(count)
        x = 2 * y + rng.standard_normal(count)
        found = ratio_of_means(x, y)
        held += found.low <= 2 <= found.high
    # exact for normal numbers: 950 expected, standard deviation 7
    assert abs(held - 950) < 4 * 7


def test_a_divisor_near_zero_leaves_everything_possible():
    found = ratio_of_means([1.0, 2.0, 3.0], [1.0, -1.1, 0.3])
    assert (found.low, found.high, found.divisor_resolved) == (-math.inf, math.inf, False)
    assert not ratio_of_means([1.0], [2.0]).divisor_resolved
    with pytest.raises(InvalidArgumentError, match="one of each"):
        ratio_of_means([1.0], [1.0, 2.0])
