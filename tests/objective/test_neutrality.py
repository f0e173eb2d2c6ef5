"""After a measurement everything of the user's is the same bits, whatever the forward pass does to it."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from dyntune.errors import HVPUnsupportedError
from tests.objective.measurements import MEASUREMENTS, PRODUCTS
from tests.objective.oracle import relative_error
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import Recurrent, made, rows

BATCH = (rows(12, 4), torch.arange(12) % 3)
CRITERION = {"criterion": nn.CrossEntropyLoss()}


class Awkward(nn.Module):
    """Writes to its buffers in every known way, draws from all generators, and leaves tensors with a graph behind.

    The power iteration of spectral norm has no forward-mode derivative in training mode, so it can be left out.
    """

    def __init__(self, *, spectral: bool = True) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Linear(4, 6)) if spectral else nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.out = old_spectral_norm(nn.Linear(6, 3)) if spectral else nn.Linear(6, 3)
        self.still = nn.BatchNorm1d(6).eval()
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("codebook", torch.zeros(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("absent", None)
        self.auxiliary = torch.zeros(())
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.still(self.frozen(self.drop(self.norm(self.first(x)))))
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)  # reassigned
        self.codebook.data.add_(h.detach().mean(0))  # behind the version counter
        self.steps += 1
        self.auxiliary = h.square().mean()  # keeps the graph alive
        self.late = h.detach()
        self.calls += 1
        return self.out(h) + 0.01 * (random.random() + np.random.rand() + torch.rand(())) * h.mean()


def with_gradients(model: nn.Module) -> nn.Module:
    """In the middle of accumulation: some gradients are there, some are not."""
    for index, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.5) if index % 2 and p.requires_grad else None
    return model


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_nothing_of_an_awkward_model_changes(name):
    model = with_gradients(made(lambda: Awkward(spectral=name != "forward over reverse")).train())
    model.still.eval()
    before = snapshot(model)
    MEASUREMENTS[name](model, BATCH, CRITERION)
    assert changes(before, snapshot(model)) == []


def test_a_refused_measurement_leaves_no_trace_either():
    model = with_gradients(made(Awkward).train())
    before = snapshot(model)
    with pytest.raises(HVPUnsupportedError, match="raise memory_limit"):
        PRODUCTS["forward over reverse"](model, BATCH, CRITERION)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("measure", PRODUCTS.values(), ids=PRODUCTS)
def test_buffers_written_behind_the_version_counter_do_not_drift(measure):
    """The same product twice: every forward pass starts from the user's buffers."""

    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)
            self.register_buffer("book", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.book.data.mul_(1.5)
            return self.inner(x) * self.book

    model = made(Codebook)
    assert torch.equal(measure(model, [BATCH, BATCH], CRITERION), measure(model, [BATCH, BATCH], CRITERION))
    # Both batches see the same book, so they count as one. 1e-3 is for finite differences; a drift would make it 50%.
    both, one = measure(model, [BATCH, BATCH], CRITERION), measure(model, BATCH, CRITERION)
    assert relative_error(both, one.double()) < 1e-3


@pytest.mark.parametrize("measure", PRODUCTS.values(), ids=PRODUCTS)
def test_an_lstm_keeps_its_flat_weights(measure):
    model = made(Recurrent)
    before = snapshot(model)
    measure(model, (rows(6, 5, 3), torch.arange(6) % 3), CRITERION)
    assert changes(before, snapshot(model)) == []


def calls_backward(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward(retain_graph=True)
    return loss


def reassigns_buffers(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    model[1].running_mean = torch.ones(6)
    model[1].register_buffer("extra", torch.ones(2))
    return F.cross_entropy(model(batch[0]), batch[1])


def changes_modes(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    model.eval()
    model[1].bias.requires_grad_(True)
    return F.cross_entropy(model(batch[0]), batch[1])


def replaces_a_parameter(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    model[3].bias = nn.Parameter(torch.zeros(3))
    return loss


def zeroes_gradients(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    model.zero_grad(set_to_none=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return F.cross_entropy(model(batch[0]), batch[1])


LOSSES: dict[str, Callable] = {
    f.__name__: f for f in (calls_backward, reassigns_buffers, changes_modes, zeroes_gradients)
}


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("measure", PRODUCTS.values(), ids=PRODUCTS)
def test_nor_does_a_meddling_loss_leave_a_trace(measure, loss_fn):
    model = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
    with_gradients(model)
    model[1].bias.requires_grad_(False)
    before = snapshot(model)
    measure(model, BATCH, {"loss_fn": loss_fn})
    assert changes(before, snapshot(model)) == []


def test_a_loss_that_replaces_a_parameter_is_undone():
    model = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
    before = snapshot(model)
    MEASUREMENTS["gradient"](model, BATCH, {"loss_fn": replaces_a_parameter})
    assert changes(before, snapshot(model)) == []


def test_shared_buffers_stay_shared_while_measuring():
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4, affine=False)
            self.b.running_mean = self.a.running_mean
            self.out = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.a.running_mean is self.b.running_mean
            return self.out(self.b(self.a(x)))

    model = made(Sharing)
    before = snapshot(model)
    MEASUREMENTS["retained graph"](model, BATCH, CRITERION)
    assert changes(before, snapshot(model)) == []


def test_batches_are_not_written_to():
    x, y = BATCH[0].clone(), BATCH[1].clone()
    inputs: dict[str, torch.Tensor] = {"x": x, "labels": y}
    MEASUREMENTS["eigenvalues"](
        made(lambda: nn.Linear(4, 3)), inputs, {"loss_fn": lambda m, b: F.cross_entropy(m(b["x"]), b["labels"])}
    )
    assert list(inputs) == ["x", "labels"]
    assert inputs["x"] is x
    assert torch.equal(x, BATCH[0])
    assert (x._version, x.requires_grad, x.grad) == (0, False, None)
