"""One evaluation more tells whether the loss is a function; generators that modules hold are seeded and put back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.errors import NondeterministicLossError
from dyntune.objective.objective import REPEAT_TOLERANCE, Objective
from tests.objective.zoo import made, rows

BATCH = (rows(8, 4), torch.arange(8) % 3)
CRITERION = {"criterion": nn.CrossEntropyLoss()}


class Counted(nn.Module):
    """Counts its forward passes, in something that is not put back."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.passes = nn.Linear(4, 3), [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes[0] += 1
        return self.net(x)


class Drawing(nn.Module):
    """Adds one random number, from a generator of its own, to the logits of the first class."""

    def __init__(self, generator: Any, draw: Callable[[Any], float]) -> None:
        super().__init__()
        self.net, self.generator, self.draw = nn.Linear(4, 3), generator, draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + self.draw(self.generator) * torch.tensor([1.0, 0.0, 0.0])


GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any], Any]]] = {
    "torch": (
        lambda: torch.Generator().manual_seed(1),
        lambda g: float(torch.rand((), generator=g)),
        lambda g: g.get_state().tolist(),
    ),
    "numpy": (lambda: np.random.default_rng(1), lambda g: g.random(), lambda g: str(g.bit_generator.state)),
    "numpy, legacy": (lambda: np.random.RandomState(1), lambda g: g.rand(), lambda g: str(g.get_state())),
    "python": (lambda: random.Random(1), lambda g: g.random(), lambda g: g.getstate()),
}


@pytest.mark.parametrize(("make", "draw", "state"), GENERATORS.values(), ids=GENERATORS)
def test_a_generator_that_a_module_holds_is_seeded_and_put_back(make, draw, state):
    generator = make()
    draw(generator)
    before = state(generator)
    model = made(lambda: Drawing(generator, draw))
    found = [dyntune.hessian(model, BATCH, **CRITERION).to_dense() for _ in range(2)]
    assert torch.equal(*found)
    assert state(generator) == before
    # The seed decides, and not where the generator happens to stand.
    draw(generator)
    assert torch.equal(dyntune.hessian(model, BATCH, **CRITERION).to_dense(), found[0])
    assert not torch.equal(dyntune.hessian(model, BATCH, **CRITERION, seed=1).to_dense(), found[0])


@pytest.mark.parametrize("options", [{}, {"memory_limit": 0}, {"method": "finite-difference"}])
def test_a_loss_that_counts_is_refused_by_every_engine(options):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return F.cross_entropy(model(batch[0]), batch[1]) * (1 + 0.01 * len(calls))

    operator = dyntune.hessian(made(lambda: nn.Linear(4, 3)), BATCH, loss_fn, **options)
    with pytest.raises(NondeterministicLossError, match=r"gave 1\.\d+ and 1\.\d+.*keep counters in buffers"):
        operator @ torch.ones(operator.numel)


def test_the_gauss_newton_matrix_asks_too():
    generator = torch.Generator()

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0] + torch.randn(batch[0].shape, generator=generator)), batch[1])

    with pytest.raises(NondeterministicLossError):
        dyntune.gauss_newton(made(lambda: nn.Linear(4, 3)), BATCH, loss_fn).to_dense()


def test_it_costs_one_forward_pass_of_the_first_batch_once():
    model = made(Counted)
    operator = dyntune.hessian(model, [BATCH] * 4, **CRITERION)
    assert model.passes == [4]
    with operator.session():
        assert model.passes == [4 + 1 + 4]  # the check, and the graph
    with operator.session():
        assert model.passes == [4 + 1 + 4 + 4]


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.1)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(8 * 16, 3))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.1), nn.Tanh(), nn.Linear(64, 3)), (16,)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Dropout(0.1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)),
        (1, 8, 8),
    ),
    "transformer": (transformer, (8, 16)),
}


@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
def test_the_tolerance_lies_between_rounding_and_dropout(make, shape):
    x, y = rows(256, *shape), torch.arange(256) % 3
    model = made(make)
    with torch.no_grad():
        model(x)  # the lazy layer
    eps = torch.finfo(torch.float32).eps

    def losses(batches, seeds) -> list[float]:
        return [Objective(model, b, **CRITERION, seed=s).loss() for b in batches for s in seeds]

    orders = [torch.randperm(256, generator=torch.Generator().manual_seed(s)) for s in range(10)]
    model.eval()
    rounded = losses([(x[order], y[order]) for order in orders], [0])
    model.train()
    drawn = losses([(x, y)], range(3))
    assert (max(rounded) - min(rounded)) / min(rounded) < 0.1 * REPEAT_TOLERANCE * eps
    assert (max(drawn) - min(drawn)) / min(drawn) > 10 * REPEAT_TOLERANCE * eps


def test_parameters_that_moved_in_between_are_no_alarm():
    model = made(lambda: nn.Linear(4, 3))
    operator = dyntune.hessian(model, BATCH, **CRITERION)
    model.weight.data.add_(1.0)
    truth = dyntune.hessian(model, BATCH, **CRITERION).to_dense()
    assert torch.equal(operator.to_dense(), truth)


def test_parameters_that_became_nan_are_no_alarm_either():
    model = made(lambda: nn.Linear(4, 3))
    operator = dyntune.hessian(model, BATCH, **CRITERION)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    assert bool(torch.isnan(operator @ torch.ones(operator.numel)).any())
