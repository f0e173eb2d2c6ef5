"""Without a change a replay is the training itself, to the last bit, and nothing of the user's moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.replay.changes import Change, Drop, Freeze, FreshMoments, ScaleLr
from dyntune.replay.replaying import Recipe, replay, survey
from dyntune.replay.ring import Ring, losses_of
from dyntune.replay.verdict import agreement
from tests.replay.loops import CE, MODELS, OPTIMIZERS, images, mlp, plain_mlp, seeded, stage_of, train
from tests.suggest.problems import same, snapshot


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_unchanged_replay_is_the_training_bit_for_bit(model_name: str, optimizer_name: str) -> None:
    """Every loss of the window, with dropout, BatchNorm, tied weights and a learning rate that moves."""
    torch.manual_seed(3)
    model = seeded(MODELS[model_name]).train()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    ring = Ring(model, optimizer, length=16)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    losses = train(model, optimizer, ring, images(45), before=lambda _: schedule.step() if optimizer.state else None)
    before = snapshot(model, optimizer)
    stage = stage_of(model, optimizer, ring)
    found = replay(stage)
    assert list(found.losses) == losses[-len(found.losses) :] == losses_of(stage.window.steps)
    assert 8 <= len(found.losses) <= 16
    assert found.steps[-1] == 44
    assert same(before, snapshot(model, optimizer))
    assert all(p.grad is None for p in model.parameters())


def test_survey_is_at_the_first_parameters() -> None:
    """Its first loss and norm are the replay's, and without a step the later ones are those of a model that stopped."""
    model = seeded(mlp).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ring = Ring(model, optimizer, length=8)
    train(model, optimizer, ring, images(20))
    stage = stage_of(model, optimizer, ring)
    before = snapshot(model, optimizer)
    looked, found = survey(stage), replay(stage)
    stopped = replay(stage, ScaleLr(1e30))
    assert (looked.losses[0], looked.norms[0]) == (found.losses[0], found.norms[0])
    assert looked.losses == stopped.losses != found.losses  # in train mode BatchNorm does not read its buffers
    assert same(before, snapshot(model, optimizer))


def test_clipping_and_accumulation() -> None:
    """Gradients of two batches added up and clipped; without the clipping the replay is another training."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    ring = Ring(model, optimizer, length=8, accumulate=2)
    losses = train(model, optimizer, ring, images(40), clip=0.3, accumulate=2)
    stage = stage_of(model, optimizer, ring, recipe=Recipe(clip_norm=0.3))
    assert list(replay(stage).losses) == losses[-len(stage.window.steps) :]
    unclipped = replay(stage.made_by(Recipe()))
    assert agreement(unclipped, losses_of(stage.window.steps)) > 1e-2


def test_batches_told_by_observe() -> None:
    """Without a fetch the random state before the forward pass is that after the step before."""
    torch.manual_seed(5)
    model = seeded(mlp).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for after in (False, True):
        ring = Ring(model, optimizer, length=8)
        losses = []
        for x, y in images(20):
            loss = CE(model(x), y)
            loss.backward()
            if not after:
                ring.observed(loss, (x, y))
            ring.before_step(optimizer)
            optimizer.step()
            ring.after_step()
            optimizer.zero_grad()
            if after:
                ring.observed(loss, (x, y))
            losses.append(float(loss.detach()))
        found = replay(stage_of(model, optimizer, ring))
        assert list(found.losses) == losses[-len(found.losses) :], f"after={after}"


def test_changes_do_what_they_say() -> None:
    """Against trainings in which it was so: a batch left out, a layer frozen, half the rate, a fresh state."""
    batches = images(20)
    frozen = ("1.weight", "1.bias")

    def user(change: str) -> tuple[list[float], nn.Module, Any, Ring]:
        model = seeded(plain_mlp)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        ring = Ring(model, optimizer, length=16)

        def before(step: int) -> None:
            if step == 8 and change == "half":
                optimizer.param_groups[0]["lr"] /= 2
            if step == 8 and change == "fresh":
                optimizer.state.clear()
            if step == 8 and change == "frozen":
                for name in frozen:
                    model.get_parameter(name).requires_grad_(False)

        left_out = [b for i, b in enumerate(batches) if i != 11 or change != "drop"]
        return train(model, optimizer, ring, left_out, before=before), model, optimizer, ring

    _, model, optimizer, ring = user("none")
    stage = stage_of(model, optimizer, ring)
    assert stage.window.steps[0].number == 8
    pairs: dict[str, Change] = {
        "half": ScaleLr(2.0),
        "fresh": FreshMoments(),
        "frozen": Freeze("1", frozen),
        "drop": Drop(frozenset([11])),
    }
    for name, change in pairs.items():
        found = [loss for loss in replay(stage, change).losses if loss == loss]
        assert found == user(name)[0][8:], name


def test_unknown_batches_are_refused() -> None:
    """A step without a batch cannot be made again, and says so."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ring = Ring(model, optimizer, length=8)
    for x, y in images(10):
        CE(model(x), y).backward()
        ring.before_step(optimizer)
        optimizer.step()
        ring.after_step()
    with pytest.raises(InvalidArgumentError, match="batch of step"):
        replay(stage_of(model, optimizer, ring))


@pytest.mark.parametrize("build", [lambda: nn.GRU(8, 12, batch_first=True), lambda: nn.LSTM(8, 12, batch_first=True)])
def test_recurrent_networks(build: Callable[[], nn.Module]) -> None:
    """Their flattened weights are the twin's meanwhile."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = build(), nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.cell(x.flatten(1, 2))[0][:, -1])
            return out

    model = seeded(Recurrent)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ring = Ring(model, optimizer, length=8)
    losses = train(model, optimizer, ring, images(20))
    before = snapshot(model, optimizer)
    found = replay(stage_of(model, optimizer, ring))
    assert list(found.losses) == losses[-len(found.losses) :]
    assert same(before, snapshot(model, optimizer))


class RunningScale(nn.Module):
    """Divides by a running size, in training, too: what its buffer held when a step was made shows in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("size", torch.ones(()))
        self.size: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.size.mul_(0.9).add_(0.1 * x.detach().abs().mean())
        return x / self.size


def test_buffers_are_those_of_the_window() -> None:
    """At its first step, and moved along by it; the user's stay."""
    model = seeded(lambda: nn.Sequential(plain_mlp(), RunningScale()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ring = Ring(model, optimizer, length=8)
    losses = train(model, optimizer, ring, images(20))
    before = snapshot(model, optimizer)
    found = replay(stage_of(model, optimizer, ring))
    assert list(found.losses) == losses[-len(found.losses) :]
    assert same(before, snapshot(model, optimizer))
