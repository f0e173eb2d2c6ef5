"""A measurement that is cut short at any call leaves no trace, and training goes on with the same bits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.objective.fsdp import moved_shards
from tests.neutrality.faults import ERRORS, SITES, Fuse, spread
from tests.neutrality.measurements import MEASUREMENTS, Subject
from tests.neutrality.state import everything, values
from tests.objective.snapshot import changes
from tests.objective.zoo import classes, made, rows

DATA = [(rows(4, 4, seed=s), classes(4, seed=s)) for s in range(2)]
# How many k of each measurement are tried in the quick tests.
FEW = 6


class Awkward(nn.Module):
    """Buffers, dropout, a frozen part, a generator of its own, and a tensor with a graph left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.last = nn.Linear(5, 3)
        self.generator = torch.Generator().manual_seed(1)
        self.auxiliary = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(self.norm(torch.tanh(self.first(x))))
        h = h + 0.1 * torch.rand(h.shape, generator=self.generator) + 0.01 * (random.random() + np.random.rand())
        self.auxiliary = h.square().mean()
        return self.last(self.frozen(h))


def subject(batches: Any = DATA, loss: dict[str, Any] | None = None) -> Subject:
    """In the middle of training: a stepped optimizer, and some gradients already there."""
    model = made(Awkward).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = Subject(model, batches, optimizer, loss or {"criterion": nn.CrossEntropyLoss()})
    step(found, 0)
    for p in list(model.parameters())[::2]:
        p.grad = torch.ones_like(p)
    return found


def step(subject: Subject, seed: int) -> None:
    """One training step with draws of its own; the global generators are put back."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        model, (x, y) = subject.model, DATA[seed % 2]
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        subject.optimizer.step()
        model.auxiliary = torch.zeros(())
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def attempt(measure: Callable[[], Any], fuse: Fuse, site: str) -> BaseException | None:
    try:
        with SITES[site](fuse) if site else nullcontext():
            measure()
    except BaseException as error:  # Ctrl-C is one
        return error
    return None


def check(
    measure: Callable[[Subject, Fuse], Any],
    site: str,
    errors: Iterator[str],
    count: int | None,
    *,
    build: Callable[[], Subject] = subject,
) -> int:
    """Cut `measure` short at each of the chosen calls, the exceptions in turn; how many there were.

    The state is compared while the exception is still held, so that nothing is owed to the garbage collector. A twin
    that is never measured takes the same training steps.
    """
    model, twin, sound = build(), build(), Fuse()
    assert attempt(lambda: measure(model, sound), Fuse(), "") is None  # what is imported or cached at the first call
    sound.calls = 0
    assert attempt(lambda: measure(model, sound), sound, site) is None
    blown = 0
    for at in spread(sound.calls, count):
        kind = next(errors)
        fuse = Fuse(at, ERRORS[kind])
        before = everything(model.model, model.optimizer, model.batches)
        error = attempt(lambda fuse=fuse: measure(model, fuse), fuse, site)
        where = f"{kind} at {site} call {at} of {sound.calls}: {fuse.place}"
        assert changes(before, everything(model.model, model.optimizer, model.batches)) == [], where
        blown += fuse.blown
        if fuse.blown and kind != "out of memory":  # which may be answered with a lighter engine
            assert error is not None, f"swallowed: {where}"
            # An error may come out within one that explains it; nothing of ours comes between Ctrl-C and the user.
            theirs = isinstance(error, KeyboardInterrupt) or "TorchScript" in str(error)  # forward-mode decompositions
            assert kind != "interrupt" or theirs, where
        for each in (model, twin):
            step(each, at)
        assert changes(values(twin.model, twin.optimizer), values(model.model, model.optimizer)) == [], where
    return blown


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["hessian_eigenvalues", "finite differences", "gauss_newton"])
def test_at_some_calls(name, site):
    errors = itertools.cycle(ERRORS)
    assert check(lambda s, fuse: MEASUREMENTS[name](s), site, errors, FEW) >= FEW // 2


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_at_sixty_calls(name, site):
    """The exceptions in turn; each by itself over all measurements would take hours."""
    errors = itertools.cycle(ERRORS)
    # not all are reached: training goes on, and its calls are others
    assert check(lambda s, fuse: MEASUREMENTS[name](s), site, errors, 60) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("site", [site for site in SITES if site != "torch operation"])
def test_at_every_call(site):
    """The exceptions in turn over k."""
    errors = itertools.cycle(ERRORS)
    assert check(lambda s, fuse: MEASUREMENTS["hessian_eigenvalues"](s), site, errors, None) >= 300


def with_users_calls(subject: Subject, fuse: Fuse) -> None:
    """A measurement in which every call of the user's counts: loader, predicate, loss, backward pass, progress."""

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            for batch in DATA:
                fuse.count("loader")
                yield batch

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        fuse.count("loss_fn")
        outputs = model(batch[0])
        fuse.count("after the model's forward")
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: fuse.count("backward"))
        return F.cross_entropy(outputs, batch[1])

    def chosen(name: str) -> bool:
        fuse.count("predicate")
        return "frozen" not in name

    def progress(done: int, value: float) -> None:
        fuse.count("progress")

    dyntune.sharpness(
        subject.model,
        Loader(),
        loss_fn,
        params=chosen,
        optimizer=subject.optimizer,
        quantities=("lambda_max", "lambda_min", "preconditioned", "batch", "directional", "critical_lr"),
        max_products=3,
        progress=progress,
    )


def test_at_some_calls_of_the_users():
    assert check(with_users_calls, "", itertools.cycle(ERRORS), 2 * FEW) >= FEW


@pytest.mark.slow
def test_at_every_call_of_the_users():
    for kind in ERRORS:
        assert check(with_users_calls, "", itertools.repeat(kind), None) >= 100


@pytest.mark.parametrize("site", SITES)
def test_shards_that_are_moved_come_back(site):
    """The one place where the user's own numbers are written to: finite differences under FSDP2."""
    parameters = [nn.Parameter(rows(3, seed=s)) for s in range(3)]
    before = [p.detach().clone() for p in parameters]

    def measure(fuse: Fuse) -> None:
        with SITES[site](fuse), moved_shards(parameters, before, 0.1):
            assert not torch.equal(parameters[0], before[0])

    sound = Fuse()
    measure(sound)
    assert sound.calls >= 2
    for at in range(1, sound.calls + 1):
        with pytest.raises(KeyboardInterrupt):
            measure(Fuse(at))
        assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True)), at
        assert [p._version for p in parameters] == [0, 0, 0]
