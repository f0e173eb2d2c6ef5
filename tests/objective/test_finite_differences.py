"""Finite differences: how far off, what they report, and that they only read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.errors import HVPUnsupportedError
from dyntune.objective.hvp import FiniteDifference
from dyntune.objective.objective import Objective
from tests.objective.oracle import relative_error
from tests.objective.zoo import ZOO, Case, made, mlp, rows, truth

# The true error may exceed the reported one by this: the extrapolated value carries 1.2 times the rounding of the gap
# that is reported (sqrt(8^2 + 1) / 3 against sqrt(5)), and both fluctuate.
FACTOR = 2.0


def errors(name: str, case: Case, directions: int = 6) -> list[tuple[float, float]]:
    """(true, reported) relative errors of products with random directions."""
    objective = Objective(case.model, case.batch, criterion=case.criterion)
    found = []
    for key in range(directions):
        vector = objective.space.normal(7, key)
        differences = FiniteDifference()
        with differences.session(objective) as product:
            estimate = torch.cat([t.reshape(-1) for t in product(vector)])
        exact = truth(name) @ torch.cat([t.reshape(-1) for t in vector]).double()
        found.append((relative_error(estimate, exact), differences.worst_error))
    return found


@pytest.mark.parametrize("name", ZOO)
def test_float32_error_is_small_and_bounded_by_what_is_reported(name):
    for true, reported in errors(name, ZOO[name]()):
        assert true < 1e-3
        assert true < FACTOR * reported


@pytest.mark.parametrize("name", ZOO)
def test_float64_error_is_much_smaller(name):
    for true, reported in errors(name, ZOO[name]().double()):
        # Truncation of order h^4 = 2e-13 and rounding eps / h = 3e-13, times higher derivatives; measured below 1e-10.
        assert true < 1e-9
        assert true < FACTOR * reported


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_product_is_linear_in_the_length_of_the_vector(scale):
    case = ZOO["mlp"]()
    operator = dyntune.hessian(case.model, case.batch, criterion=case.criterion, method="finite-difference")
    vector = operator.space.normal(0)
    unit, scaled = (torch.cat([t.reshape(-1) for t in operator @ [s * v for v in vector]]) for s in (1.0, scale))
    # The step is a length along a unit direction, so only its own rounding (eps / h = 1e-5) is left.
    assert relative_error(scaled / scale, unit.double()) < 1e-4


def test_the_zero_vector_gives_zero():
    case = ZOO["mlp"]()
    operator = dyntune.hessian(case.model, case.batch, criterion=case.criterion, method="finite-difference")
    assert not (operator @ torch.zeros(operator.numel)).any()


def test_the_method_carries_the_largest_error_met():
    case = ZOO["mlp"]()
    operator = dyntune.hessian(case.model, case.batch, criterion=case.criterion, method="finite-difference")
    assert operator.method == "finite-difference"
    operator @ torch.ones(operator.numel)
    assert "finite-difference, estimated relative error" in operator.method
    assert float(operator.method.split()[-1]) < 1e-2


def test_dropout_has_common_random_numbers():
    model = made(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)))
    batch = (rows(16, 4), torch.arange(16) % 3)
    exact, differences = (
        dyntune.hessian(model, batch, criterion=nn.CrossEntropyLoss(), method=m) for m in ("exact", "finite-difference")
    )
    vector = torch.ones(exact.numel)
    # Without them the error is above 100%: two masks differ by far more than a step does.
    assert relative_error(differences @ vector, (exact @ vector).double()) < 1e-3


def test_parameters_and_the_flat_weights_of_an_lstm_are_only_read():
    case = ZOO["lstm"]()
    parameters = [(p, p.detach().clone(), p._version) for p in case.model.parameters()]
    flat = case.model.cells._flat_weights
    operator = dyntune.hessian(case.model, case.batch, criterion=case.criterion, method="finite-difference")
    operator @ torch.ones(operator.numel)
    for p, value, version in parameters:
        assert torch.equal(p, value)
        assert p._version == version
    assert case.model.cells._flat_weights is flat
    assert all(a is b for a, b in zip(flat, case.model.cells.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"method": "finite-difference"}, {"memory_limit": 0}], ids=["fd", "dual"])
def test_a_parameter_that_the_loss_reaches_past_the_model_is_refused(options):
    """Both engines put other tensors into the model; a list made earlier still holds the originals."""
    model = mlp()
    kept = list(model.parameters())

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.1 * sum(p.square().sum() for p in kept)

    operator = dyntune.hessian(model, (rows(8, 4), torch.arange(8) % 3), loss_fn, **options)
    with pytest.raises(HVPUnsupportedError, match=r"'0\.weight' not through the model.*for p in model\.parameters"):
        operator @ torch.ones(operator.numel)


def test_a_penalty_on_the_models_own_parameters_is_seen_by_every_engine():
    model, batch = mlp(), (rows(8, 4), torch.arange(8) % 3)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.5 * sum(p.square().sum() for p in model.parameters())

    plain = dyntune.hessian(model, batch, criterion=nn.CrossEntropyLoss()).to_dense().double()
    for options in ({}, {"memory_limit": 0}, {"method": "finite-difference"}):
        found = dyntune.hessian(model, batch, loss_fn, **options).to_dense()
        assert relative_error(found, plain + torch.eye(len(plain))) < 1e-3
