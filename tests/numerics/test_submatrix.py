"""Principal submatrices: against the dense matrix, interlacing, and windows that cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dyntune
from dyntune.curvature.hessian import hessian
from dyntune.errors import InvalidArgumentError
from dyntune.numerics.operator import DenseOperator
from dyntune.numerics.submatrix import Submatrix, Window


def test_a_block_of_a_hessian_is_that_of_the_dense_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    whole = hessian(model, (torch.randn(8, 3).double(), torch.randn(8, 2).double()), criterion=nn.MSELoss())
    dense = whole.to_dense()
    places = torch.arange(whole.numel).split([p.numel() for p in model.parameters()])
    shaped = [place.view(p.shape) for place, p in zip(places, model.parameters(), strict=True)]
    windows = [Window(0, 1, 3), Window(2, 0, 2, dim=1), Window(3, 1, 2)]
    chosen = torch.cat([w.of(shaped).reshape(-1) for w in windows])
    block = Submatrix(whole, windows)
    assert torch.allclose(block.to_dense(), dense[chosen][:, chosen], atol=1e-12)
    found = dyntune.eigenvalues(block, 1, rtol=1e-6)
    assert float(found.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(dense[chosen][:, chosen])[-1]), rel=1e-6)
    assert float(found.values[0]) <= float(torch.linalg.eigvalsh(dense)[-1]) * (1 + 1e-9)


def test_all_windows_are_the_whole() -> None:
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    matrix = matrix + matrix.T
    block = Submatrix(DenseOperator(matrix), [Window(0, 3, 6), Window(0, 0, 3)])
    order = [3, 4, 5, 0, 1, 2]
    assert torch.equal(block.to_dense(), matrix[order][:, order])


def test_windows_that_cannot_be() -> None:
    whole = DenseOperator(torch.eye(3))
    for windows, match in (
        ([], "empty"),
        ([Window(0, 0, 4)], "does not lie"),
        ([Window(1, 0, 1)], "does not lie"),
        ([Window(0, 2, 2)], "does not lie"),
        ([Window(0, 0, 1, dim=1)], "does not lie"),
        ([Window(0, 0, 2), Window(0, 1, 3)], "overlaps"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            Submatrix(whole, windows)
