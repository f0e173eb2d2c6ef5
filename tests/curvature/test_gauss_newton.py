"""Gauss-Newton against ``J^T H_z J`` made from dense float64 Jacobians, on unequal batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import dyntune
from dyntune.errors import HVPUnsupportedError
from tests.objective.oracle import dense_hessian, relative_error
from tests.objective.snapshot import snapshot
from tests.objective.zoo import ZOO, Case, call, mlp, rows


def dense(case: Case) -> torch.Tensor:
    """J^T H_z J in float64, z all outputs at once."""
    parameters = {n: p.detach() for n, p in case.model.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]
    x, y = case.batch

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        parts = {n: f.view_as(p) for (n, p), f in zip(parameters.items(), flat.split(sizes), strict=True)}
        result: torch.Tensor = functional_call(case.model, parts, (x,))
        return result.reshape(-1)

    flat = torch.cat([p.reshape(-1) for p in parameters.values()])
    z = outputs(flat)
    shape = case.model(x).shape
    curved = torch.autograd.functional.hessian(lambda z: case.criterion(z.view(shape), y), z)
    jacobian = torch.autograd.functional.jacobian(outputs, flat)
    return jacobian.T @ curved @ jacobian


@pytest.mark.parametrize("name", ["mlp", "sdpa", "encoder, eval", "conv", "tied"])
def test_equals_the_dense_matrix(name: str) -> None:
    case = ZOO[name]().double()
    x, y = case.batch
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = dense(case)
    cut = len(x) // 3
    whole = dyntune.gauss_newton(case.model, case.batch, criterion=case.criterion)
    ragged = dyntune.gauss_newton(case.model, [(x[:cut], y[:cut]), (x[cut:], y[cut:])], criterion=case.criterion)
    # float64 products with different orders of summation
    assert relative_error(whole.to_dense(), truth) < 1e-12
    assert relative_error(ragged.to_dense(), truth) < 1e-12


def test_is_the_hessian_where_the_model_is_linear_in_its_parameters() -> None:
    model = nn.Linear(4, 3).double()
    batch = (rows(10, 4).double(), torch.arange(10) % 3)
    found = dyntune.gauss_newton(model, batch, criterion=nn.CrossEntropyLoss()).to_dense()
    truth = dense_hessian(model, batch, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    assert relative_error(found, truth) < 1e-12


def test_is_positive_semidefinite_where_the_hessian_is_not() -> None:
    case = ZOO["mlp"]().double()
    gauss_newton = dyntune.gauss_newton(case.model, case.batch, criterion=case.criterion)
    lowest = float(torch.linalg.eigvalsh(gauss_newton.to_dense())[0])
    hessian_lowest = float(torch.linalg.eigvalsh(dense_hessian(case.model, case.batch, call(case)))[0])
    assert hessian_lowest < -1e-3 < -1e-14 < lowest


def test_a_loss_that_goes_past_the_outputs_is_refused() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + sum(
            p.square().sum() for p in model.parameters()
        )

    case = ZOO["mlp"]()
    operator = dyntune.gauss_newton(case.model, case.batch, loss_fn)
    with pytest.raises(HVPUnsupportedError, match=r"does not pass through the model's output"):
        operator.matvec(operator.space.normal(0))


def test_outputs_that_carry_their_own_loss() -> None:
    """Hugging Face style: the loss in the output is no output to linearise."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp().double()

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.inner(inputs)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Own()
    x, y = ZOO["mlp"]().double().batch
    found = dyntune.gauss_newton(model, {"inputs": x, "labels": y}).to_dense()
    truth = dyntune.gauss_newton(model.inner, (x, y), criterion=nn.CrossEntropyLoss()).to_dense()
    assert relative_error(found, truth) < 1e-12


def test_nothing_moves() -> None:
    case = ZOO["batchnorm"]()
    before = snapshot(case.model)
    operator = dyntune.gauss_newton(case.model, case.batch, criterion=case.criterion)
    dyntune.eigenvalues(operator)
    assert snapshot(case.model) == before
    assert not case.model._forward_hooks
