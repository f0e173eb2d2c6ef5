"""Causes that are known: the smallest change that averts them is found, and health has none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dyntune.replay.changes import Drop, ScaleLr
from dyntune.replay.explanation import explain
from dyntune.replay.investigating import Replays, investigate
from dyntune.replay.replaying import Recipe
from dyntune.replay.ring import Ring
from dyntune.replay.verdict import Verdict
from tests.replay.loops import Batch, images, mlp, plain_mlp, seeded, stage_of, train
from tests.suggest.problems import same, snapshot


@dataclass
class Alarm:
    """What a detector says."""

    step: int
    text: str = "the loss is far above its usual range."


def regression(steps: int, *, rows: int = 32, seed: int = 0) -> list[Batch]:
    """Linear regression on 8 normal features, noise 0.1: the Hessian is that of the features, near the identity."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(8, 1, generator=g)
    return [
        (x := torch.randn(rows, 8, generator=g), x @ w + 0.1 * torch.randn(rows, 1, generator=g)) for _ in range(steps)
    ]


def linear() -> nn.Module:
    return nn.Linear(8, 1)


def found(model: nn.Module, optimizer: torch.optim.Optimizer, ring: Ring, **options: object) -> Replays:
    before = snapshot(model, optimizer)
    replays = investigate(stage_of(model, optimizer, ring, **options))
    assert same(before, snapshot(model, optimizer))
    return replays


