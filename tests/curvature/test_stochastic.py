"""Batch, directional and forward-only curvature against float64 oracles and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import nn

import dyntune
from dyntune.errors import InvalidArgumentError, NonFiniteError, NotConvergedError
from tests.objective.oracle import dense_hessian
from tests.objective.snapshot import snapshot
from tests.objective.zoo import ZOO, Case, call


def gradient(case: Case, batch: Any) -> torch.Tensor:
    loss = case.criterion(case.model(batch[0]), batch[1])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(case.model.parameters()))])


def cut(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three unequal batches."""
    x, y = case.batch
    n = len(x)
    edges = [0, n // 4, n // 2, n]
    return [(x[a:b], y[a:b]) for a, b in pairwise(edges)]


@pytest.mark.parametrize("name", ["mlp", "sdpa", "conv"])
@pytest.mark.parametrize("adam", [False, True], ids=["plain", "adam"])
def test_batch_and_directional_sharpness_equal_their_definitions(name: str, adam: bool) -> None:
    case = ZOO[name]().double()
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01) if adam else None
    if optimizer is not None:
        for _ in range(20):
            optimizer.zero_grad()
            case.criterion(case.model(case.batch[0]), case.batch[1]).backward()
            optimizer.step()
    batches = cut(case)
    found = dyntune.sharpness(
        case.model, batches, criterion=case.criterion, optimizer=optimizer, quantities=("batch", "directional")
    )
    p: Any = 1.0
    if optimizer is not None:
        states = [optimizer.state[q] for q in case.model.parameters()]
        p = torch.cat([((s["exp_avg_sq"] / (1 - 0.999**20)).sqrt() + 1e-8).reshape(-1) for s in states])
    ratios = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for batch in batches:
            g, h = gradient(case, batch), dense_hessian(case.model, batch, call(case))
            d = g / p
            ratios.append(float(d @ h @ d / (d @ g)))
        g, h = gradient(case, case.batch), dense_hessian(case.model, case.batch, call(case))
    d = g / p
    assert found.batch is not None
    assert found.directional is not None
    assert float(found.batch) == pytest.approx(sum(ratios) / 3, rel=1e-10)
    assert float(found.directional) == pytest.approx(float(d @ h @ d / (d @ g)), rel=1e-10)
    assert found.batch.covers == found.directional.covers == "sampling"


