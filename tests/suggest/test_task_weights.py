"""Task weights: no loss rises where a plain sum raises one, heads are left out, and dead ends are said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dyntune.errors import InvalidArgumentError, NonFiniteError, RefusedError
from dyntune.records import Status
from dyntune.suggest.task_weights import suggest_task_weights, task_weights_rule

Losses = dict[str, Callable[[nn.Module, Any], torch.Tensor]]


class Two(nn.Module):
    """A body with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.first, self.second = nn.Linear(16, 1), nn.Linear(16, 1)


def setting(seed: int = 0) -> tuple[Two, list[torch.Tensor], Losses]:
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Two().double()
    batches = [torch.randn(64, 6, generator=g, dtype=torch.float64) for _ in range(4)]
    losses: Losses = {
        "first": lambda m, x: (m.first(m.body(x))[:, 0] - x[:, 0]).square().mean(),  # type: ignore[operator]
        "second": lambda m, x: 100 * (m.second(m.body(x))[:, 0] + x[:, 0]).square().mean(),  # type: ignore[operator]
    }
    return model, batches, losses


@pytest.mark.parametrize("seed", range(6))
def test_a_small_step_lowers_the_main_loss_and_raises_none(seed: int) -> None:
    model, batches, losses = setting(seed)
    found = suggest_task_weights(model, batches, losses, main="first")
    assert found.weights is not None
    assert found.weights["first"] == 1.0
    assert all(n.startswith("body") for n in found.shared)
    shared = [dict(model.named_parameters())[n] for n in found.shared]

    def value(name: str) -> float:
        with torch.no_grad():
            return sum(float(losses[name](model, b)) for b in batches) / len(batches)

    before = {n: value(n) for n in losses}
    total = sum(w * losses[n](model, b) for n, w in found.weights.items() for b in batches) / len(batches)
    grads = torch.autograd.grad(total, shared)
    length = torch.sqrt(sum(g.square().sum() for g in grads))  # type: ignore[arg-type]
    with torch.no_grad():
        for p, g in zip(shared, grads, strict=True):
            p -= 1e-6 * g / length
    after = {n: value(n) for n in losses}
    assert after["first"] < before["first"]
    # To first order not raised; the second order of a step of 1e-6 is 1e-12 times a curvature of some thousands.
    assert after["second"] <= before["second"] + 1e-8


def test_conflicts_are_seen_and_ended() -> None:
    factor = np.array([[-4.0, 6.0], [1.0, 1.0], [1.0, 1.0]])
    found = task_weights_rule(factor, names=("a", "b"), num_batches=1)
    assert found.plain["b"] < 0
    assert found.cosines["b"] == pytest.approx(0, abs=1e-12)
    assert found.weights == pytest.approx({"a": 1.0, "b": 22 / 38})
    assert found.status is Status.UNCERTAIN
    assert "one batch" in found.reason


def test_nothing_of_the_model_moves() -> None:
    model, batches, losses = setting()
    model.train()
    model.body.append(nn.Dropout(0.5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    suggest_task_weights(model, batches, losses, main="first")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_the_metric_changes_the_answer_as_substitution_says() -> None:
    model, batches, losses = setting(1)
    plain = suggest_task_weights(model, batches, losses, main="first")
    parameters = dict(model.named_parameters())
    same = [torch.full_like(parameters[n], 4.0) for n in plain.shared]
    assert suggest_task_weights(model, batches, losses, main="first", scale=same).weights == pytest.approx(
        plain.weights
    )
    with pytest.raises(InvalidArgumentError, match="scale has 1"):
        suggest_task_weights(model, batches, losses, main="first", scale=same[:1])


def test_dead_ends_are_refused() -> None:
    opposite = task_weights_rule(np.array([[1.0, -3.0], [0.0, 0.0]]), names=("a", "b"), num_batches=1)
    assert opposite.status is Status.REFUSED
    assert "Pareto" in opposite.reason
    still = task_weights_rule(np.array([[0.0, 1.0]]), names=("a", "b"), num_batches=1)
    assert "is zero" in still.reason
    with pytest.raises(RefusedError):
        still.require()
    other = task_weights_rule(np.array([[1.0, 0.0]]), names=("a", "b"), num_batches=1)
    assert "b: no gradient" in other.reason
    assert other.weights == {"a": 1.0, "b": 0.0}
    assert '"weights"' not in str(other)
    assert other.to_dict()["errors"] == {"a": None, "b": None}


def test_bad_input() -> None:
    model, batches, losses = setting()
    for wrong in (
        {"main": "third"},
        {"main": "first", "batches": []},
        {"main": "first", "losses": {"first": losses["first"]}},
    ):
        given: dict[str, Any] = {"batches": batches, "losses": losses} | wrong
        with pytest.raises(InvalidArgumentError):
            suggest_task_weights(model, **given)
    apart: Losses = {
        "a": lambda m, x: m.first.weight.square().sum(),  # type: ignore[union-attr, operator, return-value]
        "b": lambda m, x: m.second.weight.square().sum(),  # type: ignore[union-attr, operator, return-value]
    }
    with pytest.raises(InvalidArgumentError, match="share nothing"):
        suggest_task_weights(model, batches, apart, main="a")
    broken = losses | {"second": lambda m, x: losses["first"](m, x) * float("nan")}
    with pytest.raises(NonFiniteError):
        suggest_task_weights(model, batches, broken, main="first")
    flat = losses | {"second": lambda m, x: m.body(x)}  # type: ignore[operator]
    with pytest.raises(InvalidArgumentError, match="shape"):
        suggest_task_weights(model, batches, flat, main="first")
