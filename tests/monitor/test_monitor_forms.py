"""The same bits in trainings of other forms than the plain loop; what is unsupported there is recorded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyntune
from dyntune.monitor.breaker import MonitorWarning
from dyntune.monitor.budget import Budget
from tests.monitor.training import network
from tests.neutrality.state import values
from tests.objective.snapshot import changes

CE = nn.CrossEntropyLoss()
STEPS = 40
Watcher = dyntune.Monitor | None


@dataclass
class Form:
    """A training: what it consists of, and one step of it.

    Args:
        model: All that is trained.
        optimizers: In the order in which they step.
        step: Takes a batch and the monitors, one for each optimizer.
        batches: One for each step.
        watched: Model and options of each monitor.
        after: Called with the number of each step that was made.
        begin: Called before the first step, when the monitors are attached.
        told: Whether monitors are told their batches in the step; else the first one watches the loader.
        states: What there was after every step.
    """

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    step: Callable[[Any, Sequence[Watcher]], None]
    batches: Sequence[Any]
    watched: Sequence[tuple[nn.Module, dict[str, Any]]]
    after: Callable[[int], None] = lambda done: None
    begin: Callable[[], Any] = lambda: None
    told: bool = False
    states: list[dict[str, Any]] = field(default_factory=list)

    def loop(self, monitors: Sequence[Watcher]) -> None:
        """Train, and keep what there is after every step."""
        self.begin()
        loader = self.batches if monitors[0] is None or self.told else monitors[0].watch(self.batches)
        for i, batch in enumerate(loader):
            self.step(batch, monitors)
            self.after(i)
            self.states.append(values(self.model, *self.optimizers))


def rows(steps: int = STEPS, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, 16, 6, generator=generator)
    return [(each, (each[:, :3] + 0.5 * each[:, 3:]).argmax(1)) for each in x]


def plain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any] | None = None,
    *,
    stepped: Callable[[], Any] | None = None,
    after: Callable[[int], None] = lambda done: None,
) -> Form:
    """The usual step."""

    def step(batch: Any, monitors: Sequence[Watcher]) -> None:
        loss = CE(model(batch[0]), batch[1])
        loss.backward()
        (stepped or optimizer.step)()
        optimizer.zero_grad()
        if monitors[0] is not None:
            monitors[0].observe(loss)

    return Form(model, [optimizer], step, batches or rows(), [(model, {"criterion": CE})], after=after)


def lbfgs() -> Form:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")

    def step(batch: Any, monitors: Sequence[Watcher]) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = CE(model(batch[0]), batch[1])
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if monitors[0] is not None:
            monitors[0].observe(loss)

    return Form(model, [optimizer], step, rows(), [(model, {"criterion": CE})])


def groups_added() -> Form:
    model = network()
    optimizer = torch.optim.Adam(model[:4].parameters(), lr=1e-2)

    def after(done: int) -> None:
        if done == 9:
            optimizer.add_param_group({"params": model[4].parameters(), "lr": 1e-3})
        if done == 12:  # within a burst, too
            optimizer.add_param_group({"params": model[6].parameters(), "lr": 1e-4})

    return plain(model, optimizer, after=after)


def scheduled(*, early: bool) -> Form:
    """The scheduler wraps optimizer.step, before or after the monitor has attached, and moves momentum, too."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    @cache
    def scheduler() -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1)

    if early:
        scheduler()
    form = plain(model, optimizer, after=lambda _: scheduler().step())
    form.begin = scheduler
    return form


class Stepping(torch.optim.lr_scheduler.StepLR):
    """Steps the optimizer itself: nothing but the optimizer's hooks can know."""

    ready = False

    def step(self, epoch: int | None = None) -> None:
        if self.ready:
            self.optimizer.step()
        super().step(epoch)


def stepping_scheduler() -> Form:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = Stepping(optimizer, 10)
    scheduler.ready = True
    return plain(model, optimizer, stepped=scheduler.step)


def evaluating() -> Form:
    model = network().eval()
    return plain(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def frozen() -> Form:
    model = network()
    model[0].requires_grad_(False)
    return plain(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def thawed() -> Form:
    model = network()
    model[0].requires_grad_(False)

    def after(done: int) -> None:
        if done == 15:
            model[0].requires_grad_(True)
        if done == 25:
            model[4].requires_grad_(False)

    return plain(model, torch.optim.AdamW(model.parameters(), lr=1e-2), after=after)


class Tied(nn.Module):
    def __init__(self, *, sparse: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5, sparse=sparse)
        self.out = nn.Linear(5, 7, bias=False)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.embedding(tokens)))


def tokens() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(7, (STEPS, 16), generator=generator)
    return [(row, (row + 1) % 7) for row in found]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def tied() -> Form:
    model = seeded(Tied)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-2), tokens())


def sparse() -> Form:
    model = seeded(lambda: Tied(sparse=True, tied=False))
    optimizers = [
        torch.optim.SparseAdam(model.embedding.parameters(), lr=1e-2),
        torch.optim.Adam(model.out.parameters(), lr=1e-2),
    ]

    def step(batch: Any, monitors: Sequence[Watcher]) -> None:
        loss = CE(model(batch[0]), batch[1])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for monitor in monitors:
            if monitor is not None:
                monitor.observe(loss, batch=None if monitor is monitors[0] else batch)

    return Form(model, optimizers, step, tokens(), [(model, {"criterion": CE})] * 2)


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phases = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64) / 3)
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((x.to(torch.complex64) @ self.phases).abs())


