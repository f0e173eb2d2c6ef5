"""Measuring between a user's forward and backward pass, and in the middle of training, changes no bit of either."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.objective.measurements import MEASUREMENTS
from tests.objective.snapshot import changes, snapshot
from tests.objective.zoo import made, rows

BATCHES = [(rows(8, 4, seed=s), torch.arange(8) % 3) for s in range(3)]
CRITERION = {"criterion": nn.CrossEntropyLoss()}
# In training mode the power iteration of spectral norm has no forward-mode derivative.
WITH_SPECTRAL = [name for name in MEASUREMENTS if name != "forward over reverse"]


def build(*, spectral: bool = True) -> nn.Module:
    first = spectral_norm if spectral else nn.Identity()
    return nn.Sequential(first(nn.Linear(4, 6)), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_live_graph_survives(name):
    model = made(lambda: build(spectral=name in WITH_SPECTRAL)).train()
    twin = copy.deepcopy(model)
    x, y = BATCHES[0]
    losses = []
    for each in (model, twin):
        torch.manual_seed(5)
        losses.append(F.cross_entropy(each(x), y))
    MEASUREMENTS[name](model, BATCHES, CRITERION)
    for loss in losses:
        loss.backward()
    for (parameter, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), parameter


def train(model: nn.Module, measure: list[str]) -> tuple[nn.Module, dict, list[float]]:
    """A dozen steps; the named measurements are taken in turn before, within and after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, turn = [], 0

    def interlude() -> None:
        nonlocal turn
        if measure:
            MEASUREMENTS[measure[turn % len(measure)]](model, BATCHES, CRITERION)
            turn += 1

    for step in range(12):
        x, y = BATCHES[step % 3]
        interlude()
        loss = F.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)
        interlude()
        loss.backward()
        interlude()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        losses.append(float(loss.detach()))
    return model, optimizer.state_dict(), losses


def test_a_training_trajectory_is_bit_identical():
    outcomes = []
    for measure in ([], WITH_SPECTRAL):
        torch.manual_seed(3)
        model, state, losses = train(made(build).train(), measure)
        outcomes.append((losses, state, snapshot_of_values(model), torch.get_rng_state()))
    (losses, state, values, rng), (others, other_state, other_values, other_rng) = outcomes
    assert losses == others
    assert torch.equal(rng, other_rng)
    assert values == other_values
    for index, entry in state["state"].items():
        for key, tensor in entry.items():
            assert torch.equal(tensor, other_state["state"][index][key]), (index, key)


def snapshot_of_values(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_the_comparison_notices_a_single_draw():
    """The tests above would be worthless if it did not."""
    model = made(build)
    before = snapshot(model)
    torch.rand(1)
    model[1].running_mean.add_(0)
    assert sorted(changes(before, snapshot(model))) == ["module '1'", "torch rng"]
