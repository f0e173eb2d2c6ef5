"""One process fails in every way: the others hear of it within the timeout, by a typed error, and training goes on."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dyntune
from tests.distributed.harness import Job
from tests.distributed.problem import Batch, laid_out, shards

CRITERION = nn.CrossEntropyLoss()
TIMEOUT = 3.0
LAYOUTS = ("DDP", "FSDP2", "FSDP2, finite differences", "TP")


class QuarrelError(Exception):
    """What a user's code raises; no error of ours, and none that torch knows."""


def quick_and_slow(quick: set[Any], *factors: Sequence[Any]) -> list[Any]:
    """All combinations; those in `quick` run in `make test`, too."""
    return [
        pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in itertools.product(*factors)
    ]


def setting(layout: str) -> tuple[nn.Module, Batch, dict[str, Any]]:
    """Model, this process's batch and options, with a team that does not wait for long."""
    kind, _, differences = layout.partition(", ")
    size, rank = (1, 0) if kind == "TP" else (dist.get_world_size(), dist.get_rank())
    batch = shards("mlp", size, equal=False)[rank][0]
    method = "finite-difference" if differences else "exact"
    return laid_out("mlp", kind), batch, {"method": method, "process_group": dyntune.Team(timeout=TIMEOUT)}


def trains(model: nn.Module, batch: Batch) -> bool:
    """One more step on the user's own group; all processes have to come."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss = CRITERION(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return bool(torch.isfinite(CRITERION(model(batch[0]), batch[1])))


def caught(action: Callable[[], Any]) -> tuple[str, str]:
    """Type and text of what an action raises."""
    try:
        action()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "nothing", ""


class Failing:
    """A loss that raises at one call on the last rank, before or after the model's own forward pass."""

    def __init__(self, at: int, error: BaseException, *, early: bool = False) -> None:
        self.calls, self.at, self.error, self.early = 0, at, error, early

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self.calls += 1
        due = self.calls == self.at and dist.get_rank() == dist.get_world_size() - 1
        if due and self.early:
            raise self.error
        outputs = model(batch[0])
        if due:
            raise self.error
        return CRITERION(outputs, batch[1])


def raising(layout: str, at: int, error: BaseException, early: bool) -> tuple[tuple[str, str], float, bool]:
    model, batch, options = setting(layout)
    begin = time.monotonic()
    loss = Failing(at, error, early=early)
    found = caught(lambda: dyntune.eigenvalues(dyntune.hessian(model, batch, loss, **options), max_products=4))
    return found, time.monotonic() - begin, trains(model, batch)


def last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def eigenvalues(model: nn.Module, batch: Any, loss_fn: Any = None, **options: Any) -> dyntune.Eigenvalues:
    options |= {} if loss_fn else {"criterion": CRITERION}
    return dyntune.eigenvalues(dyntune.hessian(model, batch, loss_fn, **options), max_products=4, rtol=1e-12)


# -- one raises ------------------------------------------------------------------------------------------------------


# The calls of the loss: the first is made when the operator is, the second checks that the loss repeats or makes the
# session's graph, and with finite differences many follow.
@pytest.mark.parametrize(
    ("layout", "at", "early"),
    quick_and_slow({("DDP", 2, False), ("FSDP2, finite differences", 3, False)}, LAYOUTS, (1, 2, 3), (True, False)),
)
def test_a_loss_that_raises_on_one_rank(job, layout, at, early):
    at = min(at, 2) if layout == "TP" else at  # there is no third
    first, second = job.run(raising, layout, at, QuarrelError("not today"), early)
    assert second[0] == ("QuarrelError", "not today")
    assert first[0][0] == "DistributedError"
    assert "rank 1: QuarrelError: not today" in first[0][1]
    assert first[2]
    assert second[2]
    assert first[1] < TIMEOUT  # heard of, not waited for: no process is slow here


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ctrl_c_on_one_rank(job, layout):
    first, second = job.run(raising, layout, 2, KeyboardInterrupt(), False)
    assert second[0][0] == "KeyboardInterrupt"
    assert first[0][0] == "DistributedError"
    assert "rank 1: KeyboardInterrupt" in first[0][1]
    assert first[2]
    assert second[2]


def raising_within(layout: str, error: BaseException) -> tuple[tuple[str, str], bool]:
    """The backward pass of the gradient's graph raises: a product in mid-way."""
    model, batch, options = setting(layout)

    def loss(net: nn.Module, batch: Batch) -> torch.Tensor:
        value = CRITERION(net(batch[0]), batch[1])
        if last() and value.requires_grad:
            value.register_hook(lambda g: (_ for _ in ()).throw(error))
        return value

    return caught(lambda: eigenvalues(model, batch, loss, **options)), trains(model, batch)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backward_pass_that_raises_on_one_rank(job, layout):
    first, second = job.run(raising_within, layout, QuarrelError("within"))
    assert second[0] == ("QuarrelError", "within")
    assert first[0][0] == "DistributedError"
    assert "rank 1: QuarrelError: within" in first[0][1]
    assert first[1]
    assert second[1]


