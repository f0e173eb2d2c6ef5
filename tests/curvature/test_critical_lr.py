"""The forward-only critical rate against brute force on a fine grid in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import dyntune
from dyntune.curvature.stochastic import critical_learning_rate
from dyntune.objective.objective import Objective
from tests.objective.zoo import ZOO, Case, made

# The middle of a bracket of ratio 1 + 1/16 is within its root of either end; the grid adds its own step.
GRID = 1.003
CLAIMED = math.sqrt(1 + 1 / 16) * GRID


def measured(model: nn.Module, batches: Any, loss_fn: Any = None, **options: Any) -> dyntune.Estimate:
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    found = dyntune.sharpness(model, batches, loss_fn, optimizer=optimizer, quantities=("critical_lr",), **options)
    assert found.critical_lr is not None
    return found.critical_lr


def brute_force(case: Case, batch: Any, scale: dict[str, torch.Tensor] | None = None) -> float:
    """First rate of a geometric grid from 1e-3 to 1e4 at which a step raises the batch's loss; float64, no search."""
    start = {name: p.detach() for name, p in case.model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return case.criterion(functional_call(case.model, parameters, (batch[0],)), batch[1])

    with sdpa_kernel(SDPBackend.MATH):
        live = {name: p.clone().requires_grad_() for name, p in start.items()}
        first = loss(live)
        slopes = dict(zip(live, torch.autograd.grad(first, list(live.values())), strict=True))
        step = slopes if scale is None else {name: slopes[name] / scale[name] for name in slopes}
        with torch.no_grad():
            for i in range(math.ceil(math.log(1e7) / math.log(GRID))):
                rate = 1e-3 * GRID**i
                value = loss({name: start[name] - rate * step[name] for name in start})
                if not value <= first:
                    return rate
    return math.inf


def cut(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three unequal batches in which every input has two targets: a separable batch has a loss that never rises."""
    x, y = (t.repeat_interleave(2, dim=0) for t in case.batch)
    y[1::2] = (y[1::2] + 1) % 3
    return [(x[a:b], y[a:b]) for a, b in pairwise([0, 2, 6, len(x)])]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "sdpa", "conv", "tied", "encoder, eval"])
def test_lies_within_its_bracket_of_the_rate_found_by_brute_force(name: str) -> None:
    case = ZOO[name]().double()
    truths = [brute_force(case, batch) for batch in cut(case)]
    assert max(truths) < math.inf
    for batch, truth in zip(cut(case), truths, strict=True):
        alone = measured(case.model, [batch, batch], criterion=case.criterion)
        assert truth / CLAIMED <= float(alone) <= truth * CLAIMED
    together = measured(case.model, cut(case), criterion=case.criterion)
    harmonic = 3 / sum(1 / truth for truth in truths)
    assert harmonic / CLAIMED <= float(together) <= harmonic * CLAIMED
    assert together.low <= harmonic <= together.high


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_along_the_step_of_an_adaptive_optimizer(name: str) -> None:
    case = ZOO[name]().double()
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        case.criterion(case.model(case.batch[0]), case.batch[1]).backward()
        optimizer.step()
    corrected = 1 - 0.999**20
    scale = {n: (optimizer.state[p]["exp_avg_sq"] / corrected).sqrt() + 1e-8 for n, p in case.model.named_parameters()}
    batch = cut(case)[-1]
    truth = brute_force(case, batch, scale)
    found = measured(case.model, [batch, batch], criterion=case.criterion, optimizer=optimizer)
    assert truth / CLAIMED <= float(found) <= truth * CLAIMED


def test_one_batch_is_cut_into_four_parts() -> None:
    case = ZOO["mlp"]().double()
    x, y = case.batch
    one = measured(case.model, (x, y), criterion=case.criterion)
    four = measured(case.model, list(zip(x.split(3), y.split(3), strict=True)), criterion=case.criterion)
    assert "4 parts" in one.method
    assert (one.value, one.low, one.high) == (four.value, four.low, four.high)
    assert one.status is dyntune.Status.OK
    few = measured(case.model, (x[:3], torch.zeros(3, 3).double()), criterion=nn.MSELoss())
    assert "3 parts" in few.method


@pytest.mark.parametrize(
    ("loss", "edge"),
    [
        # each falls up to z = 1 and is not finite beyond
        (lambda z: torch.sqrt(1 - z), 2.0),  # NaN; slope -1/2 at 0
        (lambda z: -z / (z < 1), 1.0),  # -inf
        (lambda z: -z + torch.where(z < 1, 0.0, torch.inf), 1.0),  # inf
    ],
    ids=["nan", "minus infinity", "infinity"],
)
def test_a_loss_that_stops_being_finite_counts_as_risen(loss: Callable[..., torch.Tensor], edge: float) -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    found = measured(model, torch.ones(8, 1), lambda m, batch: loss(m(batch)).mean())
    assert edge / CLAIMED <= float(found) <= edge * CLAIMED


def bowls(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
    """Mean of a w^2 / 2 - b w over rows (a, b)."""
    (w,) = model.parameters()
    return (batch[0] @ torch.stack([w.square() / 2, -w]).view(2, 1)).mean()


def bowl(*parts: tuple[float, float]) -> tuple[nn.Module, list[tuple[torch.Tensor]]]:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    return model, [(torch.tensor([part], dtype=torch.float32),) for part in parts]


def test_parts_that_never_rise_count_as_an_infinite_rate() -> None:
    """Three bowls a = 1 with the rate 2, and a straight line: the mean of 1 / rate is 3/8."""
    model, batches = bowl((1, 1), (1, 2), (1, 3), (0, 1))
    found = measured(model, batches, bowls)
    assert 8 / 3 / CLAIMED <= float(found) <= 8 / 3 * CLAIMED
    assert found.status is dyntune.Status.OK
    straight = measured(*bowl((0, 1), (0, 2)), bowls)
    assert straight.status is dyntune.Status.REFUSED
    assert "finite critical rate" in straight.reason


def test_parts_without_a_step_are_left_out_and_named() -> None:
    model, batches = bowl((1, 1), (1, 2), (1, 0))
    found = measured(model, batches, bowls)
    assert 2 / CLAIMED <= float(found) <= 2 * CLAIMED
    assert found.status is dyntune.Status.UNCERTAIN
    assert "1 of 3 parts" in found.reason


def test_critical_rate_of_a_quadratic_in_closed_form() -> None:
    """0.5 sum a w^2 along -g = -a w returns to its start at 2 g.g / g.Hg; every part is the same."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    a = torch.tensor([9.0, 4.0, 1.0])
    batches = [(torch.diag(a.sqrt()),)] * 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = dyntune.sharpness(
        model,
        batches,
        lambda m, b: 0.5 * (m(b[0]) ** 2).sum(),
        optimizer=optimizer,
        quantities=("critical_lr", "batch"),
    )
    exact = 2 * float((a**2).sum() / (a**3).sum())
    assert found.critical_lr is not None
    assert float(found.critical_lr) == pytest.approx(exact, rel=CLAIMED - 1)
    assert found.batch is not None
    assert 2 / float(found.batch) == pytest.approx(exact, rel=1e-5)


def test_a_barrier_in_closed_form() -> None:
    """log(1 - w x) is NaN beyond its edge: NaN counts as risen."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)

    def loss_fn(m: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        z = m(batch)
        return (-torch.log(1 - z) - 2 * z).mean()

    found = measured(model, torch.ones(8, 1), loss_fn)
    # -log(1 - s) - 2 s = 0 at s = 0.7968; the gradient at 0 is -1, so a rate of s moves z to s
    assert 0.7968 / CLAIMED <= float(found) <= 0.7968 * CLAIMED


def test_needs_no_second_derivative() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    model = nn.Linear(2, 1, bias=False)
    found = measured(model, [(torch.eye(2),)] * 4, lambda m, b: Once.apply(m(b[0])).sum())
    assert 1 / CLAIMED <= float(found) <= CLAIMED  # loss |w|^2: returns to its start at rate 1


class Population:
    """4000 rows of a regression with noise, linear or by a small network, at a point away from its minimum."""

    def __init__(self, kind: str) -> None:
        g = torch.Generator().manual_seed(3)
        self.x = torch.randn(4000, 5, generator=g).double() * torch.linspace(0.5, 1.5, 5).double()
        self.y = (self.x.sum(1, keepdim=True) + torch.randn(4000, 1, generator=g).double()) / 2
        if kind == "linear":
            self.model: nn.Module = nn.Linear(5, 1, bias=False)
            nn.init.zeros_(self.model.weight)
        else:
            self.model = made(lambda: nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)))
        self.model = self.model.double()

    def found(self, seed: int, count: int) -> dyntune.Estimate:
        """From independent batches of 8 rows, drawn with replacement."""
        index = torch.randint(4000, (count, 8), generator=torch.Generator().manual_seed(seed))
        batches = [(self.x[i], self.y[i]) for i in index]
        objective = Objective(self.model, batches, criterion=nn.MSELoss(), num_checked=1)
        return critical_learning_rate(objective, None)

    def truth(self, kind: str) -> float:
        """Harmonic mean of the rates of batches of 8 rows: of 100,000 in closed form, else of 1500 searches."""
        if kind != "linear":
            return float(self.found(10**6, 1500))
        index = torch.randint(4000, (100_000, 8), generator=torch.Generator().manual_seed(10**6))
        x, y = self.x[index], self.y[index]
        g = -2 / 8 * torch.einsum("bri,brj->bi", x, y)
        curved = 2 / 8 * torch.einsum("bri,bi->br", x, g).square().sum(1)
        return 1 / float((curved / (2 * g.square().sum(1))).mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "network"])
def test_interval_covers_the_population_s_rate_at_its_level(kind: str) -> None:
    """400 draws of 12 batches of 8 rows; the truth is the same functional at that batch size."""
    population = Population(kind)
    truth = population.truth(kind)
    estimates = [population.found(seed, 12) for seed in range(400)]
    covered = sum(truth in estimate for estimate in estimates)
    assert binom.ppf(1e-3, 400, 0.95) <= covered < 400
