"""Two networks on which other libraries, or a plain residual test, go wrong."""

import copy
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from dyntune import hessian_eigenvalues
from tests.objective.oracle import dense_hessian
from tests.operators import wanted


def sequential(sizes: list[int], seed: int) -> nn.Sequential:
    """Tanh layers with torch's default initialisation; the global generator is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers[:-1])


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(64, 8, generator=g), torch.randint(4, (64,), generator=g)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_smallest_mlp_against_its_dense_hessian(seed):
    model, batch, criterion = sequential([8, 16, 4], seed), data(seed), nn.CrossEntropyLoss()
    truth = np.linalg.eigvalsh(dense_hessian(model, batch, lambda call, d: criterion(call(d[0]), d[1])).numpy())
    assert len(truth) == 212
    for k in (1, 3):
        found = hessian_eigenvalues(model, batch, criterion=criterion, k=k, which="both")
        assert found.converged
        expected = wanted(truth, "both", k)
        np.testing.assert_allclose(found.values.numpy(), expected, rtol=1e-2)
        slack = 1e-5 * truth[-1]  # a float32 Hessian is one within a few eps ||A||
        assert (found.low.numpy() <= expected + slack).all()
        assert (found.high.numpy() >= expected - slack).all()


class TestDigits:
    """64-256-256-10 at initialisation, 512 rows: 7 products of seed 1 give a residual below 5% and a value 6% low."""

    @staticmethod
    @cache
    def problem(seed: int):
        datasets = pytest.importorskip("sklearn.datasets")
        x, y = datasets.load_digits(return_X_y=True)
        batch = torch.from_numpy(x[:512]).float() / 16, torch.from_numpy(y[:512])
        model = sequential([64, 256, 256, 10], seed)
        return model, batch, TestDigits.reference(model, batch)

    @staticmethod
    def reference(model: nn.Module, batch) -> float:
        """lambda_max by ARPACK on float64 products of its own making."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        twin = copy.deepcopy(model).double()
        parameters = list(twin.parameters())
        loss = nn.functional.cross_entropy(twin(batch[0].double()), batch[1])
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])

        def product(v: np.ndarray) -> np.ndarray:
            parts = torch.autograd.grad(gradient, parameters, torch.from_numpy(v.reshape(-1)), retain_graph=True)
            return torch.cat([p.reshape(-1) for p in parts]).numpy()

        n = gradient.numel()
        operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(n)
        return float(eigsh(operator, k=1, which="LA", tol=1e-7, v0=start, return_eigenvectors=False)[0])

    @pytest.mark.parametrize("model_seed", [0, 1])
    def test_never_claimed_while_more_than_one_percent_low(self, model_seed):
        model, batch, truth = self.problem(model_seed)
        for seed in range(6):
            found = hessian_eigenvalues(model, batch, criterion=nn.CrossEntropyLoss(), seed=seed)
            assert found.converged
            assert float(found) == pytest.approx(truth, rel=1e-2)
            assert found.low[0] <= truth * (1 + 1e-5)
            assert found.high[0] >= truth * (1 - 1e-5)

    def test_not_claimed_on_the_way(self):
        model, batch, truth = self.problem(1)
        for budget in range(2, 13):
            found = hessian_eigenvalues(model, batch, criterion=nn.CrossEntropyLoss(), seed=1, max_products=budget)
            assert not found.converged or float(found) == pytest.approx(truth, rel=1e-2)
            assert found.low[0] - 1e-5 <= truth <= found.high[0] + 1e-5