def also_elsewhere(layout: str, what: str) -> tuple[tuple[str, str], bool]:
    """Errors in loss(), gradient(), and because one process's model was changed."""
    model, batch, options = setting(layout)
    loss = Failing(0, QuarrelError("late"))
    h = dyntune.hessian(model, batch, loss, **options)
    loss.at = loss.calls + 1
    if what == "stale":
        loss.at = 0
        if last():
            model.train(mode=False)
            next(model.parameters()).requires_grad_(False)
    action = {"loss": h.objective.loss, "gradient": h.objective.gradient, "stale": lambda: dyntune.eigenvalues(h)}[what]
    found = caught(action)
    model.requires_grad_(True)
    return found, trains(model, batch)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient", "stale"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_that_is_measured_together_fails_together(job, layout, what):
    first, second = job.run(also_elsewhere, layout, what)
    assert second[0][0] == ("StaleOperatorError" if what == "stale" else "QuarrelError")
    assert first[0][0] == "DistributedError"
    assert f"rank 1: {second[0][0]}" in first[0][1]
    assert first[1]
    assert second[1]


# -- one holds what cannot be measured -------------------------------------------------------------------------------


def with_nan(layout: str, where: str) -> tuple[str, str]:
    model, (x, y), options = setting(layout)
    if last() and where == "data":
        x = torch.full_like(x, torch.nan)
    if last() and where == "parameters":
        with torch.no_grad():
            for p in model.parameters():
                getattr(p, "_local_tensor", p).fill_(torch.nan)
    return caught(lambda: eigenvalues(model, (x, y), **options))


@pytest.mark.parametrize(
    ("layout", "where"),
    quick_and_slow({("FSDP2", "parameters")}, [name for name in LAYOUTS if name != "TP"], ("data", "parameters")),
)
def test_nan_on_one_rank(job, layout, where):
    first, second = job.run(with_nan, layout, where)
    assert second[0] == "NonFiniteError"
    if layout == "FSDP2" and where == "parameters":
        assert first[0] == "DistributedError"
    assert first[0] in ("DistributedError", "NonFiniteError")
    assert "rank 1: NonFiniteError" in first[1] or first[0] == "NonFiniteError"


def lacking(kind: str) -> tuple[float, str, str]:
    """One process has no memory for a graph, or an operation without second derivative."""
    model, batch, options = setting("DDP")
    calls = 0

    def loss(net: nn.Module, batch: Batch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if last() and calls == 3 and kind:
            raise torch.OutOfMemoryError("out") if kind == "memory" else NotImplementedError("no such derivative")
        return CRITERION(net(batch[0]), batch[1])

    h = dyntune.hessian(model, batch, loss, **(options | {"method": "auto"}))
    return float(dyntune.eigenvalues(h, max_products=6, rtol=1e-12)), h.engine, h.reason


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "engine"), [("memory", "re-forward"), ("derivative", "finite-difference")])
def test_what_one_lacks_all_do_without(job, kind, engine):
    (value, first, reason), (other, second, _) = job.run(lacking, kind)
    (truth, usual, _), _ = job.run(lacking, "")
    assert usual == "retained-graph"
    assert (first, second) == (engine, engine)
    assert "rank 1" in reason
    assert value == other
    assert value == pytest.approx(truth, rel=1e-4)


# -- one is not there ------------------------------------------------------------------------------------------------


def absent(layout: str, fresh: bool) -> tuple[tuple[str, str], float, bool, bool]:
    """The last process measures later than the others are ready to wait."""
    model, batch, options = setting(layout)
    timeout = TIMEOUT + (LAYOUTS.index(layout) + 1) / 10 if fresh else TIMEOUT
    known = options.pop("process_group")

    def team() -> dyntune.Team:
        return dyntune.Team(timeout=timeout) if fresh else known

    store = dist.distributed_c10d._get_default_store()
    key = f"given up {layout} {fresh}"
    begin = time.monotonic()
    if last():
        store.wait([key])
        found = ("", "")
    else:
        found = caught(lambda: eigenvalues(model, batch, process_group=team(), **options))
        store.set(key, "yes")
    took = time.monotonic() - begin
    users = dist.new_group()  # the names of groups still go together
    dist.all_reduce(torch.ones(1), group=users)
    dist.destroy_process_group(users)
    again = eigenvalues(model, batch, process_group=team(), **options)
    return found, took, trains(model, batch), again.num_products == 4


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True], ids=["known processes", "first call"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_process_that_does_not_come(job, layout, fresh):
    first, second = job.run(absent, layout, fresh)
    assert first[0][0] == "DistributedError"
    assert "all ranks have to measure at the same step" in first[0][1]
    # The agreeing group's timeout, and that of a pass which it may come after; the rest is for a busy machine.
    assert first[1] < 3 * TIMEOUT
    assert first[2:] == second[2:] == (True, True)


def killed(layout: str, at: int) -> tuple[tuple[str, str], float]:
    model, batch, options = setting(layout)

    class Kill(Failing):
        def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
            self.calls += 1
            outputs = model(batch[0])
            if self.calls == self.at and last():
                os.kill(os.getpid(), signal.SIGKILL)
            return CRITERION(outputs, batch[1])

    begin = time.monotonic()
    found = caught(lambda: eigenvalues(model, batch, Kill(at, QuarrelError()), **options))
    return found, time.monotonic() - begin


@pytest.mark.parametrize(("layout", "at"), quick_and_slow({("DDP", 2)}, LAYOUTS, (1, 2)))
def test_a_process_that_is_killed(layout, at):
    with Job(3) as job:
        *alive, dead = job.outcomes(killed, layout, at)
    assert dead.lost
    for outcome in alive:
        assert not outcome.error
        (kind, text), took = outcome.value
        assert kind == "DistributedError"
        assert "killed" in text
        assert took < 3 * TIMEOUT
