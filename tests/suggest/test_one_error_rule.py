"""The careful choice: the smallest that is as good as the best within an error, and nothing broken."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyntune.errors import InvalidArgumentError
from dyntune.suggest.one_error_rule import careful_choice


def test_a_clear_best_is_taken_and_a_tie_goes_to_the_smaller() -> None:
    clear = careful_choice({1.0: [0.1, 0.2, 0.3], 3.0: [1.1, 1.2, 1.3]})
    assert (clear.chosen, clear.best, clear.tied) == (3.0, 3.0, (3.0,))
    tie = careful_choice({1.0: [1.0, 1.2, 1.4], 3.0: [1.1, 1.1, 1.5]})
    assert (tie.chosen, tie.best, tie.tied) == (1.0, 3.0, (1.0, 3.0))


def test_luck_that_seeds_share_does_not_widen_the_error() -> None:
    luck = np.array([0.0, 100.0, -50.0])
    found = careful_choice({1.0: (luck + 1).tolist(), 2.0: (luck + 2).tolist()})
    assert found.chosen == 2.0
    assert found.error[1.0] == pytest.approx(0, abs=1e-12)


def test_what_broke_is_out_and_nothing_left_is_an_error() -> None:
    assert careful_choice({1.0: [1.0, 1.0], 3.0: [9.0, math.nan]}).chosen == 1.0
    with pytest.raises(InvalidArgumentError, match="0 of them finite"):
        careful_choice({1.0: [math.nan], 3.0: [math.inf]})
    with pytest.raises(InvalidArgumentError, match=r"\[1, 2\] seeds"):
        careful_choice({1.0: [1.0], 3.0: [1.0, 2.0]})
    with pytest.raises(InvalidArgumentError):
        careful_choice({})


@given(st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_choice_is_never_worse_than_its_error(rows: list[list[float]]) -> None:
    found = careful_choice(dict(enumerate(rows, 1)))
    assert found.mean[found.best] - found.mean[found.chosen] <= found.error[found.chosen]
    assert found.chosen <= found.best
