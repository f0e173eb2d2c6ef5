"""The ring keeps what it says, no more than it may, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.replay.replaying import replay
from dyntune.replay.ring import Ring, losses_of
from tests.replay.loops import CE, MODELS, OPTIMIZERS, images, plain_mlp, seeded, stage_of, train


class NoRing:
    """The same calls, and nothing kept."""

    def fetched(self, batch: Any) -> None: ...

    def observed(self, loss: Any) -> None: ...

    def before_step(self, optimizer: torch.optim.Optimizer) -> None: ...

    def after_step(self) -> None: ...


@pytest.mark.parametrize("model_name", MODELS)
def test_training_is_the_same_bits(model_name: str) -> None:
    """With a ring and without: losses, parameters, buffers, the state of the optimizer, random numbers, versions."""

    def trained(ring: bool) -> tuple[Any, ...]:
        torch.manual_seed(1)
        model = seeded(MODELS[model_name]).train()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        kept: Any = Ring(model, optimizer, length=8) if ring else NoRing()
        losses = train(model, optimizer, kept, images(30))
        tensors = [*model.parameters(), *model.buffers()]
        state = [v for s in optimizer.state.values() for v in s.values()]
        return losses, tensors, state, torch.get_rng_state(), [t._version for t in (*tensors, *state)]

    (losses, tensors, state, random, versions), other = trained(True), trained(False)
    assert losses == other[0]
    assert all(torch.equal(a, b) for a, b in zip((*tensors, *state), (*other[1], *other[2]), strict=True))
    assert torch.equal(random, other[3])
    assert versions == other[4]


@pytest.mark.parametrize("length", [8, 9, 16])
def test_one_snapshot_is_between_half_a_ring_and_a_ring_old(length: int) -> None:
    """At every step from the first ring on, and every batch since is there."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ring = Ring(model, optimizer, length=length)
    losses: list[float] = []
    for batch in images(4 * length):
        losses += train(model, optimizer, ring, [batch])
        window = ring.window()
        assert window is not None
        steps = [step.number for step in window.steps]
        assert steps == list(range(len(losses) - len(steps), len(losses)))
        assert losses_of(window.steps) == losses[-len(steps) :]
        assert list(window.history) == losses[: -len(steps)]
        assert len(steps) <= length
        assert len(losses) < length or len(steps) >= length // 2


def test_batches_are_copies() -> None:
    """Loaders write the next batch into the same memory."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ring = Ring(model, optimizer, length=8)
    x, y = torch.empty(16, 1, 8, 8), torch.empty(16, dtype=torch.long)

    def reused() -> Any:
        for a, b in images(20):
            x.copy_(a)
            y.copy_(b)
            yield x, y

    losses = train(model, optimizer, ring, reused())
    found = replay(stage_of(model, optimizer, ring))
    assert list(found.losses) == losses[-len(found.losses) :]


def test_held_until_released() -> None:
    """After an alarm the older snapshot stays while steps go on; at twice the length the ring goes on by itself."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ring = Ring(model, optimizer, length=8)
    train(model, optimizer, ring, images(20))
    first = stage_of(model, optimizer, ring).window.steps[0].number
    ring.hold()
    train(model, optimizer, ring, images(4))
    window = stage_of(model, optimizer, ring).window
    assert window.steps[0].number == first
    assert window.steps[-1].number == 23
    train(model, optimizer, ring, images(40))
    assert len(stage_of(model, optimizer, ring).window.steps) <= 2 * 8


def test_memory_is_bounded() -> None:
    """Bytes are those of two snapshots and the batches; where that is more than the share, it is refused and freed."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ring = Ring(model, optimizer, length=8)
    train(model, optimizer, ring, images(100))
    parameters = sum(4 * p.numel() for p in model.parameters())
    batch = 16 * 64 * 4 + 16 * 8 + torch.get_rng_state().numel()
    steps = len(list(model.parameters())) * 4  # Adam's count of each parameter
    kept = len(ring._steps)
    assert ring.num_bytes == 2 * (3 * parameters + steps) + kept * batch
    assert kept <= 8
    short = Ring(model, optimizer, length=8, memory_share=1e-9)
    assert short.refusal is not None
    assert "memory is short" in short.refusal
    train(model, optimizer, short, images(3))
    assert short.window() is None
    assert short.num_bytes == 0


def test_batches_that_grow_are_refused_in_time() -> None:
    """A limit that the first batches keep and later ones do not."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ring = Ring(model, optimizer, length=8)
    train(model, optimizer, ring, images(20))
    ring._limit = 2.0 * ring.num_bytes + 4 * 4 * sum(p.numel() for p in model.parameters())
    assert ring.refusal is None
    train(model, optimizer, ring, images(8, rows=200))
    assert ring.refusal is not None
    assert ring.num_bytes == 0


def test_snapshots_in_memory() -> None:
    """Kept on the CPU, which here is where the parameters are, too: the same replay."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ring = Ring(model, optimizer, length=8, device="cpu")
    losses = train(model, optimizer, ring, images(20))
    found = replay(stage_of(model, optimizer, ring))
    assert list(found.losses) == losses[-len(found.losses) :]


def test_layers_frozen_and_thawed() -> None:
    """Who froze what at which step is kept."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ring = Ring(model, optimizer, length=16)

    def freeze(step: int) -> None:
        for p in model.get_submodule("1").parameters():
            p.requires_grad_(not 20 <= step < 27)
            if step == 20:
                p.grad = None

    losses = train(model, optimizer, ring, images(30), before=freeze)
    found = replay(stage_of(model, optimizer, ring))
    assert list(found.losses) == losses[-len(found.losses) :]
    assert all(p.requires_grad for p in model.parameters())


def test_refusals() -> None:
    """With the reason; the hooks do nothing then."""
    model = nn.Linear(2, 1)
    closure = Ring(model, torch.optim.LBFGS(model.parameters()))
    assert closure.refusal is not None
    assert "L-BFGS" in closure.refusal
    other = Ring(model, torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))
    assert other.refusal is not None
    assert "none of the model's" in other.refusal
    other.fetched(torch.ones(1, 2))
    other.observed(1.0)
    other.after_step()
    assert other.window() is None


@pytest.mark.parametrize("options", [{"length": 7}, {"memory_share": 0.0}, {"memory_share": 1.5}, {"device": "disk"}])
def test_arguments(options: dict[str, Any]) -> None:
    """Each says what may be given."""
    model = nn.Linear(2, 1)
    with pytest.raises(InvalidArgumentError):
        Ring(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_skipped_steps_of_a_scaler() -> None:
    """Batches whose step was skipped go forward only: BatchNorm saw them, and no gradient came of them."""
    model = seeded(MODELS["mlp"]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ring = Ring(model, optimizer, length=8)
    losses = []
    for index, (x, y) in enumerate(images(24)):
        ring.fetched((x, y))
        loss = CE(model(x), y)
        if index % 5 == 3:
            continue
        loss.backward()
        ring.before_step(optimizer)
        optimizer.step()
        ring.after_step()
        optimizer.zero_grad()
        ring.observed(loss)
        losses.append(float(loss.detach()))
    found = replay(stage_of(model, optimizer, ring))
    assert list(found.losses) == losses[-len(found.losses) :]