def test_a_learning_rate_above_the_limit() -> None:
    """On a quadratic the limit is 2 / lambda: a jump to 1.6 times it is averted by half, and held where it was."""
    model = seeded(linear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ring = Ring(model, optimizer, length=32)
    batches = regression(200)
    hessian = 2 * sum(x.T @ x / len(x) for x, _ in batches) / len(batches)
    limit = 2 / float(torch.linalg.eigvalsh(hessian)[-1])

    def jump(step: int) -> None:
        if step == 180:
            optimizer.param_groups[0]["lr"] = 1.6 * limit

    mse = nn.MSELoss()
    train(model, optimizer, ring, batches, criterion=mse, before=jump)
    replays = found(model, optimizer, ring, criterion=mse)
    assert replays.verdict is Verdict.AVERTED
    assert replays.agreement == 0.0
    averting = {change.name for change in replays.averting}
    assert {"learning rate held where it was", "learning rate / 2"} <= averting
    explanation = explain(Alarm(190), replays)
    assert explanation.cause == "lr too high"
    assert "learning rate held where it was" in explanation.text


def test_one_bad_batch() -> None:
    """A batch a thousand times too large: leaving it out averts it, and so it is named."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    ring = Ring(model, optimizer, length=32)
    batches = images(140)
    x, y = batches[125]
    batches[125] = 1000 * x, y
    train(model, optimizer, ring, batches)
    replays = found(model, optimizer, ring)
    assert replays.averting[0] == Drop(frozenset([125]))
    explanation = explain(Alarm(126), replays)
    assert explanation.cause == "bad batches"
    assert "batch of step 125 left out" in explanation.text


def test_a_stale_second_moment() -> None:
    """Targets that swell by 40% a step: with beta2 = 0.9999 steps become too large, with 0.95 they do not."""
    model = seeded(linear)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.9, 0.9999))
    ring = Ring(model, optimizer, length=32)
    mse = nn.MSELoss()

    def swelling() -> Iterator[Batch]:
        for step, (x, y) in enumerate(regression(420)):
            size = 1.4 ** max(0, step - 395)
            yield x * size**0.5, y * size**0.5

    train(model, optimizer, ring, swelling(), criterion=mse)
    replays = found(model, optimizer, ring, criterion=mse)
    assert replays.verdict is Verdict.AVERTED
    assert explain(Alarm(419), replays).cause == "stale second moment"


def test_a_group_with_a_wrong_rate() -> None:
    """One layer in a group of its own at a hundred times the rate, from inside the window on."""
    model = seeded(plain_mlp)
    body, head = model.get_submodule("1"), model.get_submodule("3")
    optimizer = torch.optim.AdamW([{"params": body.parameters()}, {"params": head.parameters()}], lr=2e-3)
    ring = Ring(model, optimizer, length=32)

    def wrong(step: int) -> None:
        if step == 128:  # the window's first step, so that there is nothing to hold
            optimizer.param_groups[0]["lr"] = 0.5

    train(model, optimizer, ring, images(150), before=wrong)
    replays = found(model, optimizer, ring)
    explanation = explain(Alarm(149), replays)
    assert explanation.causes
    assert replays.averting[0].name in ("learning rate held where it was", "learning rate of group 0 / 16")


def test_health_has_nothing_to_avert() -> None:
    """Of a training in order, with the costs that are stated: two windows."""
    model = seeded(mlp).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ring = Ring(model, optimizer, length=32)
    train(model, optimizer, ring, images(150))
    replays = found(model, optimizer, ring)
    assert replays.verdict is Verdict.NOTHING_TO_AVERT
    assert replays.spent == 2 * replays.num_steps
    explanation = explain(Alarm(149), replays)
    assert explanation.cause is None
    assert "nothing to avert" in explanation.text


def test_clipping_is_inferred_and_proved() -> None:
    """The norms tell what gradients are clipped to, and the replay then is the training bit for bit."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ring = Ring(model, optimizer, length=16)
    train(model, optimizer, ring, images(100), clip=0.05)
    replays = found(model, optimizer, ring)
    assert replays.agreement == 0.0
    assert replays.verdict is Verdict.NOTHING_TO_AVERT


def test_another_training_gets_no_verdict() -> None:
    """Gradients that something scales behind the replay's back: it says that it is not the training, and no more."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = model.get_parameter("1.weight").register_hook(lambda gradient: -gradient)
    ring = Ring(model, optimizer, length=16)
    train(model, optimizer, ring, images(60))
    replays = found(model, optimizer, ring)
    handle.remove()
    assert replays.verdict is Verdict.NOT_REPRODUCED
    assert explain(Alarm(59), replays).cause is None
    assert "hooks" in replays.reason


def test_a_loss_that_is_not_finite() -> None:
    """A training that ends in NaN is a rise without bound; a hundredth of the rate averts it."""
    model = seeded(linear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ring = Ring(model, optimizer, length=32)
    mse = nn.MSELoss()

    def jump(step: int) -> None:
        if step == 100:
            optimizer.param_groups[0]["lr"] = 1e4
        if step == 115:
            ring.hold()  # an alarm: the snapshots of broken parameters that would follow are of no use

    train(model, optimizer, ring, regression(140), criterion=mse, before=jump)
    replays = investigate(stage_of(model, optimizer, ring, criterion=mse))
    assert math.isinf(replays.rise)
    assert explain(Alarm(120), replays).cause == "lr too high"
    assert explain(Alarm(120), replays).to_dict()["evidence"][0]["rise"] is None


def test_nothing_averts() -> None:
    """Only what is tried can avert: with no change that helps, none is named."""
    model = seeded(linear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ring = Ring(model, optimizer, length=32)
    mse = nn.MSELoss()

    def jump(step: int) -> None:
        if step == 180:
            optimizer.param_groups[0]["lr"] = 100.0

    train(model, optimizer, ring, regression(190), criterion=mse, before=jump)
    replays = investigate(stage_of(model, optimizer, ring, criterion=mse), changes=[ScaleLr(2.0)])
    assert replays.verdict is Verdict.NOTHING_AVERTS
    assert explain(Alarm(185), replays).cause is None


def test_mixed_precision_is_replayed() -> None:
    """With the dtype told, bit for bit; full precision is then among the changes."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ring = Ring(model, optimizer, length=16)

    def criterion(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(out.float(), y)

    inner = model.forward
    model.forward = lambda x: _autocast(inner, x)  # type: ignore[method-assign]
    train(model, optimizer, ring, images(60), criterion=criterion)
    del model.forward
    replays = found(model, optimizer, ring, criterion=criterion, recipe=Recipe(autocast=torch.bfloat16))
    assert replays.agreement == 0.0


def _autocast(forward: object, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out: torch.Tensor = forward(x)  # type: ignore[operator]
        return out
