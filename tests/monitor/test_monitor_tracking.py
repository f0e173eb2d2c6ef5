"""Following the largest eigenvalue through training, against a fresh full solve each time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.curvature.hessian import HessianOperator
from dyntune.curvature.preconditioned import PreconditionedOperator
from dyntune.errors import NonFiniteError
from dyntune.monitor.tracking import EigenvalueTracker
from dyntune.numerics.operator import LinearOperator
from dyntune.numerics.vectors import VectorSpace
from dyntune.objective.objective import Objective
from dyntune.records import Status
from dyntune.stability.scales import diagonal_scale


class Diagonal(LinearOperator):
    """Known eigenvalues."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__(VectorSpace.of([values]))
        self.values = values
        self.products = 0

    def session(self):
        from contextlib import nullcontext

        def product(vector):
            self.products += 1
            return [vector[0] * self.values]

        return nullcontext(product)


def spectrum(*top: float) -> torch.Tensor:
    return torch.cat([torch.tensor(top, dtype=torch.float64), torch.linspace(1.0, -0.5, 200, dtype=torch.float64)])


def test_an_unchanged_operator_is_followed_with_four_products():
    tracker = EigenvalueTracker()
    found = [tracker.measure(Diagonal(spectrum(10.0, 4.0))) for _ in range(8)]
    followed = [f for f in found if not f.proven]
    assert len(followed) >= 3
    assert {f.num_products for f in followed} == {4}
    for f in found:
        assert float(f.estimate) == pytest.approx(10.0, rel=1e-2)
        assert f.estimate.status is (Status.OK if f.proven else Status.UNCERTAIN)


def test_what_is_counted_is_what_was_spent():
    tracker, operator = EigenvalueTracker(), Diagonal(spectrum(10.0, 4.0))
    spent = sum(tracker.measure(operator).num_products for _ in range(8))
    assert spent == operator.products


def test_the_value_is_a_lower_bound_and_the_interval_holds_it():
    tracker = EigenvalueTracker()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = spectrum(10.0, 4.0) * (1 + 0.02 * torch.rand(202, generator=generator, dtype=torch.float64))
        found = tracker.measure(Diagonal(values)).estimate
        assert float(found) <= float(values.max()) * (1 + 1e-9)  # Rayleigh quotients are, to rounding
        assert float(values.max()) in found


def test_a_jump_is_proven_at_once():
    tracker = EigenvalueTracker()
    for _ in range(6):
        tracker.measure(Diagonal(spectrum(10.0, 4.0)))
    assert tracker.measure(Diagonal(spectrum(12.0, 4.0))).proven


def test_one_that_overtakes_is_found_by_the_next_proof():
    tracker = EigenvalueTracker()
    for _ in range(6):
        tracker.measure(Diagonal(spectrum(10.0, 4.0)))
    found = [tracker.measure(Diagonal(spectrum(10.0, 14.0))) for _ in range(10)]
    assert any(f.proven for f in found)
    assert float(found[-1].estimate) == pytest.approx(14.0, rel=1e-2)


def test_not_finite_products_are_an_error_and_forgotten():
    tracker = EigenvalueTracker()
    for _ in range(3):
        tracker.measure(Diagonal(spectrum(10.0)))
    with pytest.raises(NonFiniteError):
        tracker.measure(Diagonal(spectrum(float("nan"))))
    assert tracker.measure(Diagonal(spectrum(10.0))).proven


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_every_ten_steps_of_a_thousand(name, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 5))
        x, w, noise = torch.randn(512, 20), torch.randn(20, 5), torch.randn(512, 5)
        order = torch.randint(512, (1000, 64))
    y = (x @ w + 0.5 * noise).argmax(1)
    makers = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "Adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    }
    optimizer = makers[name](model.parameters())
    objective = Objective(model, (x[:128], y[:128]), criterion=nn.CrossEntropyLoss())
    hessian, tracker = HessianOperator(objective), EigenvalueTracker()
    products, unflagged, flagged = [], [], []
    for step in range(1000):
        optimizer.zero_grad()
        F.cross_entropy(model(x[order[step]]), y[order[step]]).backward()
        optimizer.step()
        if step % 10 == 0:
            operator = PreconditionedOperator(hessian, diagonal_scale(optimizer, objective.tensors))
            found = tracker.measure(operator)
            fresh = dyntune.eigenvalues(operator, rtol=1e-3, seed=step)
            products.append(found.num_products)
            if abs(float(found.estimate) / float(fresh) - 1) > 0.02:
                (unflagged if found.estimate.status is Status.OK else flagged).append(step)
    assert sorted(products)[50] <= 4
    assert unflagged == []
    assert len(flagged) <= 5
