"""Norms and inner products of long float32 vectors."""

import math

import pytest
import torch

from dyntune.numerics.vectors import Basis, VectorSpace, dot, norm

# Sums of 2^16 terms in float32 (vectorised, so in 16 or more interleaved parts of 4096 terms) err by at most
# 4096 eps / 2 = 2.4e-4 and typically by sqrt(4096) eps / 2 = 4e-6 each; with n / 2^16 of them averaging, 1e-6 is
# generous, and two to four orders below what one flat sum loses (3.7e-4 at 1e7 elements, 1.1e-2 at 1e8).
RTOL = 1e-6


def long_vector(n: int, seed: int) -> torch.Tensor:
    """All positive, so that rounding errors of a running sum do not cancel: the hard case."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)).add_(0.5)


def exact_dot(a: torch.Tensor, b: torch.Tensor) -> float:
    parts = zip(a.split(1 << 20), b.split(1 << 20), strict=True)
    return math.fsum(float(torch.dot(x.double(), y.double())) for x, y in parts)


@pytest.mark.parametrize("n", [20_000_000, pytest.param(100_000_000, marks=pytest.mark.slow)])
def test_norm_and_dot_of_long_vectors(n):
    a, b = long_vector(n, 0), long_vector(n, 1)
    squared = exact_dot(a, a)
    assert norm([a]) == pytest.approx(math.sqrt(squared), rel=RTOL)
    assert dot([a], [b]) == pytest.approx(exact_dot(a, b), rel=RTOL)
    # The same through a basis row, which is what Lanczos uses.
    basis = Basis(VectorSpace.of([a]), 1)
    basis.load(0, [a])
    del a, b
    assert float(basis.norm(0)) == pytest.approx(math.sqrt(squared), rel=RTOL)


def test_dot_is_accurate_relative_to_the_lengths_when_terms_cancel():
    n = 5_000_000
    a = torch.randn(n, generator=torch.Generator().manual_seed(0))
    b = torch.randn(n, generator=torch.Generator().manual_seed(1))
    assert abs(dot([a], [b]) - exact_dot(a, b)) < RTOL * norm([a]) * norm([b])


def test_dot_adds_tensors_of_different_dtype_and_layout():
    a = [torch.arange(6.0).view(2, 3).T, torch.tensor(2.0, dtype=torch.float64), torch.empty(0)]
    b = [torch.ones(3, 2), torch.tensor(0.5, dtype=torch.float64), torch.empty(0)]
    assert dot(a, b) == 15.0 + 1.0  # small integers: exact


def test_vectors_of_different_length_are_not_multiplied():
    with pytest.raises(ValueError, match="zip"):
        dot([torch.ones(3)], [torch.ones(3), torch.ones(2)])
