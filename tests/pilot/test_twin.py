"""A twin trains exactly as the user's own loop would, and never touches the user's model or optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dyntune.errors import InvalidArgumentError
from dyntune.objective.objective import Objective
from dyntune.pilot.probe import Pilot, go_on
from dyntune.pilot.runs import InitialLosses, Ramp, ShortRun, critical_lr, ramp, short_run
from dyntune.pilot.twin import CostMeter, Training, Twin
from dyntune.stability.thresholds import recurrence
from tests.suggest.problems import classification, mlp, same, snapshot

CE = nn.CrossEntropyLoss()
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, start: int, steps: int) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        x, y = batches[step % len(batches)]
        loss = CE(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twin_continues_training_bit_for_bit(name: str) -> None:
    """From a half-trained model and its optimizer's state, the twin takes the steps that the user's loop takes next."""
    batches = classification(8)
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, batches, 0, 8)  # a whole epoch: the twin begins at batch 0 again
    before = snapshot(model, optimizer)
    objective = Objective(model, batches, criterion=CE)
    with objective.measuring() as buffers:
        twin = Twin(objective, Training(optimizer), buffers, CostMeter(100), seed=0)
        rate = float(optimizer.param_groups[0]["lr"])
        losses = [twin.step(rate) for _ in range(10)]
        weights = [t.detach().clone() for t in twin.tensors]
    assert same(before, snapshot(model, optimizer))
    expected = train(model, optimizer, batches, 0, 10)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_checkpointed_blocks_are_recomputed_with_the_twins_parameters() -> None:
    batches = classification(4)
    model, plain = Checkpointed(), mlp()
    objective = Objective(model, batches, criterion=CE)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    with objective.measuring() as buffers:
        twin = Twin(objective, Training("sgd"), buffers, CostMeter(100), seed=0)
        losses = [twin.step(0.5) for _ in range(6)]
    assert losses == train(plain, optimizer, batches, 0, 6)


def test_clipping_and_accumulation_match_a_plain_loop() -> None:
    batches = classification(4)
    model, plain = mlp(), mlp()
    objective = Objective(model, batches, criterion=CE)
    with objective.measuring() as buffers:
        training = Training("sgd", clip_norm=0.1, accumulate=2)
        twin = Twin(objective, training, buffers, CostMeter(100), seed=0)
        twin.step(0.5)
        found = [t.detach().clone() for t in twin.tensors]
    for x, y in batches[:2]:
        (CE(plain(x), y) / 2).backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert float(norm) > 0.1  # the clip is active
    torch.optim.SGD(plain.parameters(), lr=0.5).step()
    for a, b in zip(found, plain.parameters(), strict=True):
        # (a + b) / 2 against a / 2 + b / 2: a few rounding units of weights of order one
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-6)


def quadratic(eigenvalues_: torch.Tensor) -> tuple[nn.Linear, torch.Tensor, Any]:
    """Loss 0.5 sum(lambda_i w_i^2) as a model, with w = 1."""
    model = nn.Linear(len(eigenvalues_), 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    return model, torch.diag(eigenvalues_.sqrt()), lambda m, b: 0.5 * (m(b) ** 2).sum()


def test_critical_rate_of_a_quadratic_in_closed_form() -> None:
    lam = torch.tensor([9.0, 4.0, 1.0])
    model, batch, loss_fn = quadratic(lam)
    objective = Objective(model, batch, loss_fn)
    with objective.measuring() as buffers:
        meter = CostMeter(100)
        twin = Twin(objective, Training("sgd"), buffers, meter, seed=0)
        _, gradient = twin.gradient(0)
        found = critical_lr(twin, 0, gradient, guess=1e-4)
        # With g = lambda w at w = 1 the loss along -g is a parabola that returns to its start at 2 g.g / g.Hg; found
        # to within a factor 2.
        exact = 2 * float((lam**2).sum() / (lam**3).sum())
        assert exact <= found <= 2 * exact
        assert meter.spent > 0


def test_preconditioner_of_a_stepped_optimizer() -> None:
    """With Adam's state at v, P = sqrt(v) + eps."""
    lam = torch.tensor([9.0, 4.0, 1.0])
    model, batch, loss_fn = quadratic(lam)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    loss_fn(model, batch).backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    state["exp_avg_sq"].copy_(torch.tensor([[81.0, 1.0, 4.0]]) * (1 - 0.999 ** float(state["step"])))
    objective = Objective(model, batch, loss_fn)
    with objective.measuring() as buffers:
        twin = Twin(objective, Training(optimizer), buffers, CostMeter(100), seed=0)
        (scale,) = twin.preconditioner()
    torch.testing.assert_close(scale, torch.tensor([[9.0, 1.0, 2.0]]))


@pytest.mark.parametrize(("factor", "diverges"), [(0.98, False), (1.02, True)])
def test_short_run_sees_the_edge_of_a_quadratic(factor: float, diverges: bool) -> None:
    model, batch, loss_fn = quadratic(torch.tensor([9.0, 1.0]))
    objective = Objective(model, batch, loss_fn)
    with objective.measuring() as buffers:
        twin, still = (Twin(objective, Training("sgd"), buffers, CostMeter(1000), seed=0) for _ in range(2))
        run = short_run(twin, factor * 2 / 9, steps=100, warmup=0, initial=InitialLosses(still))
    # 1.02^2 per step squared: the loss doubles within 100 steps; 0.98 decays
    assert run.diverged is diverges
    assert math.isinf(run.score) is diverges


