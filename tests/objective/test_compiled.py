"""Compiled code cannot be differentiated twice: measurements run it eagerly, and it stays compiled for the user."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.objective.context import unwrap
from tests.objective.oracle import relative_error
from tests.objective.zoo import made, rows

BATCH = (rows(12, 4), torch.arange(12) % 3)
CRITERION = {"criterion": nn.CrossEntropyLoss()}


class Net(nn.Module):
    """A class of the user's own: frames of torch.nn would be skipped by the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def compiled_whole() -> nn.Module:
    return torch.compile(made(Net), backend="aot_eager")


def compiled_in_place() -> nn.Module:
    model = made(Net)
    model.compile(backend="aot_eager")
    return model


def compiled_part() -> nn.Module:
    return nn.Sequential(torch.compile(made(Net), backend="aot_eager"))


@pytest.mark.parametrize("build", [compiled_whole, compiled_in_place, compiled_part])
def test_a_compiled_model_is_measured_exactly(build):
    model = build()
    truth = dyntune.hessian(made(Net), BATCH, **CRITERION).to_dense().double()
    loss = F.cross_entropy(model(BATCH[0]), BATCH[1])
    operator = dyntune.hessian(model, BATCH, **CRITERION, method="exact")
    assert relative_error(operator.to_dense(), truth) < 10 * torch.finfo(torch.float32).eps
    assert set(operator.names) <= {f"{p}{n}" for p in ("", "0.") for n, _ in Net().named_parameters()}
    # The user's own compiled graph is alive and still compiled.
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_compiled_loss_function_too():
    @torch.compile(backend="aot_eager")
    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    model = made(Net)
    loss_fn(model, BATCH)
    truth = dyntune.hessian(model, BATCH, **CRITERION).to_dense().double()
    found = dyntune.hessian(model, BATCH, loss_fn, method="exact").to_dense()
    assert relative_error(found, truth) < 10 * torch.finfo(torch.float32).eps


def test_wrappers_are_looked_through():
    model = made(Net)
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(model) is model