def weighted_squares(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
    """0.5 sum a w^2."""
    return 0.5 * (batch[0] * model.weight**2).sum()  # type: ignore[operator]


def noisy_quadratic(count: int, seed: int) -> tuple[nn.Module, list[tuple[torch.Tensor]]]:
    """Loss 0.5 sum a_b w^2 with random a_b: the curvature along each batch's gradient is a random number."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    return model, [((torch.rand(3, generator=g) + 0.5)[None],) for _ in range(count)]


def test_interval_of_batch_sharpness_covers_the_population_mean_at_its_level() -> None:
    """400 draws of 12 batches; g = a w at w = 1, so d.Hd / d.g = sum a^3 / sum a^2, its mean from 2e6 draws."""
    g = torch.Generator().manual_seed(99)
    a = torch.rand(2_000_000, 3, generator=g).double() + 0.5
    truth = float(((a**3).sum(1) / (a**2).sum(1)).mean())
    covered = 0
    for seed in range(400):
        model, batches = noisy_quadratic(12, seed)
        found = dyntune.sharpness(model, batches, weighted_squares, quantities=("batch",))
        assert found.batch is not None
        covered += truth in found.batch
    assert binom.ppf(1e-3, 400, 0.95) <= covered <= binom.ppf(1 - 1e-3, 400, 0.95)


def test_critical_rate_of_a_quadratic_in_closed_form() -> None:
    """0.5 sum a w^2 along -g = -a w returns to its start at 2 g.g / g.Hg; every part is the same."""
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    a = torch.tensor([9.0, 4.0, 1.0])
    batches = [(torch.diag(a.sqrt()),)] * 5
    found = dyntune.sharpness(
        model,
        batches,
        lambda m, b: 0.5 * (m(b[0]) ** 2).sum(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        quantities=("critical_lr", "batch"),
    )
    exact = 2 * float((a**2).sum() / (a**3).sum())
    assert found.critical_lr is not None
    assert float(found.critical_lr) == pytest.approx(exact, rel=1 / 16)  # the bisection's stop
    assert found.batch is not None
    assert 2 / float(found.batch) == pytest.approx(exact, rel=1e-5)


def test_critical_rate_survives_nan_and_cuts_one_batch_into_parts() -> None:
    """log(1 - w x) is NaN beyond its edge: NaN counts as risen."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)

    def loss_fn(m: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        z = m(batch)
        return (-torch.log(1 - z) - 2 * z).mean()

    found = dyntune.sharpness(
        model,
        torch.ones(8, 1),
        loss_fn,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        quantities=("critical_lr",),
    )
    assert found.critical_lr is not None
    assert "4 parts" in found.critical_lr.method
    # -log(1 - s) - 2 s = 0 at s = 0.7968; the gradient at 0 is -1, so a rate of s moves z to s
    assert float(found.critical_lr) == pytest.approx(0.7968, rel=1 / 16)


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
    found = dyntune.sharpness(
        model,
        [(torch.eye(2),)] * 4,
        lambda m, b: Once.apply(m(b[0])).sum(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        quantities=("critical_lr",),
    )
    assert found.critical_lr is not None
    assert float(found.critical_lr) == pytest.approx(1.0, rel=1 / 16)  # loss |w|^2: returns to its start at rate 1


@pytest.mark.parametrize("quantity", ["batch", "directional"])
def test_derivatives_that_overflow_are_a_typed_error(quantity: Any) -> None:
    """Loss and gradient of 1e38 exp(w) are finite in float32; their products are not."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e-30)
    with pytest.raises(NonFiniteError, match="curvature along the step"):
        dyntune.sharpness(
            model, torch.ones(2, 1), lambda m, b: (1e38 * torch.exp(m(b))).sum() / 2, quantities=(quantity,)
        )


def test_one_batch_has_no_interval_and_strict_says_so() -> None:
    case = ZOO["mlp"]()
    found = dyntune.sharpness(case.model, case.batch, criterion=case.criterion, quantities=("batch",))
    assert found.batch is not None
    assert found.batch.status is dyntune.Status.ONE_BATCH
    assert math.isinf(found.batch.high)
    with pytest.raises(NotConvergedError) as caught:
        dyntune.sharpness(case.model, case.batch, criterion=case.criterion, quantities=("batch",), strict=True)
    assert caught.value.partial.batch is not None


def test_quantities_that_need_an_optimizer_say_so() -> None:
    case = ZOO["mlp"]()
    for name in ("preconditioned", "critical_lr"):
        with pytest.raises(InvalidArgumentError, match=f"{name}.*optimizer="):
            dyntune.sharpness(case.model, case.batch, criterion=case.criterion, quantities=(name,))
    with pytest.raises(InvalidArgumentError, match="traces"):
        dyntune.sharpness(case.model, case.batch, criterion=case.criterion, quantities=("traces",))  # type: ignore[arg-type]


def test_plain_eigenvalues_need_no_stepped_optimizer_and_products_are_counted_once() -> None:
    case = ZOO["mlp"]()
    fresh = torch.optim.Adam(case.model.parameters())
    both = dyntune.sharpness(
        case.model, case.batch, criterion=case.criterion, optimizer=fresh, quantities=("lambda_max", "lambda_min")
    )
    assert both.lambda_max is not None
    assert both.num_products == both.lambda_max.num_products  # one solve for both ends
    with pytest.raises(InvalidArgumentError, match="has not stepped"):
        dyntune.sharpness(case.model, case.batch, criterion=case.criterion, optimizer=fresh, quantities=("batch",))


def test_nothing_moves() -> None:
    case = ZOO["batchnorm"]()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    before = snapshot(case.model)
    dyntune.sharpness(
        case.model,
        cut(case),
        criterion=case.criterion,
        optimizer=optimizer,
        quantities=("lambda_max", "lambda_min", "preconditioned", "batch", "directional", "critical_lr"),
    )
    assert snapshot(case.model) == before