def complex_numbers() -> Form:
    model = seeded(Rotated)
    return plain(model, torch.optim.Adam(model.parameters(), lr=1e-2))


def adversaries(*, normalised: bool) -> Form:
    """Two models, two optimizers, a monitor for each; the generator's loss runs the discriminator."""
    both = seeded(
        lambda: nn.ModuleDict(
            {
                "g": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)),
                "d": nn.Sequential(
                    nn.Linear(6, 8), nn.BatchNorm1d(8) if normalised else nn.Identity(), nn.Tanh(), nn.Linear(8, 1)
                ),
            }
        )
    )
    g, d = both["g"], both["d"]
    optimizers = [torch.optim.Adam(d.parameters(), lr=1e-2), torch.optim.Adam(g.parameters(), lr=1e-2)]

    def judged(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])

    def passed(model: nn.Module, z: torch.Tensor) -> torch.Tensor:
        return judged(d, (model(z), torch.ones(len(z))))

    def one(index: int, loss_fn: Any, model: nn.Module, batch: Any, monitor: Watcher) -> None:
        optimizers[index].zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        if monitor is not None:
            monitor.observe(loss, batch=batch)
        optimizers[index].step()

    def step(batch: Any, monitors: Sequence[Watcher]) -> None:
        z = torch.randn(16, 6)
        real = torch.cat([torch.ones(16), torch.zeros(16)])
        one(0, judged, d, (torch.cat([batch[0], g(z).detach()]), real), monitors[0])
        one(1, passed, g, z, monitors[1])

    return Form(both, optimizers, step, rows(), [(d, {"loss_fn": judged}), (g, {"loss_fn": passed})], told=True)


FORMS: dict[str, Callable[[], Form]] = {
    "L-BFGS with a closure": lbfgs,
    "groups added later": groups_added,
    "scheduler before the monitor": partial(scheduled, early=True),
    "scheduler after the monitor": partial(scheduled, early=False),
    "stepped by the scheduler": stepping_scheduler,
    "in eval mode": evaluating,
    "frozen": frozen,
    "frozen and thawed": thawed,
    "tied": tied,
    "sparse gradients": sparse,
    "complex": complex_numbers,
    "two models, two optimizers": partial(adversaries, normalised=False),
}
# Where numbers are of no real field, there is no curvature.
WITHOUT_CURVATURE = {"complex"}
# Where an optimizer has no scale that is known, there is the Hessian's own, without a limit.
WITHOUT_SCALE = {"L-BFGS with a closure"}


@pytest.fixture(autouse=True)
def _everything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "affords", lambda self, kind, *, share: True)
    monkeypatch.setattr(Budget, "interval", 1, raising=False)
    monkeypatch.setattr(Budget, "stride", 1, raising=False)


def compared(build: Callable[[], Form]) -> list[dyntune.Monitor]:
    """The monitors of a training that is the same as without them after every step."""
    kept = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MonitorWarning)
            torch.manual_seed(3)
            bare = build()
            bare.loop([None] * len(bare.watched))
            torch.manual_seed(3)
            form = build()
            monitors = [
                dyntune.Monitor(model, optimizer, overhead=0.9, on_error="warn", **options)
                for (model, options), optimizer in zip(form.watched, form.optimizers, strict=True)
            ]
            with ExitStack() as stack:
                for monitor in monitors:
                    stack.enter_context(monitor)
                form.loop(monitors)
    finally:
        torch.set_rng_state(kept)
    assert len(bare.states) == len(form.states) == STEPS
    different = {i: changes(a, b) for i, (a, b) in enumerate(zip(bare.states, form.states, strict=True))}
    assert {i: what for i, what in different.items() if what} == {}
    return monitors


@pytest.mark.parametrize("name", FORMS)
def test_the_same_bits_after_every_step(name: str) -> None:
    for monitor in compared(FORMS[name]):
        run = monitor.run
        assert run.series("train/loss")[0].tolist() == list(range(STEPS))
        unseen = {e.detail.get("signal") or e.detail.get("part") for e in run.events if e.name in ("blind", "disabled")}
        if name in WITHOUT_CURVATURE:
            assert "curvature" in unseen
            assert not any(column.startswith("curvature/") for column in run.names)
        elif name in WITHOUT_SCALE:
            assert "curvature/lambda_max" in run.names
            assert not {"curvature/batch_sharpness", "curvature/lambda_max.limit", "stability/lr_ratio"} & set(
                run.names
            )
        else:
            assert "curvature/batch_sharpness" in run.names
            assert "curvature" not in unseen
        assert "grad/autocorr_raw_lag1" in run.names or "burst" in unseen


def test_a_loss_that_runs_another_model_leaves_that_alone_too() -> None:
    compared(partial(adversaries, normalised=True))


def test_complex_gradients_are_not_taken_for_real_ones() -> None:
    (monitor,) = compared(complex_numbers)  # torch warns where imaginary parts are dropped, which is an error here
    cosines = monitor.run.series("grad/cos_moment")[1]
    assert cosines.size > 0
    assert np.all(np.abs(cosines) <= 1)


@pytest.mark.parametrize("name", ["L-BFGS with a closure", "sparse gradients", "groups added later"])
def test_what_is_unsupported_is_no_error(name: str) -> None:
    assert [e for monitor in compared(FORMS[name]) for e in monitor.run.events if e.name == "error"] == []
