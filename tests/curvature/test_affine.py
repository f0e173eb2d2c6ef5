"""``A + alpha B`` against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dyntune
from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from dyntune.numerics.operator import DenseOperator
from tests.objective.oracle import dense_hessian, relative_error
from tests.objective.snapshot import snapshot
from tests.objective.zoo import ZOO, Case, call

# float64 products with different orders of summation
ROUNDING = 1e-12


def cut(batch: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Three unequal batches."""
    n = len(batch[0])
    return [tuple(t[a:b] for t in batch) for a, b in pairwise([0, 1, n // 2, n])]


def dense_fisher(case: Case) -> torch.Tensor:
    """Mean of g g^T over rows, each in a forward pass of its own."""
    x, y = case.batch
    total: torch.Tensor | float = 0.0
    for i in range(len(x)):
        loss = case.criterion(case.model(x[i : i + 1]), y[i : i + 1])
        g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, list(case.model.parameters()))])
        total = total + torch.outer(g, g) / len(x)
    assert isinstance(total, torch.Tensor)
    return total


def dense_gauss_newton(case: Case) -> torch.Tensor:
    """Fisher information of a softmax, which is its Gauss-Newton matrix: labels by the model's own probabilities."""
    total: torch.Tensor | float = 0.0
    for x in case.batch[0].split(1):
        for label, chance in enumerate(case.model(x).softmax(1)[0].detach()):
            one = Case(case.model, (x, torch.tensor([label])), case.criterion)
            total = total + chance * dense_fisher(one) / len(case.batch[0])
    assert isinstance(total, torch.Tensor)
    return total


@pytest.mark.parametrize("name", ["mlp", "sdpa", "conv"])
def test_hessian_gauss_newton_and_fisher_on_unequal_batches(name: str) -> None:
    """H - G (the curvature of the network itself), H + alpha F, and a family of a family; each on its own cut."""
    case = ZOO[name]().double()
    batches = cut(case.batch)
    with sdpa_kernel(SDPBackend.MATH):
        h, g, f = dense_hessian(case.model, case.batch, call(case)), dense_gauss_newton(case), dense_fisher(case)
    hessian = dyntune.hessian(case.model, batches, criterion=case.criterion)
    gauss_newton = dyntune.gauss_newton(case.model, batches[::-1], criterion=case.criterion)
    fisher = dyntune.empirical_fisher(case.model, case.batch, criterion=case.criterion)
    network = dyntune.affine(hessian, gauss_newton, alpha=-1.0)
    assert relative_error(network.to_dense(), h - g) < ROUNDING
    for alpha in (-2.0, 0.5):
        assert relative_error(dyntune.affine(hessian, fisher, alpha=alpha).to_dense(), h + alpha * f) < ROUNDING
    assert relative_error(dyntune.affine(network, fisher, alpha=3.0).to_dense(), h - g + 3 * f) < ROUNDING


@pytest.mark.parametrize("name", ["mlp", "sdpa", "conv"])
def test_eigenvalues_of_a_member(name: str) -> None:
    case = ZOO[name]().double()
    with sdpa_kernel(SDPBackend.MATH):
        dense = dense_hessian(case.model, case.batch, call(case)) + 0.7 * dense_fisher(case)
    family = dyntune.affine(
        dyntune.hessian(case.model, cut(case.batch), criterion=case.criterion),
        dyntune.empirical_fisher(case.model, cut(case.batch), criterion=case.criterion),
        alpha=0.7,
    )
    found = dyntune.eigenvalues(family, which="both", rtol=1e-6)
    truth = torch.linalg.eigvalsh(dense)
    torch.testing.assert_close(torch.as_tensor(found.values).double(), truth[[-1, 0]], rtol=1e-6, atol=0.0)


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


def test_its_method_names_both() -> None:
    case = ZOO["mlp"]()
    hessian = dyntune.hessian(case.model, case.batch, criterion=case.criterion, method="finite-difference")
    fisher = dyntune.empirical_fisher(case.model, case.batch, criterion=case.criterion)
    assert dyntune.affine(hessian, fisher, alpha=1.0).method == f"{hessian.method} + {fisher.method}"


def test_nothing_moves() -> None:
    case = ZOO["batchnorm"]()
    before = snapshot(case.model)
    hessian = dyntune.hessian(case.model, case.batch, criterion=case.criterion)
    fisher = dyntune.empirical_fisher(case.model, case.batch, criterion=case.criterion)
    family = dyntune.affine(hessian, fisher, alpha=0.5)
    family.matvec(family.space.normal(0))
    assert snapshot(case.model) == before


def test_refusals() -> None:
    one, two = DenseOperator(torch.eye(2)), DenseOperator(torch.eye(3))
    with pytest.raises(ShapeMismatchError, match="2 entries"):
        dyntune.affine(one, two, alpha=1.0)
    with pytest.raises(InvalidArgumentError, match="alpha=nan"):
        dyntune.affine(one, one, alpha=float("nan"))
    case = ZOO["mlp"]()
    whole = dyntune.hessian(case.model, case.batch, criterion=case.criterion)
    block = dyntune.empirical_fisher(case.model, case.batch, criterion=case.criterion, params="2.*")
    with pytest.raises(ShapeMismatchError, match="43 entries in 4 tensors, B on 18 in 2"):
        dyntune.affine(whole, block, alpha=1.0)


def test_two_sessions_on_one_low_precision_model_move_the_same_copies() -> None:
    case = ZOO["mlp"]()
    case.model.bfloat16()
    batch = (case.batch[0].bfloat16(), case.batch[1])
    before = snapshot(case.model)
    total = dyntune.affine(
        dyntune.hessian(case.model, batch, criterion=case.criterion),
        dyntune.gauss_newton(case.model, batch, criterion=case.criterion),
        alpha=-1.0,
    )
    v = total.space.normal(3)
    h = dyntune.hessian(case.model, batch, criterion=case.criterion) @ v
    g = dyntune.gauss_newton(case.model, batch, criterion=case.criterion) @ v
    # float32 products, formed twice: rounding
    torch.testing.assert_close(total @ v, [a - b for a, b in zip(h, g, strict=True)], rtol=1e-4, atol=1e-6)
    assert snapshot(case.model) == before
