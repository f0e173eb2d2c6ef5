"""The four engines against a dense float64 Hessian, on everything in the zoo."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from dyntune.numerics.operator import LinearOperator, Product
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


class Operator(LinearOperator):
    """One engine, whatever the rule would choose."""

    def __init__(self, objective: Objective, engine: Callable[[Objective], AbstractContextManager[Product]]) -> None:
        super().__init__(objective.space)
        self.objective, self.engine = objective, engine

    def session(self) -> AbstractContextManager[Product]:
        return self.engine(self.objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("name", ZOO)
def test_exact_engines_give_the_dense_hessian(name, engine, dtype):
    case = ZOO[name]() if dtype == torch.float32 else ZOO[name]().double()
    objective = Objective(case.model, case.batch, criterion=case.criterion)
    assert relative_error(Operator(objective, EXACT[engine]).to_dense(), truth(name)) < ROUNDING[dtype]


@pytest.mark.parametrize("name", ZOO)
def test_objective_hvp_is_a_column_of_the_hessian(name):
    case = ZOO[name]().double()
    objective = Objective(case.model, case.batch, criterion=case.criterion)
    vector = objective.space.normal(3)
    flat = torch.cat([t.reshape(-1) for t in vector])
    found = torch.cat([t.reshape(-1) for t in objective.hvp(vector)])
    assert relative_error(found, truth(name) @ flat) < ROUNDING[torch.float64]
