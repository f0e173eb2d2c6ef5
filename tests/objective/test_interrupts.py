"""A measurement that is cut short, wherever that happens, leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dyntune
from dyntune.objective.objective import Objective
from tests.objective.measurements import MEASUREMENTS
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import made, rows

BATCHES = [(rows(8, 4, seed=s), torch.arange(8) % 3) for s in range(2)]
CRITERION = {"criterion": nn.CrossEntropyLoss()}


class Fuse(nn.Module):
    """Passes its input through and raises at the k-th forward or backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = [0]  # a list: what the module holds itself is put back after every measurement
        self.blow: list[tuple[int, BaseException]] = []

    def count(self, tensor: torch.Tensor) -> None:
        self.passes[0] += 1
        for at, error in self.blow:
            if self.passes[0] == at:
                raise error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count(x)
        if x.requires_grad:
            x.register_hook(self.count)
        return x


def model_with_fuse() -> tuple[nn.Module, Fuse]:
    fuse = Fuse()
    model = made(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), fuse, nn.Linear(6, 3))
    )
    for p in list(model.parameters())[::2]:
        p.grad = torch.ones_like(p)
    return model, fuse


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("injected")], ids=["interrupt", "error"])
@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_at_every_forward_and_backward_pass(measure, error):
    model, fuse = model_with_fuse()
    measure(model, BATCHES, CRITERION)
    total = fuse.passes[0]
    assert total >= 4  # two batches are probed and then used
    for at in range(1, total + 1):
        model, fuse = model_with_fuse()
        fuse.blow.append((at, error))
        before = snapshot(model)
        with pytest.raises(type(error)):
            measure(model, BATCHES, CRITERION)
        assert changes(before, snapshot(model)) == [], f"pass {at} of {total}"


def eigenvalues(model: nn.Module, progress: Callable[[int, float], None]) -> None:
    dyntune.hessian_eigenvalues(model, BATCHES, **CRITERION, progress=progress)


def sharpness(model: nn.Module, progress: Callable[[int, float], None]) -> None:
    dyntune.sharpness(model, BATCHES, **CRITERION, progress=progress)


def density(model: nn.Module, progress: Callable[[int, float], None]) -> None:
    dyntune.spectral_density(dyntune.hessian(model, BATCHES, **CRITERION), num_steps=2, progress=progress)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("injected")], ids=["interrupt", "error"])
@pytest.mark.parametrize("measure", [eigenvalues, sharpness, density])
@pytest.mark.parametrize("at", [1, 2])
def test_in_a_progress_callback(measure, error, at):
    model, _ = model_with_fuse()
    before = snapshot(model)
    calls = []

    def progress(done: int, value: float) -> None:
        calls.append(done)
        if len(calls) == at:
            raise error

    with pytest.raises(type(error)):
        measure(model, progress)
    assert len(calls) == at
    assert changes(before, snapshot(model)) == []


def test_in_the_body_of_a_session():
    model, _ = model_with_fuse()
    before = snapshot(model)
    operator = dyntune.hessian(model, BATCHES, **CRITERION)

    def body() -> None:
        with operator.session() as product:
            product(operator.space.normal(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert changes(before, snapshot(model)) == []


def test_in_the_loader():
    class Failing:
        def __iter__(self) -> Iterator[object]:
            torch.rand(3)
            yield BATCHES[0]
            raise OSError("disk gone")

    model, _ = model_with_fuse()
    before = snapshot(model)
    with pytest.raises(OSError, match="disk gone"):
        dyntune.hessian(model, Failing(), **CRITERION)
    assert changes(before, snapshot(model)) == []


def test_the_next_measurement_is_as_if_nothing_had_happened():
    model, fuse = model_with_fuse()
    truth = MEASUREMENTS["retained graph"](model, BATCHES, CRITERION)
    fuse.blow.append((fuse.passes[0] + 5, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        MEASUREMENTS["retained graph"](model, BATCHES, CRITERION)
    assert torch.equal(MEASUREMENTS["retained graph"](model, BATCHES, CRITERION), truth)


def test_a_loader_that_shuffles_is_drawn_without_a_trace_when_the_model_fails():
    loader = DataLoader(list(zip(*BATCHES[0], strict=True)), batch_size=4, shuffle=True)
    model, fuse = model_with_fuse()
    fuse.blow.append((1, RuntimeError("injected")))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="injected"):
        Objective(model, loader, **CRITERION)
    assert changes(before, snapshot(model)) == []