def test_ramp_stops_at_its_blow_up_and_names_the_rate() -> None:
    model, batch, loss_fn = quadratic(torch.tensor([9.0, 1.0]))
    objective = Objective(model, batch, loss_fn)
    lrs = [1e-3 * 2.0**i for i in range(20)]
    with objective.measuring() as buffers:
        twin, still = (Twin(objective, Training("sgd"), buffers, CostMeter(1000), seed=0) for _ in range(2))
        found = ramp(twin, lrs, InitialLosses(still))
    assert found.blow_up is not None
    # Above the edge; the loss had fallen thirtyfold, and takes three or four doublings to climb back beyond its start.
    assert 2 / 9 < found.blow_up < 16 * 2 / 9
    assert len(found.lrs) == len(found.losses) < 20


@pytest.mark.parametrize(("factor", "diverges"), [(0.9, False), (3.0, True)])
def test_going_on_strikes_off_a_rate_above_the_edge(factor: float, diverges: bool) -> None:
    """The best short run was too short to see a quadratic's edge, 2 / 9; all that is left goes into a longer one."""
    model, batch, loss_fn = quadratic(torch.tensor([9.0, 1.0]))
    objective = Objective(model, batch, loss_fn)
    with objective.measuring() as buffers:
        meter = CostMeter(40)
        twin, still = (Twin(objective, Training("sgd"), buffers, meter, seed=0) for _ in range(2))
        runs = [ShortRun(0.01, (4.0,), diverged=False), ShortRun(factor * 2 / 9, (0.1,), diverged=False)]
        known = recurrence(twin.optimizer)
        before = InitialLosses(still)
        pilot = Pilot(known, 1.0, Ramp((1.0,), (5.0,), None), runs, before, initial=5.0, gains=(4.9, 4.9), warmup=0)
        go_on(pilot, twin)
    assert pilot.follow is not None
    assert pilot.follow.diverged is diverges
    assert [run.diverged for run in pilot.runs] == [False, diverges]
    assert twin.steps == len(pilot.follow.losses)
    assert diverges or twin.steps == 30  # 40 gradients, a third of one more for the loss before each step


def test_one_high_batch_is_no_blow_up_and_two_are() -> None:
    """Rows of four may be high by chance: here the gradient is zero, and every loss is the batch's own."""
    model = nn.Linear(1, 1, bias=False)

    def losses(*values: float) -> Any:
        return [(torch.tensor([[value]]),) for value in values]

    def loss_fn(m: nn.Module, b: tuple[torch.Tensor]) -> torch.Tensor:
        return b[0].sum() + 0.0 * m(b[0]).sum()

    for values, expected in (((1.0, 5.0, 1.0, 1.0), False), ((1.0, 5.0, 5.0, 1.0), True)):
        objective = Objective(model, losses(*values), loss_fn)
        with objective.measuring() as buffers:
            twin, still = (Twin(objective, Training("sgd"), buffers, CostMeter(100), seed=0) for _ in range(2))
            initial = InitialLosses(still)
            for step in range(4):
                initial.note(step, 1.0)
            assert short_run(twin, 0.1, steps=4, warmup=0, initial=initial).diverged is expected


@pytest.mark.parametrize(
    ("loss", "initial", "expected"),
    [(1.0, 1.0, False), (2.01, 1.0, True), (math.nan, 1.0, True), (math.inf, 1.0, True), (-0.5, -1.0, False)],
)
def test_blow_up_criterion(loss: float, initial: float, expected: bool) -> None:
    model, batch, loss_fn = quadratic(torch.ones(1))
    objective = Objective(model, batch, loss_fn)
    with objective.measuring() as buffers:
        losses = InitialLosses(Twin(objective, Training("sgd"), buffers, CostMeter(10), seed=0))
        losses.note(0, initial)
        assert losses.blew_up(0, loss) is expected


def test_a_batch_that_starts_high_is_compared_with_itself() -> None:
    """Batches of very different loss: the worst one's start is ten times the mean, and no blow-up."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    batches = [(torch.ones(1, 1), torch.full((1, 1), 1 - math.sqrt(v))) for v in [0.1] * 9 + [10.0]]
    objective = Objective(model, batches, criterion=torch.nn.MSELoss())
    meter = CostMeter(100)
    with objective.measuring() as buffers:
        losses = InitialLosses(Twin(objective, Training("sgd"), buffers, meter, seed=0))
        assert [losses.of(i) for i in range(10)] == pytest.approx([0.1] * 9 + [10.0], rel=1e-5)
        spent = meter.spent
        assert losses.mean == pytest.approx(1.09, rel=1e-5)
        assert not losses.blew_up(9, 11.0)
        assert losses.blew_up(9, 11.2)
        assert losses.blew_up(0, 1.3)
        assert losses.of(19) == losses.of(9)  # the batches come round again
        assert meter.spent == spent  # each is evaluated once


def test_an_optimizer_that_cannot_be_rebuilt_asks_for_a_factory() -> None:
    class Odd(torch.optim.SGD):
        def __init__(self, params: Any, secret: int, **options: Any) -> None:
            super().__init__(params, **options)

    model = mlp()
    objective = Objective(model, classification(2), criterion=CE)
    with objective.measuring() as buffers, pytest.raises(InvalidArgumentError, match="lambda params"):
        Twin(objective, Training(Odd(model.parameters(), 3, lr=0.1)), buffers, CostMeter(10), seed=0)


def test_state_of_the_copy_is_its_own() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, classification(2), 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    objective = Objective(model, classification(2), criterion=CE)
    with objective.measuring() as buffers:
        twin = Twin(objective, Training(optimizer), buffers, CostMeter(10), seed=0)
        twin.step(0.1)
    assert same(saved["state"], optimizer.state_dict()["state"])
