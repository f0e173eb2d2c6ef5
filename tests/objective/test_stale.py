"""A model that changes under an operator: noticed, named, and never measured half and half."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import dyntune
from dyntune.errors import StaleOperatorError
from tests.objective.zoo import mlp, rows

BATCH = (rows(12, 4), torch.arange(12) % 3)
ENGINES = {
    "retained graph": {},
    "re-forward": {"memory_limit": 10**5},
    "forward over reverse": {"memory_limit": 0},
    "finite differences": {"method": "finite-difference"},
}


def operator(model: nn.Module, engine: str = "retained graph") -> dyntune.HessianOperator:
    batches = [BATCH] * 100 if engine == "re-forward" else BATCH
    made = dyntune.hessian(model, batches, criterion=nn.CrossEntropyLoss(), **ENGINES[engine])
    assert made.engine == engine.replace(" ", "-").replace("differences", "difference")
    return made


def products_around(subject: dyntune.HessianOperator, change: Callable[[], object], *, again: bool = False) -> None:
    """A product, the change, and maybe another product, in one session."""
    vector = subject.space.normal(0)
    with subject.session() as product:
        product(vector)
        change()
        if again:
            product(vector)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_within_a_session(engine):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    subject = operator(model, engine)

    def step() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    with pytest.raises(StaleOperatorError, match=r"'0\.weight' was changed while.*before optimizer\.step\(\)"):
        products_around(subject, step, again=True)


def test_a_step_after_the_last_product_is_noticed_at_the_end():
    model = mlp()
    subject = operator(model)
    with pytest.raises(StaleOperatorError, match=r"'2\.bias' was changed while"):
        products_around(subject, lambda: nn.init.ones_(model[2].bias))


WRITES = {
    "added": lambda data: data.add_(1e-7),
    "sign": lambda data: data.neg_(),
    "order": lambda data: data.copy_(data.flip(0)),
    "nan": lambda data: data.fill_(float("nan")),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_through_data_is_noticed_at_the_end(write):
    model = mlp()
    subject = operator(model)
    with pytest.raises(StaleOperatorError, match=r"'0\.weight' was changed through \.data"):
        products_around(subject, lambda: write(model[0].weight.data))


def test_a_tensor_put_in_place_through_data_is_noticed():
    model = mlp()
    subject = operator(model)
    with pytest.raises(StaleOperatorError, match=r"'0\.bias' was changed through \.data"), subject.session():
        model[0].bias.data = torch.zeros(5)


def test_an_exception_of_the_users_is_not_hidden_by_a_stale_model():
    model = mlp()
    subject = operator(model)

    def fail() -> None:
        model[0].weight.data.neg_()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        products_around(subject, fail)


def test_between_sessions_the_model_may_train():
    model = mlp()
    subject = operator(model)
    before = subject.to_dense()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    after = subject.to_dense()
    assert torch.equal(after, operator(model).to_dense())
    assert not torch.equal(after, before)


def replaced(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.zeros(5, 4))


def assigned(model: nn.Module) -> None:
    model.load_state_dict(mlp(seed=2).state_dict(), assign=True)


def frozen(model: nn.Module) -> None:
    model[0].requires_grad_(False)


@pytest.mark.parametrize("change", [replaced, assigned, frozen, nn.Module.double])
def test_a_parameter_that_is_no_longer_the_one_is_refused(change):
    """Otherwise the old tensor has no part in the loss and its rows of the Hessian would be zero."""
    model = mlp()
    subject = operator(model)
    change(model)
    message = r"'0\.weight' was replaced, converted, moved or frozen since.*Make a new one"
    with pytest.raises(StaleOperatorError, match=message):
        subject @ torch.ones(subject.numel)
    with pytest.raises(StaleOperatorError, match=message):
        subject.objective.loss()
    with pytest.raises(StaleOperatorError, match=message):
        subject.objective.gradient()


def test_a_parameter_that_was_not_selected_may_be_replaced():
    model = mlp()
    subject = dyntune.hessian(model, BATCH, criterion=nn.CrossEntropyLoss(), params="2.*")
    replaced(model)
    assert torch.isfinite(subject.to_dense()).all()
