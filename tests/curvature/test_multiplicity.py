"""Multiple eigenvalues are found as often as they occur, though one Krylov space sees each only once."""

import numpy as np
import pytest

from dyntune import eigenvalues
from tests.curvature.test_known_spectra import check
from tests.operators import diagonal

BULK = np.random.default_rng(0).uniform(0, 1, 500)
CASES = {
    "triple and double": (np.concatenate([[3.0, 3, 3, 2, 2], BULK]), [2, 3, 4, 5, 6]),
    "twenty of one": (np.concatenate([np.full(20, 10.0), BULK]), [5, 20, 22]),
    "far above the rest, so that the rest is a matter of residuals": (
        np.concatenate([[10.0, 10, 10], np.linspace(0, 0.01, 500)]),
        [3, 5],
    ),
    "every eigenvalue thrice": (np.repeat(np.random.default_rng(1).standard_normal(100), 3), [4, 10]),
    "pairs of opposite sign": (np.repeat([4.0, -4.0, 1.0, -1.0, 0.0], [2, 2, 50, 50, 100]), [1, 2, 4]),
    "all equal": (np.ones(1000), [2, 20]),
    "integers": (np.random.default_rng(2).integers(-2, 3, 150).astype(float), [3, 40]),
}


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude", "both"])
@pytest.mark.parametrize("name", CASES)
def test_multiplicities(name, which):
    values, counts = CASES[name]
    for k in counts:
        check(eigenvalues(diagonal(values), k, which=which), values, which, k)


@pytest.mark.parametrize("which", ["largest", "both"])
def test_the_vectors_span_the_eigenspace(which):
    values, _ = CASES["triple and double"]
    found = eigenvalues(diagonal(values), 3, which=which)
    stacked = np.stack([v.double().numpy() for v in found.vectors])
    np.testing.assert_allclose(stacked @ stacked.T, np.eye(len(stacked)), atol=1e-6)
    # A residual of 1% of the tolerance per vector and a gap of 1 leave that much outside of the eigenspace.
    assert np.linalg.norm(stacked[:3, 3:]) < 0.03
