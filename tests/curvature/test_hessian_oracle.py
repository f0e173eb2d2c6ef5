"""The Hessian operator against dense Hessians and a closed form, over unequal batches."""

import numpy as np
import pytest
import torch
from torch import nn

from dyntune import hessian, hessian_eigenvalues
from tests.objective.oracle import dense_hessian, relative_error
from tests.objective.zoo import ZOO, call

EPS = torch.finfo(torch.float64).eps


def ragged(case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The case's batch in two or three pieces of different size."""
    x, y = case.batch
    sizes = [1, 2, len(x) - 3]
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("name", ["mlp", "conv", "sdpa"])
class TestAgainstADenseHessian:
    def test_over_unequal_batches(self, name):
        case = ZOO[name]().double()
        truth = dense_hessian(case.model, case.batch, call(case))
        operator = hessian(case.model, ragged(case), criterion=case.criterion)
        found = operator.to_dense()
        assert relative_error(found, truth) < 1e-12
        assert relative_error(found.T, truth) < 1e-12
        assert operator.shape == (len(truth), len(truth))

    def test_a_subset_of_the_parameters_is_the_block(self, name):
        case = ZOO[name]().double()
        truth = dense_hessian(case.model, case.batch, call(case))
        numels = {n: p.numel() for n, p in case.model.named_parameters()}
        for pattern in ("*.weight", "*.bias", next(iter(numels))):
            operator = hessian(case.model, ragged(case), criterion=case.criterion, params=pattern)
            inside = torch.cat([torch.full((size,), n in operator.names) for n, size in numels.items()])
            assert 0 < int(inside.sum()) == operator.numel < len(truth)
            assert relative_error(operator.to_dense(), truth[inside][:, inside]) < 1e-12

    def test_u_hv_is_v_hu(self, name):
        case = ZOO[name]().double()
        operator = hessian(case.model, ragged(case), criterion=case.criterion)
        g = torch.Generator().manual_seed(0)
        u, v = torch.randn(2, operator.numel, generator=g, dtype=torch.float64)
        hu, hv = operator @ u, operator @ v
        # Each side sums n terms that are right to eps |H| |u|.
        assert abs(float(u @ hv - v @ hu)) < 100 * EPS * float(u.norm() * hv.norm())

    def test_eigenvalues(self, name):
        case = ZOO[name]().double()
        truth = np.linalg.eigvalsh(dense_hessian(case.model, case.batch, call(case)).numpy())
        found = hessian_eigenvalues(case.model, ragged(case), criterion=case.criterion, k=2, which="both", rtol=1e-6)
        assert found.converged
        np.testing.assert_allclose(found.values, [truth[-1], truth[-2], truth[0], truth[1]], rtol=1e-6)
        for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
            operator = hessian(case.model, case.batch, criterion=case.criterion)
            defect = [h - value * v for h, v in zip(operator @ vector, vector, strict=True)]
            norm = float(torch.cat([t.reshape(-1) for t in defect]).norm())
            assert norm <= 1.01 * float(residual) + 1e-12


@pytest.mark.parametrize("outputs", [1, 3])
def test_linear_regression_has_a_closed_form(outputs):
    """H = 2 / (N * out) I (x) X'X for the mean over rows and outputs."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 6, generator=g).double(), torch.randn(20, outputs, generator=g).double()
    model = nn.Linear(6, outputs, bias=False).double()
    expected = 2 / (20 * outputs) * torch.kron(torch.eye(outputs), x.T @ x)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    assert relative_error(hessian(model, batches, criterion=nn.MSELoss()).to_dense(), expected) < 1e-14
    top = float(torch.linalg.eigvalsh(x.T @ x)[-1]) * 2 / (20 * outputs)
    found = hessian_eigenvalues(model, batches, criterion=nn.MSELoss(), k=outputs, rtol=1e-8)
    np.testing.assert_allclose(found.values, np.full(outputs, top), rtol=1e-8)  # as often as there are outputs


def test_softmax_regression_has_a_closed_form():
    """For the bias alone: the mean over rows of diag(p) - p p'."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(9, 5, generator=g).double(), torch.randint(4, (9,), generator=g)
    model = nn.Linear(5, 4).double()
    p = model(x).softmax(1).detach()
    expected = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    found = hessian(model, [(x[:2], y[:2]), (x[2:], y[2:])], criterion=nn.CrossEntropyLoss(), params="bias")
    assert relative_error(found.to_dense(), expected) < 1e-14
