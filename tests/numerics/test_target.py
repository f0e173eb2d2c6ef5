"""Which eigenvalues are chosen, and what must not exist for them to be right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.target import Target
from tests.operators import wanted

WHICH = ["largest", "smallest", "magnitude", "both"]
NUMBERS = st.floats(-100, 100, allow_nan=False, width=32)


@pytest.mark.parametrize("which", WHICH)
@given(values=st.lists(NUMBERS, min_size=8, max_size=20), k=st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_choose_is_sorting(which, values, k):
    values = np.array(values)
    found = values[Target(which, k).choose(values)]
    expected = wanted(values, which, k)
    if which == "magnitude":  # of two opposite numbers either may come first
        found, expected = np.abs(found), np.abs(expected)
    np.testing.assert_array_equal(found, expected)


@given(values=st.lists(NUMBERS, min_size=1, max_size=7, unique=True), k=st.integers(2, 5))
@settings(deadline=None, max_examples=100)
def test_both_ends_share_too_few_values_without_naming_one_twice(values, k):
    values = np.array(values)
    chosen = Target("both", k).choose(values)
    assert len(set(chosen.tolist())) == len(chosen) or len(values) >= 2 * k
    if len(values) < 2 * k:
        assert len(chosen) == len(values)
    upper = Target("both", k).is_upper(values[chosen])
    assert upper.sum() - (~upper).sum() in (0, 1)
    assert (np.diff(values[chosen][upper]) <= 0).all()
    assert (np.diff(values[chosen][~upper]) >= 0).all()


def test_a_single_value_stands_for_both_ends_when_one_per_end_is_wanted():
    assert Target("both", 1).choose(np.array([3.0])).tolist() == [0, 0]
    assert Target("both", 2).choose(np.array([3.0])).tolist() == [0]


@pytest.mark.parametrize("which", WHICH)
@given(
    values=st.lists(NUMBERS, min_size=8, max_size=12),
    k=st.integers(1, 4),
    slack=st.floats(0, 10),
    extra=NUMBERS,
)
@settings(deadline=None, max_examples=150)
def test_bounds_say_when_another_eigenvalue_would_matter(which, values, k, slack, extra):
    """Within the bounds it moves no value by more than the slack; far beyond them it moves one by more."""
    target = Target(which, k)
    before = wanted(values, which, k)
    lower, upper = target.bounds(before, np.full(len(before), slack))
    after = wanted([*values, extra], which, k)
    moved = np.abs(np.abs(after) - np.abs(before)) if which == "magnitude" else np.abs(after - before)
    assert (lower is not None, upper is not None) == (which != "largest", which != "smallest")
    inside = (lower is None or extra >= lower) and (upper is None or extra <= upper)
    if inside:
        assert (moved <= slack + 1e-12).all()
    else:
        # It stands where a chosen value stood, more than the slack beyond the innermost of them.
        innermost = {True: before[:k].min(), False: before[-k:].max()}
        if which == "magnitude":
            assert abs(extra) > np.abs(before).min() + slack
        else:
            assert extra > innermost[True] + slack or extra < innermost[False] - slack


def test_every_slack_counts():
    chosen, slack = np.array([10.0, 1.0]), np.array([0.1, 5.0])
    assert Target("largest", 2).bounds(chosen, slack) == (None, 6.0)
    assert Target("smallest", 2).bounds(-chosen, slack) == (-6.0, None)
    assert Target("magnitude", 2).bounds(chosen * [-1, 1], slack) == (-6.0, 6.0)
    assert Target("both", 1).bounds(np.array([10.0, -7.0]), np.array([0.1, 0.2])) == (-7.2, 10.1)
    assert Target("both", 1).bounds(np.array([4.0]), np.array([1.0])) == (3.0, 5.0)


@pytest.mark.parametrize(
    ("which", "count", "ends", "looks_at"),
    [
        ("largest", 3, 1, (True, False)),
        ("smallest", 3, 1, (False, True)),
        ("magnitude", 3, 2, (True, True)),
        ("both", 6, 2, (True, True)),
    ],
)
def test_counts(which, count, ends, looks_at):
    target = Target(which, 3)
    assert (target.count, target.ends, target.looks_at) == (count, ends, looks_at)
    assert not target.simple
    assert Target(which, 1).simple


def test_bad_targets():
    with pytest.raises(InvalidArgumentError, match="which='LA'; choose one of largest, smallest, magnitude, both"):
        Target("LA", 1)
    with pytest.raises(InvalidArgumentError, match="k=0: ask for at least one"):
        Target("largest", 0)
