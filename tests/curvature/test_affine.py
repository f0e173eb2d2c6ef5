"""``A + alpha B``."""

import pytest
import torch

import dyntune
from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from dyntune.numerics.operator import DenseOperator
from tests.objective.zoo import ZOO


def test_equals_the_dense_sum_along_the_family() -> None:
    case = ZOO["mlp"]().double()
    a = dyntune.hessian(case.model, case.batch, criterion=case.criterion)
    b = dyntune.gauss_newton(case.model, case.batch, criterion=case.criterion)
    family = dyntune.affine(a, b, alpha=0.0)
    for alpha in (-2.0, 0.0, 0.5, 3.0):
        # float64: a few rounding units of the larger term
        torch.testing.assert_close(family.at(alpha).to_dense(), a.to_dense() + alpha * b.to_dense(), rtol=0, atol=1e-13)


def test_largest_eigenvalue_is_convex_in_alpha() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(30, 30, generator=g, dtype=torch.float64) for _ in range(2)]
    a, b = (DenseOperator(m + m.T) for m in parts)
    family = dyntune.affine(a, b, alpha=0.0)
    low, mid, high = (float(dyntune.eigenvalues(family.at(x), rtol=1e-6)) for x in (-1.0, 0.0, 1.0))
    assert mid <= (low + high) / 2 * (1 + 1e-6)


def test_refusals() -> None:
    one, two = DenseOperator(torch.eye(2)), DenseOperator(torch.eye(3))
    with pytest.raises(ShapeMismatchError, match="2 entries"):
        dyntune.affine(one, two, alpha=1.0)
    with pytest.raises(InvalidArgumentError, match="alpha=nan"):
        dyntune.affine(one, one, alpha=float("nan"))
