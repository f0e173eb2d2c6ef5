"""objective="held-out": exact on a quadratic, in an optimizer's metric, best of a grid, and what is no input."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dyntune.errors import InvalidArgumentError, NonFiniteError
from dyntune.records import Status
from dyntune.suggest.mixture import suggest_mixture
from dyntune.suggest.mixture_changed import ChangedMixture
from dyntune.suggest.mixture_held_out import held_out_rule

ROWS = 40
LR = 0.1


def problem() -> tuple[nn.Module, list[Any], tuple[torch.Tensor, torch.Tensor]]:
    """Linear regression: a useful source, one that leads astray, one that helps along other directions."""
    rng = torch.Generator().manual_seed(0)
    x = [torch.randn(ROWS, 4, generator=rng, dtype=torch.float64) for _ in range(4)]
    truth = torch.tensor([[1.0, -1.0, 2.0, 0.5]], dtype=torch.float64)
    other = truth * torch.tensor([[1.0, 1.0, -0.5, 0.0]], dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    third = x[2] * torch.tensor([0.2, 0.2, 0.2, 3.0], dtype=torch.float64)
    data = [(x[0], x[0] @ truth.T), (x[1], x[1] @ -other.T), (third, third @ truth.T)]
    return model, data, (x[3], x[3] @ truth.T)


def suggest(**options: Any) -> ChangedMixture:
    model, data, held_out = problem()
    given: dict[str, Any] = {
        **{"model": model, "criterion": nn.MSELoss(), "num_gradients": ROWS},
        **{"held_out": held_out, "lr": LR, "floors": [0.0, 0.0, 0.0], "objective": "held-out"},
    } | options
    return suggest_mixture(given.pop("sources", data), **given)


def held_out_change(shares: np.ndarray, scale: torch.Tensor | None = None) -> float:
    """What a step really does."""
    model, data, (x, y) = problem()
    gradient = sum(
        r * torch.autograd.grad(nn.functional.mse_loss(model(a), b), model.weight)[0]
        for r, (a, b) in zip(shares.tolist(), data, strict=True)
    )
    before = nn.functional.mse_loss(model(x), y)
    with torch.no_grad():
        model.weight -= LR * (gradient if scale is None else gradient / scale)
    return float((nn.functional.mse_loss(model(x), y) - before).detach())


def test_predicted_is_what_a_step_does() -> None:
    found = suggest()
    shares = np.array(found.proportions)
    truth = held_out_change(shares) - held_out_change(np.full(3, 1 / 3))
    assert float(found.change) == pytest.approx(truth, rel=1e-10)
    assert found.status is Status.OK
    assert shares[1] == 0.0  # the one that leads astray


@pytest.mark.parametrize("floors", [[0.0, 0.0, 0.0], [0.1, 0.2, 0.0]])
def test_no_shares_on_a_grid_do_better(floors: list[float]) -> None:
    found = suggest(floors=floors)
    best = held_out_change(np.array(found.proportions))
    for a in np.linspace(0, 1, 21):
        for b in np.linspace(0, 1 - a, 21):
            shares = np.array([a, b, 1 - a - b])
            if (shares >= np.array(floors)).all():
                assert best <= held_out_change(shares) + 1e-12
    assert (np.array(found.proportions) >= floors).all()
    assert found.gap <= 1e-9


def test_in_the_metric_of_adam() -> None:
    model, data, held_out = problem()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scale = (optimizer.state[model.weight]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8
    found = suggest(sources=data, model=model, held_out=held_out, optimizer=optimizer)
    truth = held_out_change(np.array(found.proportions), scale) - held_out_change(np.full(3, 1 / 3), scale)
    assert float(found.change) == pytest.approx(truth, rel=1e-6)  # Adam's steps are counted in float32


def test_sums_are_means() -> None:
    mean, total = suggest(rows=4), suggest(rows=4, criterion=nn.MSELoss(reduction="sum"))
    assert total.proportions == pytest.approx(mean.proportions)
    assert float(total.change) == pytest.approx(float(mean.change))


def test_told_and_drawn() -> None:
    found = suggest()
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["objective"] == "held-out"
    assert "objective: changed on purpose" in found.explain()
    assert "objective changed: held-out" in str(found)
    assert "held-out" in found.plot().get_title(loc="left")


def rule(slopes: Any, bend: Any) -> ChangedMixture:
    b = np.array(slopes)
    return held_out_rule(
        ["a", "b"],
        b,
        np.array(bend),
        lr=1.0,
        floors=[0.0, 0.0],
        present=[0.5, 0.5],
        slope_draws=b[None] * np.ones((9, 1)),
    )


def test_what_the_rule_refuses_or_qualifies() -> None:
    assert rule([0.0, 0.0], np.zeros((2, 2))).status is Status.REFUSED
    assert "negative curvature" in rule([1.0, 0.5], -np.eye(2)).reason
    assert rule([1.0, 1.0], np.eye(2)).status is Status.UNCERTAIN  # the present shares are the best
    with pytest.raises(NonFiniteError):
        rule([math.nan, 0.0], np.eye(2))


@pytest.mark.parametrize(
    "options",
    [
        {"held_out": None},
        {"lr": None},
        {"lr": -1.0},
        {"costs": [1.0, 1.0, 1.0]},
        {"objective": "minimax"},
        {"objective": "same"},
    ],
)
def test_input_that_is_none(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="objective="):
        suggest(**options)
