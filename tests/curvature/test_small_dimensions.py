"""Dimensions below the size of the basis, down to one, and every k up to n."""

import numpy as np
import pytest
import torch

from dyntune import eigenvalues
from tests.operators import wanted

WHICH = ["largest", "smallest", "magnitude", "both"]


def matrix(n: int, dtype: torch.dtype) -> torch.Tensor:
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return (a + a.T).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 12])
def test_every_k(n, which, dtype):
    a = matrix(n, dtype)
    values = np.linalg.eigvalsh(a.double().numpy())
    eps = torch.finfo(dtype).eps * np.abs(values).max()
    for k in range(1, n + 1):
        found = eigenvalues(a, k, which=which)
        truth = wanted(values, which, k)
        assert found.converged
        assert len(found) == len(found.vectors) == len(truth)
        assert np.abs(found.values.numpy() - truth).max() <= max(1e-2 * np.abs(truth).max(), 8 * eps)
        assert (found.low.numpy() <= truth + 8 * eps).all()
        assert (found.high.numpy() >= truth - 8 * eps).all()
        for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
            true = float(torch.linalg.vector_norm(a.double() @ vector.double() - value * vector.double()))
            # The recurrence knows the residual up to the rounding of a product: n eps ||A||.
            assert abs(true - float(residual)) <= n * eps + 0.01 * true


@pytest.mark.parametrize("k", [118, 119, 120])
@pytest.mark.parametrize("which", WHICH)
def test_nearly_all_of_more_than_the_default_basis(k, which):
    a = matrix(120, torch.float64)
    found = eigenvalues(a, k, which=which, rtol=1e-4)
    truth = wanted(np.linalg.eigvalsh(a.numpy()), which, k)
    assert found.converged
    assert (np.abs(found.values.numpy() - truth) <= 1e-4 * np.abs(truth)).all()


@pytest.mark.parametrize("which", WHICH)
def test_a_basis_of_the_least_size(which):
    """2 k + 4 vectors; restarts all the time, which the flat edge at -1 takes longest to survive (368 products)."""
    values = np.concatenate([[5.0, 4.0, -4.5], np.random.default_rng(0).uniform(-1, 1, 300)])
    k = 1 if which == "both" else 2
    matrix = torch.diag(torch.from_numpy(values).float())
    found = eigenvalues(matrix, k, which=which, basis=2 * k + 4, max_products=1000)
    assert found.converged
    np.testing.assert_allclose(found.values.numpy(), wanted(values, which, k), rtol=1e-2)


def test_of_one_dimension_both_ends_are_the_same():
    found = eigenvalues(torch.tensor([[-3.0]]), which="both")
    assert found.values.tolist() == [-3.0, -3.0]
    assert found.converged
