"""``P^-1/2 H P^-1/2`` against dense matrices, and P against the steps that torch.optim takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dyntune
from dyntune.errors import InvalidArgumentError, OptimizerMismatchError, ShapeMismatchError
from dyntune.numerics.operator import DenseOperator
from dyntune.stability.scales import diagonal_scale
from tests.objective.oracle import dense_hessian, relative_error
from tests.objective.zoo import ZOO, Case, call, mlp

FACTORIES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.02),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.0, d=1e9),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_scale_predicts_the_step(name: str) -> None:
    """step = -lr m / P with the state after it; momentum is what the optimizer stores, or the gradient."""
    g = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(4, 3, generator=g, dtype=torch.float64))
    optimizer = FACTORIES[name]([w])
    for _ in range(40):
        w.grad = 0.1 * torch.randn(4, 3, generator=g, dtype=torch.float64)
        old, state = w.detach().clone(), optimizer.state[w]
        moved = state["acc_delta"].clone() if state and "acc_delta" in state else None
        size = float(w.detach().norm())
        optimizer.step()
    if moved is not None:
        state["acc_delta"].copy_(moved)  # Adadelta divides by the average before the step
    (scale,) = diagonal_scale(optimizer, [w], momentum_correction=True) or [None]
    assert scale is not None
    if name == "adafactor":
        scale = scale * float(w.detach().norm()) / size  # its relative step uses the norm before the step
    expected = -optimizer.param_groups[0]["lr"] * optimizer.state[w].get("exp_avg", w.grad) / scale
    # 40 float64 updates: rounding far below 1e-9 of a step
    torch.testing.assert_close(w.detach() - old, expected, rtol=1e-9, atol=0)


def trained(case: Case, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(25):
        optimizer.zero_grad()
        case.criterion(case.model(case.batch[0]), case.batch[1]).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["mlp", "sdpa", "conv"])
def test_equals_the_dense_matrix_on_unequal_batches(name: str) -> None:
    case = ZOO[name]().double()
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01)
    trained(case, optimizer)
    x, y = case.batch
    operator = dyntune.hessian(case.model, [(x[:2], y[:2]), (x[2:], y[2:])], criterion=case.criterion)
    states = [optimizer.state[p] for p in case.model.parameters()]
    p = torch.cat([((s["exp_avg_sq"] / (1 - 0.999**25)).sqrt() + 1e-8).reshape(-1) for s in states])
    truth = dense_hessian(case.model, case.batch, call(case)) / p.sqrt() / p.sqrt()[:, None]
    # Rounding of H over the smallest P: attention's key bias has no gradient, there P is eps = 1e-8.
    tolerance = 100 * torch.finfo(torch.float64).eps * max(1.0, 1e-2 / float(p.min()))
    assert relative_error(dyntune.preconditioned(operator, optimizer).to_dense(), truth) < tolerance
    assert relative_error(dyntune.preconditioned(operator, p).to_dense(), truth) < tolerance
    found = dyntune.sharpness(
        case.model, case.batch, criterion=case.criterion, optimizer=optimizer, quantities=("preconditioned",)
    )
    assert found.preconditioned is not None
    assert float(torch.linalg.eigvalsh(truth)[-1]) in found.preconditioned


def test_group_ratios_scale_their_block() -> None:
    """A group at a hundredth of the first's rate counts as if its P were a hundred times as large."""
    case = ZOO["mlp"]().double()
    first, second = list(case.model[0].parameters()), list(case.model[2].parameters())
    optimizer = torch.optim.SGD([{"params": first, "lr": 1.0}, {"params": second, "lr": 0.01}])
    operator = dyntune.hessian(case.model, case.batch, criterion=case.criterion)
    count = sum(p.numel() for p in first)
    ratios = torch.ones(operator.numel, dtype=torch.float64)
    ratios[count:] = 0.01
    truth = operator.to_dense() * ratios.sqrt() * ratios.sqrt()[:, None]
    assert relative_error(dyntune.preconditioned(operator, optimizer).to_dense(), truth) < 1e-12


def test_plain_sgd_has_no_preconditioner() -> None:
    case = ZOO["mlp"]()
    operator = dyntune.hessian(case.model, case.batch, criterion=case.criterion)
    same = dyntune.preconditioned(operator, torch.optim.SGD(case.model.parameters(), lr=3.0))
    assert torch.equal(same.to_dense(), operator.to_dense())


def test_refusals() -> None:
    case = ZOO["mlp"]()
    operator = dyntune.hessian(case.model, case.batch, criterion=case.criterion)
    with pytest.raises(InvalidArgumentError, match="has not stepped"):
        dyntune.preconditioned(operator, torch.optim.Adam(case.model.parameters()))
    with pytest.raises(OptimizerMismatchError, match="does not hold 4 of the 4"):
        dyntune.preconditioned(operator, torch.optim.SGD(mlp(seed=1).parameters(), lr=1.0))
    with pytest.raises(InvalidArgumentError, match="not positive and finite"):
        dyntune.preconditioned(operator, torch.zeros(operator.numel))
    with pytest.raises(ShapeMismatchError):
        dyntune.preconditioned(operator, torch.ones(operator.numel + 1))
    with pytest.raises(InvalidArgumentError, match="does not know which"):
        dyntune.preconditioned(DenseOperator(torch.eye(3)), torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=1.0))
    with pytest.raises(OptimizerMismatchError):
        dyntune.sharpness(
            case.model,
            case.batch,
            criterion=case.criterion,
            optimizer=torch.optim.SGD(mlp(seed=1).parameters(), lr=1.0),
        )
