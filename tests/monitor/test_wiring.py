"""Who takes part in a training, and with which settings: real trainings under a monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.detect.unwired import Unwired
from dyntune.monitor.budget import Budget
from dyntune.monitor.settings import Settings
from dyntune.monitor.wiring import CONFIRMING, MOST, Wiring

CHANGE = 40  # step of what happens in mid-training
STEPS = 192  # six blocks: 64 steps without a change, a look and a full block after CHANGE


class Often(Budget):
    """Looks at parameters every seven steps, whatever the clock says, and measures nothing else."""

    interval = 7

    def affords(self, kind: str, *, share: float) -> bool:
        return False


class Net(nn.Module):
    """Three layers; `cut` says whether the path to the first two is cut, by step."""

    def __init__(self, cut: Callable[[int], bool] = lambda step: False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.cut, self.step = cut, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        self.step += self.training
        return self.head(hidden.detach() if self.cut(self.step - 1) else hidden)


class Experts(nn.Module):
    """One of four experts at a time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.experts = nn.ModuleList(nn.Linear(4, 8) for _ in range(4))
            self.head = nn.Linear(8, 3)
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return self.head(torch.tanh(self.experts[self.step // 8 % 4](x)))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].argmax(1)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    before: Callable[[int], None] = lambda step: None,
    after: Callable[[int], None] = lambda step: None,
    monitored: bool = True,
    steps: int = STEPS,
    **options: Any,
) -> dyntune.Monitor | None:
    """A loop under a monitor with the detector of wiring alone; `before` and `after` see the number of a step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"detectors": [Unwired()], "on_error": "raise"} | options
    monitor = dyntune.Monitor(model, optimizer, **options) if monitored else None
    if monitor is not None:
        monitor._session.budget = Often(monitor.overhead)
    for step in range(steps):
        before(step)
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step)
        if monitor is not None:
            monitor.observe(loss)
    if monitor is not None:
        monitor.close()
    return monitor


def alerts(*args: Any, **options: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    monitor = train(*args, **options)
    assert monitor is not None
    return [(alert.kind, alert.severity, alert.where) for alert in monitor.alerts]


BELOW = ("first.weight", "first.bias", "second.weight", "second.bias")


def test_a_sound_training_is_silent() -> None:
    assert alerts(Net()) == []


def test_parameters_that_are_frozen_in_mid_training() -> None:
    model = Net()

    def freeze(step: int) -> None:
        if step == CHANGE:
            model.second.requires_grad_(False)

    assert alerts(model, before=freeze) == [("frozen", "critical", ("second.weight", "second.bias"))]


@pytest.mark.parametrize("start", [0, CHANGE])
def test_a_detach_in_the_forward_pass(start: int) -> None:
    model = Net(lambda step: step >= start)
    monitor = train(model)
    assert monitor is not None
    (alert,) = monitor.alerts
    assert (alert.kind, alert.severity, alert.where) == ("disconnected", "critical", BELOW)
    assert ("any more" in alert.text) == (start > 0)
    assert start <= (alert.since or 0) <= start + Often.interval


def test_parameters_that_the_optimizer_was_not_given() -> None:
    model = Net()
    optimizer = torch.optim.SGD([*model.first.parameters(), *model.head.parameters()], lr=0.05)

    def clear(step: int) -> None:
        model.second.zero_grad()

    assert alerts(model, optimizer, after=clear) == [("not-updated", "critical", ("second.weight", "second.bias"))]


def test_two_optimizers_of_one_model() -> None:
    """As the two players of a GAN: what one does not hold, the other writes to."""
    model = Net()
    mine = torch.optim.SGD([*model.first.parameters(), *model.head.parameters()], lr=0.05)
    other = torch.optim.SGD(model.second.parameters(), lr=0.05)

    def step_other(step: int) -> None:
        if step % 14 == 0:
            other.step()

    monitor = train(model, mine, after=step_other)
    assert monitor is not None
    assert monitor.alerts == []
    assert "update/unheld" not in monitor.run.names


def test_experts_that_take_turns() -> None:
    assert alerts(Experts()) == []


def test_parameters_that_are_frozen_from_the_start_are_meant() -> None:
    model = Net()
    model.first.requires_grad_(False)
    assert alerts(model) == []


def test_settings_of_groups_are_recorded_and_again_when_they_change() -> None:
    model = Net()
    groups = [
        {"params": [*model.first.parameters(), *model.second.parameters()]},
        {"params": model.head.parameters(), "weight_decay": 0.5, "betas": (0.9, 0.95)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)

    def change(step: int) -> None:
        if step == CHANGE:
            optimizer.param_groups[1]["weight_decay"] = 0.7
            optimizer.param_groups[0]["betas"] = (0.8, 0.99)

    monitor = train(model, optimizer, before=change, steps=130)
    assert monitor is not None
    run = monitor.run
    found = {name: run.series(f"optimizer/{name}")[1].tolist() for name in ("weight_decay", "weight_decay/1")}
    assert found == {"weight_decay": [0.01, 0.01], "weight_decay/1": [0.5, 0.7]}
    assert run.series("optimizer/beta1")[1].tolist() == [0.9, 0.8]
    assert run.series("optimizer/beta2/1")[1].tolist() == [0.95, 0.95]
    steps = run.series("optimizer/beta2")[0].tolist()
    assert steps[0] < 8
    assert CHANGE <= steps[1] <= CHANGE + Often.interval
    assert {row.labels.get("group/1") for row in run.rows if "optimizer/eps" in row.values} == {
        "head.weight\nhead.bias"
    }


def test_settings_that_stay_are_told_once() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = Settings(optimizer, {})
    assert settings.look() == ({"optimizer/momentum": 0.9, "optimizer/weight_decay": 0.0}, {})
    assert settings.look() == ({}, {})


@pytest.mark.parametrize("turn", range(1, 33))
def test_parts_that_take_turns_are_not_missing(turn: int) -> None:
    model = Net()
    wiring = Wiring(model, torch.optim.SGD(model.parameters(), lr=0.1), {})
    told = 0
    for step in range(1000):
        model.first.requires_grad_(step // turn % 2 == 1)
        told += bool(wiring.look(step)[0])
    assert told == 0


def test_what_is_missing_is_told_after_six_looks_and_what_is_back_at_once() -> None:
    model = Net()
    names = {id(p): name for name, p in model.named_parameters()}
    wiring = Wiring(model, torch.optim.SGD(model.parameters(), lr=0.1), names)
    told = {}
    for step in range(300):
        model.first.requires_grad_(not 50 <= step < 200)
        if values := wiring.look(step)[0]:
            told[step] = values["grad/frozen"], values["grad/frozen/since"]
    assert told == {50 + sum(CONFIRMING): (2.0, 50.0), 200: (0.0, 200.0)}


def test_no_more_than_so_many_changes_are_recorded() -> None:
    model = Net()
    wiring = Wiring(model, torch.optim.SGD(model.parameters(), lr=0.1), {})
    told, period = 0, 2 * sum(CONFIRMING)
    for step in range(period * MOST):
        model.first.requires_grad_(step // period % 2 == 1)
        told += bool(wiring.look(step)[0])
    assert told == MOST


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_is_the_same_bits_without_them(kind: Any) -> None:
    def weights(monitored: bool) -> list[torch.Tensor]:
        model = Net(lambda step: 60 <= step < 90)
        optimizer = kind(
            [{"params": model.first.parameters()}, {"params": model.head.parameters(), "weight_decay": 0.1}], lr=1e-2
        )

        def freeze(step: int) -> None:
            if step == CHANGE:
                model.first.requires_grad_(False)
                optimizer.param_groups[0]["weight_decay"] = 0.2

        monitor = train(model, optimizer, before=freeze, monitored=monitored, steps=260)
        if monitor is not None:  # it did look
            assert {"optimizer/weight_decay", "grad/frozen"} <= set(monitor.run.names)
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))
