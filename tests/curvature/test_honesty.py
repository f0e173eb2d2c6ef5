"""Whatever the spectrum, k, end, basis and budget: what is claimed is true, and the budget is kept."""

import numpy as np
import pytest
import torch

from dyntune import eigenvalues
from tests.operators import FLOOR, diagonal, wanted

SHAPES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "integers": lambda rng, n: rng.integers(-2, 3, n).astype(float),
    "outliers and a bulk": lambda rng, n: np.where(np.arange(n) < 4, 10 * rng.standard_normal(n), rng.uniform(0, 1, n)),
    "constant": lambda rng, n: np.full(n, rng.standard_normal()),
    "two values": lambda rng, n: np.where(np.arange(n) < rng.integers(0, n + 1), 1.0, -1.0),
    "low rank": lambda rng, n: np.where(np.arange(n) < rng.integers(0, 5), rng.standard_normal(n), 0.0),
    "decay from below": lambda rng, n: -np.exp(-np.arange(n) / 3),
    "triples": lambda rng, n: np.repeat(rng.standard_normal(n // 3 + 1), 3)[:n],
}


def draw(shape: str, index: int):
    """A problem and the arguments to solve it with, some of them unreasonable."""
    rng = np.random.default_rng([len(shape), index])
    n = int(rng.choice([3, 5, 8, 20, 60, 150]))
    values = SHAPES[shape](rng, n).astype(np.float32).astype(np.float64)
    k = max(1, min(n, int(rng.choice([1, 2, 3, 5, 10, n - 1, n // 2, n]))))
    options = {
        "which": str(rng.choice(["largest", "smallest", "magnitude", "both"])),
        "rtol": float(rng.choice([1e-4, 1e-2, 0.1])),
        "basis": None if rng.random() < 0.4 else 2 * k + 4 + int(rng.integers(0, 10)),
        "max_products": None if rng.random() < 0.4 else int(rng.integers(1, 150)),
        "seed": index,
    }
    return values, k, options


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 8))])
def test_claims(shape, block):
    for index in range(25 * block, 25 * block + 25):
        values, k, options = draw(shape, index)
        which, budget = options["which"], options["max_products"]
        found = eigenvalues(diagonal(values), k, **options)
        assert budget is None or found.num_products <= budget
        norm = np.abs(values).max()
        floor = FLOOR * norm
        truth, result = wanted(values, which, k), found.values.numpy()
        low, high, residuals = found.low.numpy(), found.high.numpy(), found.residuals.numpy()
        if len(result) < len(truth):  # too small a budget to see k values
            assert budget is not None
            assert not found.converged
            top = (len(result) + 1) // 2
            truth = np.concatenate([truth[:top], truth[k : k + len(result) - top]]) if which == "both" else truth
            truth = truth[: len(result)]
        if which == "magnitude":
            low, high = np.where(result >= 0, low, -high), np.where(result >= 0, high, -low)
            truth, magnitude = np.abs(truth), np.abs(result)
        else:
            magnitude = result
        claimed = found.converged_each.numpy()
        assert (np.abs(magnitude - truth) <= np.maximum(options["rtol"] * np.abs(result), floor) + floor)[claimed].all()
        assert (low <= truth + floor).all()
        assert (truth <= high + floor).all()
        assert ((low <= magnitude) & (magnitude <= high)).all()
        # Vectors are orthonormal (and the same ones only where the ends overlap) and have the residuals that are
        # stated, up to the rounding of a product and of a rotation: a few eps ||A||.
        stacked = torch.stack(list(found.vectors)).double().numpy()
        gram = stacked @ stacked.T
        overlap = which == "both" and (2 * k > len(values) or (k == 1 and result[0] == result[1]))
        expected = np.abs(np.round(gram)) if overlap else np.eye(len(result))
        np.testing.assert_allclose(np.abs(gram), expected, atol=1e-5)
        true = np.linalg.norm(stacked * values - result[:, None] * stacked, axis=1)
        np.testing.assert_allclose(residuals, true, rtol=0.02, atol=2 * floor)


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude", "both"])
def test_nothing_is_claimed_of_an_operator_that_is_not_symmetric(which):
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(200, 200, generator=g) + 5 * torch.diag(torch.randn(200, generator=g))
    found = eigenvalues((lambda v: matrix @ v, 200), which=which)
    assert found.asymmetry > 1e-2
    assert not found.converged
    small = eigenvalues((lambda v: matrix[:3, :3] @ v, 3), 3, which=which)
    assert not small.converged


def test_slight_asymmetry_matters_only_beside_the_tolerance():
    """Rounding, or finite differences: products off by 1e-4 ||A|| support a claim of 1e-2, not one of 1e-6."""
    g = torch.Generator().manual_seed(0)
    values = torch.linspace(-1, 1, 200, dtype=torch.float64)
    values[0] = 3.0
    noise = 1e-4 * torch.randn(200, 200, generator=g, dtype=torch.float64)
    problem = (lambda v: values * v + noise @ v, 200)
    start = torch.ones(200, dtype=torch.float64)
    assert eigenvalues(problem, start=start, rtol=1e-2).converged
    assert not eigenvalues(problem, start=start, rtol=1e-6).converged


def test_too_few_values_are_not_all_that_was_asked_for():
    """Each of the two is exact, and known to be."""
    found = eigenvalues(diagonal(np.zeros(8)), 7, max_products=2)
    assert found.values.tolist() == [0.0, 0.0]
    assert found.converged_each.all()
    assert not found.converged


@pytest.mark.parametrize("budget", [1, 2, 5, 20])
def test_brackets_shrink_around_the_truth_as_the_budget_grows(budget):
    values = np.linspace(-1, 1, 500)
    found = eigenvalues(diagonal(values), max_products=budget)
    more = eigenvalues(diagonal(values), max_products=budget + 3)
    assert not found.converged
    assert found.low[0] <= more.low[0] <= 1 <= more.high[0] < found.high[0]
