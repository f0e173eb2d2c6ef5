"""J of a model whose own backward passes hide terms is refused; an honest one passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import dyntune
from dyntune.errors import HVPUnsupportedError
from tests.objective.oracle import relative_error

CE = nn.CrossEntropyLoss()


class Honest(torch.autograd.Function):
    """x^2 with a backward that autograd can follow."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Once(Honest):
    """Says that it cannot be followed."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Detached(Honest):
    """Cannot be followed, and does not say so."""

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return (2 * x * g).detach()


class Net(nn.Module):
    """The function in mid-network, beside a path without it; a softmax at the end, whose outputs add up to one."""

    def __init__(self, square: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.square = square

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + self.square(h)).softmax(1)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2


@pytest.mark.parametrize("make", [dyntune.gauss_newton, dyntune.empirical_fisher])
@pytest.mark.parametrize("function", [Once, Detached])
def test_a_backward_that_hides_terms_is_refused(make: Any, function: Any) -> None:
    operator = make(Net(function.apply), batch(), criterion=CE)
    with pytest.raises(HVPUnsupportedError, match=r"once_differentiable|hides part of the graph"):
        operator @ torch.ones(operator.numel)


@pytest.mark.parametrize("make", [dyntune.gauss_newton, dyntune.empirical_fisher])
def test_an_honest_function_is_right(make: Any) -> None:
    plain, own = (make(Net(f), batch(), criterion=CE) for f in (torch.square, Honest.apply))
    v = torch.linspace(-1, 1, plain.numel)
    assert relative_error(own @ v, plain @ v) < 1e-5  # float32 rounding of a few operations


@pytest.mark.parametrize("make", [dyntune.gauss_newton, dyntune.empirical_fisher])
def test_a_loss_that_does_not_repeat_is_refused(make: Any) -> None:
    draws = torch.Generator().manual_seed(0)

    def noisy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return CE(outputs + 0.1 * torch.randn(outputs.shape, generator=draws), targets)

    operator = make(Net(torch.square), batch(), criterion=noisy)
    with pytest.raises(dyntune.errors.NondeterministicLossError, match="no one function"):
        operator @ torch.ones(operator.numel)
