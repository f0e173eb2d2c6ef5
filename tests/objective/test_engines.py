"""The four engines against a dense float64 Hessian, on everything in the zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dyntune.numerics.operator import Product
from dyntune.objective.hvp import (
    forward_over_reverse_session,
    reforward_session,
    retained_graph_session,
)
from dyntune.objective.objective import Objective
from tests.objective.oracle import relative_error
from tests.objective.zoo import ZOO, truth

EXACT = {
    "retained graph": retained_graph_session,
    "re-forward": reforward_session,
    "forward over reverse": forward_over_reverse_session,
}
# Ten machine epsilons: sums of at most a few hundred terms through a few layers; measured worst 2e-7 and 4e-16.
ROUNDING = {dtype: 10 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def flat(vector: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in vector])


def products(objective: Objective, engine: Callable[[Objective], AbstractContextManager[Product]]) -> torch.Tensor:
    """The Hessian times sixteen random vectors, which have a part of every column."""
    with engine(objective) as product:
        return torch.stack([flat(product(objective.space.normal(key))) for key in range(16)], dim=1)


def directions(objective: Objective) -> torch.Tensor:
    """Those vectors."""
    return torch.stack([flat(objective.space.normal(key)) for key in range(16)], dim=1).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("name", ZOO)
def test_exact_engines_give_the_dense_hessian(name, engine, dtype):
    case = ZOO[name]() if dtype == torch.float32 else ZOO[name]().double()
    objective = Objective(case.model, case.batch, criterion=case.criterion)
    found = products(objective, EXACT[engine])
    assert relative_error(found, truth(name) @ directions(objective)) < ROUNDING[dtype]


@pytest.mark.parametrize("name", ZOO)
def test_the_objectives_own_product(name):
    case = ZOO[name]().double()
    objective = Objective(case.model, case.batch, criterion=case.criterion)
    vector = objective.space.normal(3)
    assert relative_error(flat(objective.hvp(vector)), truth(name) @ flat(vector)) < ROUNDING[torch.float64]


@pytest.mark.parametrize("name", ZOO)
def test_the_gradient_is_that_of_the_loss(name):
    case = ZOO[name]().double()
    found = Objective(case.model, case.batch, criterion=case.criterion).gradient()
    with sdpa_kernel(SDPBackend.MATH):
        loss = case.criterion(case.model(case.batch[0]), case.batch[1])
        truth = torch.autograd.grad(loss, [p for p in case.model.parameters() if p.requires_grad])
    assert relative_error(flat(found), flat(truth)) < ROUNDING[torch.float64]
