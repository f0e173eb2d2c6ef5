"""Simple eigenvalues are listed once, whatever the budget; full reorthogonalisation is what guarantees it."""

import numpy as np
import pytest

from dyntune import eigenvalues
from tests.operators import FLOOR, diagonal, wanted

VALUES = np.concatenate([[10.0, 5.0, 2.0], np.linspace(0, 1, 997)])
TRUTH = wanted(VALUES, "largest", 5)


@pytest.mark.parametrize("budget", [5, 10, 20, 50, 51, 80, 150, 300, None])
@pytest.mark.parametrize("seed", range(3))
def test_no_copies_at_any_budget(budget, seed):
    found = eigenvalues(diagonal(VALUES), k=5, max_products=budget, seed=seed)
    values = found.values.numpy()
    floor = FLOOR * 10
    assert found.num_products <= (budget or 500)
    # Lower bounds, by Cauchy's interlacing; residuals of pairs found in different runs loosen it by their size.
    assert (values <= TRUTH + floor + found.residuals.numpy()).all()
    # Nothing between 2 and 5 or 5 and 10 is near a copy: each value is the eigenvalue of its own rank, or below it.
    assert (found.low.numpy() <= TRUTH).all()
    assert (found.high.numpy() >= TRUTH).all()
    settled = found.converged_each.numpy()
    assert (np.abs(values - TRUTH)[settled] <= 0.01 * TRUTH[settled]).all()
    if budget is not None and budget < 100:
        assert not found.converged  # the edge of the bulk takes longer, and is not claimed early
    if budget is None:
        assert found.converged


def test_the_vectors_are_different_eigenvectors():
    found = eigenvalues(diagonal(VALUES), k=5)
    stacked = np.stack([v.double().numpy() for v in found.vectors])
    # Float32 orthogonality over 1,000 entries.
    np.testing.assert_allclose(stacked @ stacked.T, np.eye(5), atol=1e-6)
    assert np.abs(stacked).argmax(axis=1).tolist()[:3] == [0, 1, 2]
