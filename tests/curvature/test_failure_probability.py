"""The stated failure probability is kept, and is not an empty phrase: at 10% some runs do fail."""

import numpy as np
import pytest
import scipy.stats

from dyntune import eigenvalues
from tests.operators import FLOOR, diagonal, wanted

REPEATS = 400
LEVEL = 0.1
# A method that fails with probability LEVEL exceeds this in one of 1,000 such tests.
MOST = scipy.stats.binom.ppf(0.999, REPEATS, LEVEL)


def spectrum(seed: int) -> np.ndarray:
    """A bulk, and two outliers at each end whose size varies from 1% to 100% of it; every third time one is double."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, 400)
    values[:2] = 1 + 10 ** rng.uniform(-2, 0, 2)
    values[2:4] = -1 - 10 ** rng.uniform(-2, 0, 2)
    if seed % 3 == 0:
        values[1], values[3] = values[0], values[2]
    return values.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize(
    ("which", "k"),
    [
        ("largest", 1),
        ("both", 1),
        pytest.param("magnitude", 1, marks=pytest.mark.slow),
        pytest.param("largest", 3, marks=pytest.mark.slow),
        pytest.param("both", 2, marks=pytest.mark.slow),
    ],
)
def test_failures_of_claims_and_of_brackets(which, k):
    wrong = outside = claimed = 0
    for seed in range(REPEATS):
        values = spectrum(seed)
        truth = wanted(values, which, k)
        found = eigenvalues(diagonal(values), k, which=which, failure_probability=LEVEL, seed=seed)
        result, low, high = found.values.numpy(), found.low.numpy(), found.high.numpy()
        if which == "magnitude":
            low, high = np.where(result > 0, low, -high), np.where(result > 0, high, -low)
            truth, result = np.abs(truth), np.abs(result)
        floor = FLOOR * np.abs(values).max()
        claimed += found.converged
        wrong += found.converged and bool((np.abs(result - truth) > found.rtol * np.abs(result) + floor).any())
        outside += not bool(((low <= truth + floor) & (truth <= high + floor)).all())
    assert claimed == REPEATS
    assert wrong <= MOST
    assert outside <= MOST
    if (which, k) == ("largest", 1):
        # Were nothing ever wrong, the certificate would be asking for more products than it has to.
        assert wrong >= 1


def test_a_smaller_probability_costs_more_products():
    values = spectrum(1)
    spent = [eigenvalues(diagonal(values), failure_probability=p).num_products for p in (0.5, 1e-2, 1e-4, 1e-8)]
    assert spent == sorted(spent)
    assert spent[0] < spent[-1]
