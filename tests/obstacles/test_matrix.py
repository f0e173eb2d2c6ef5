"""Every row: right against float64 or refused with its fix, by the method announced, and without a trace."""

from __future__ import annotations

import re

import pytest

from tests.obstacles.measure import measure, moved, state
from tests.obstacles.problem import Row
from tests.obstacles.rows import ROWS
from tests.obstacles.truth import Truth, probe_vector, relative_error

# peft 0.21 asks transformers 5 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def selected(*, answered: bool) -> list[object]:
    return [pytest.param(row, id=name) for name, row in ROWS.items() if (row.error is None) == answered]


@pytest.mark.parametrize("row", selected(answered=True))
def test_right_and_without_a_trace(row: Row):
    problem = row.build()
    truth = Truth(problem)
    product, lambda_max = truth.product(probe_vector(problem.model)), truth.lambda_max()
    before = state(problem)
    found = measure(problem)
    assert moved(before, state(problem)) == []
    assert found.engine == row.engine
    assert re.search(row.because, found.reason)
    assert relative_error(found.product, product) < row.tolerance
    # Certified to 1e-2 by default; what the product is off, the eigenvalue may be off besides.
    assert found.converged
    assert abs(found.lambda_max - lambda_max) < (1e-2 + row.tolerance) * abs(lambda_max)


@pytest.mark.parametrize("row", selected(answered=False))
def test_refused_with_the_fix_and_without_a_trace(row: Row):
    problem = row.build()
    before = state(problem)
    with pytest.raises(row.error or AssertionError, match=row.fix or None):
        measure(problem)
    assert moved(before, state(problem)) == []
