"""An operator holds no graph: what a forward pass made is gone when the measurement is."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import dyntune
from tests.objective.measurements import MEASUREMENTS
from tests.objective.zoo import made, rows

BATCHES = [(rows(8, 4, seed=s), torch.arange(8) % 3) for s in range(2)]


class Watched(nn.Module):
    """Remembers its activations weakly, and the last one strongly, as models with an auxiliary loss do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.seen: list[weakref.ref] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        self.seen.append(weakref.ref(hidden))
        self.auxiliary = hidden
        return self.last(hidden)


@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_no_activation_outlives_a_measurement(measure):
    model = made(Watched)
    result = measure(model, BATCHES, {"criterion": nn.CrossEntropyLoss()})
    gc.collect()
    assert len(model.seen) >= 4
    assert [ref() for ref in model.seen if ref() is not None] == []
    assert not result.requires_grad


def test_an_open_session_holds_the_graph_and_a_closed_one_does_not():
    model = made(Watched)
    operator = dyntune.hessian(model, BATCHES, criterion=nn.CrossEntropyLoss())
    with operator.session() as product:
        product(operator.space.normal(0))
        assert sum(ref() is not None for ref in model.seen) == 2
    del product
    gc.collect()
    assert sum(ref() is not None for ref in model.seen) == 0


def test_the_loss_of_many_batches_keeps_one_graph_at_a_time():
    model = made(Watched)
    alive = []

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in model.seen[:-1]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    objective = dyntune.hessian(model, BATCHES * 5, loss_fn).objective
    alive.clear()
    objective.loss()
    assert len(alive) == 10
    assert max(alive) <= 1
