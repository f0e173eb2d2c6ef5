"""With neither loss_fn nor criterion: what shape and dtype determine, and what they do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyntune.errors import AmbiguousLossError
from dyntune.objective.objective import Objective
from tests.objective.zoo import classes, rows


class Returns(nn.Module):
    """Outputs of a given shape that depend on a parameter."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.scale, self.outputs = nn.Parameter(torch.ones(())), outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.outputs


def inferred(outputs: torch.Tensor, targets: torch.Tensor) -> Objective:
    return Objective(Returns(outputs), (torch.zeros(len(outputs), 1), targets))


IGNORED = torch.tensor([0, -100, 2, 1])

CLEAR = {
    "classes": (rows(4, 3), classes(4), F.cross_entropy),
    "classes, some ignored": (rows(4, 3), IGNORED, F.cross_entropy),
    "classes in dimension 1": (rows(4, 3, 5), classes(4, 5), F.cross_entropy),
    "images": (rows(2, 3, 5, 6), classes(2, 5, 6), F.cross_entropy),
    "classes last": (rows(4, 5, 3), classes(4, 5), lambda o, t: F.cross_entropy(o.transpose(1, 2), t)),
    "regression": (rows(4, 3), rows(4, 3, seed=9), F.mse_loss),
    "regression of one number": (rows(4), rows(4, seed=9), F.mse_loss),
}


@pytest.mark.parametrize(("outputs", "targets", "loss"), CLEAR.values(), ids=CLEAR)
def test_clear_cases(outputs, targets, loss):
    # float32 rounding of one mean
    assert inferred(outputs, targets).loss() == pytest.approx(loss(outputs, targets).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["classes, some ignored", "classes last"])
def test_inferred_classes_are_counted_as_cross_entropy_counts(name):
    outputs, targets, _ = CLEAR[name]
    assert inferred(outputs, targets).describe()["count_unit"] == "targets that are not ignore_index"


def test_inferred_classes_last_are_weighted_by_what_counts():
    model = nn.Linear(2, 3).double()
    x, y = rows(4, 5, 2).double(), classes(4, 5)
    y[:3] = -100
    y[0, 0] = 1
    parts = Objective(model, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert parts.loss() == pytest.approx(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item(), rel=1e-12)


UNCLEAR = {
    "as many steps as classes": (rows(4, 3, 3), classes(4, 3), "do not determine one"),
    "one output for two classes": (rows(4, 1), classes(4, high=2), "do not determine one"),
    "a class that has no output": (rows(4, 3), torch.tensor([0, 1, 2, 3]), "do not determine one"),
    "integers of the outputs' shape": (rows(4, 3), classes(4, 3), "do not determine one"),
    "zeros and ones": (
        rows(4, 3),
        (rows(4, 3) > 0).float(),
        "all targets 0 or 1: binary cross-entropy or a regression",
    ),
    "probabilities": (rows(4, 3), rows(4, 3).softmax(1), "that sum to 1: cross-entropy with class probabilities or a"),
    "probabilities, last": (rows(4, 5, 3), rows(4, 5, 3).softmax(-1), "that sum to 1"),
    "booleans": (rows(4, 3), rows(4, 3) > 0, "do not determine one"),
    "a column against a row": (
        rows(4, 1),
        rows(4),
        r"outputs \(4, 1\) torch.float32, targets \(4,\) torch.float32 do not",
    ),
    "other lengths": (rows(4, 3), rows(4, 2), "do not determine one"),
}


@pytest.mark.parametrize(("outputs", "targets", "message"), UNCLEAR.values(), ids=UNCLEAR)
def test_unclear_cases_are_refused_with_what_to_write(outputs, targets, message):
    advice = r"(.|\n)*criterion=torch\.nn\.CrossEntropyLoss\(\)(.|\n)*loss_fn=lambda model, batch"
    with pytest.raises(AmbiguousLossError, match=message + advice):
        inferred(outputs, targets)


def test_a_mapping_with_more_than_the_model_takes_is_ambiguous() -> None:
    """{"inputs": ..., "y": ...} with the loss computed outside: the line to write instead of a bare TypeError."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(2, 1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.out(inputs)

    with pytest.raises(AmbiguousLossError, match=r"unexpected keyword argument 'y'.*loss_fn=lambda"):
        Objective(Plain(), {"inputs": torch.ones(3, 2), "y": torch.ones(3, 1)})
