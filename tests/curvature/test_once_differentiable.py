"""Curvature along the step of a model whose second derivative lacks terms: right, or refused, never silently less."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dyntune
from dyntune.errors import HVPUnsupportedError
from tests.objective.test_custom_functions import BATCH, Detached, Net, Normed, Once, Raises, Square
from tests.objective.zoo import made

X, Y = BATCH
BATCHES = [(X[i : i + 3], Y[i : i + 3]) for i in range(0, 12, 3)]


def measured(model: nn.Module, quantity: str) -> dyntune.Estimate:
    found = dyntune.sharpness(model, BATCHES, criterion=nn.CrossEntropyLoss(), quantities=(quantity,))
    return found.estimates[quantity]


@pytest.mark.parametrize("quantity", ["batch", "directional"])
@pytest.mark.parametrize(
    ("build", "cause"),
    [
        (lambda: Net(Once.apply), "marked with @once_differentiable"),
        (lambda: Net(Raises.apply), "square_backward has no derivative"),
        (lambda: Net(Detached.apply), "the second derivative of Detached is wrong"),
        (Normed, "the second derivative of weight_norm is wrong"),
    ],
    ids=["marked", "raises", "detaches", "weight_norm"],
)
def test_a_missing_term_is_refused(build, cause, quantity):
    with pytest.raises(HVPUnsupportedError, match=cause) as caught:
        measured(made(build), quantity)
    # Measuring with quantities= has no method to choose between: the advice has to fit where it is read.
    assert "critical_lr" in str(caught.value)


@pytest.mark.parametrize("quantity", ["batch", "directional"])
def test_a_sound_function_of_the_users_own_is_measured(quantity):
    found = measured(made(lambda: Net(Square.apply)), quantity)
    plain = measured(made(lambda: Net(lambda a: a * a)), quantity)
    # Two sums of some tens of terms in float32.
    assert float(found) == pytest.approx(float(plain), rel=100 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("quantity", ["batch", "directional"])
def test_an_operation_of_torchs_without_a_second_derivative_is_refused_in_words(quantity):
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(self.inner(x), torch.eye(3))

    with pytest.raises(HVPUnsupportedError, match="_cdist_backward"):
        measured(made(Distances), quantity)
