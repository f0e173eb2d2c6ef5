"""Pairs of factors and the learning rates they imply, at the edge of a quadratic with a frozen preconditioner."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from dyntune import suggest_beta2, suggest_betas
from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.records import Status
from dyntune.stability.thresholds import recurrence
from dyntune.suggest.beta2_decay import exponent_of, last_factor
from dyntune.suggest.beta2_rule import Beta2Evidence, beta2_rule
from dyntune.suggest.betas import PRESENT, REFRESHED, SUGGESTED, TIED, Betas, betas_rule
from tests.suggest.problems import classification, mlp, same, snapshot

CE = nn.CrossEntropyLoss()


def suggest(model: nn.Module, optimizer: Any, **options: Any) -> Betas:
    return suggest_betas(
        model, classification(), optimizer=optimizer, criterion=CE, **({"max_gradients": 60} | options)
    )


def diverges(lr: float, beta1: float, sharpness: float) -> bool:
    """Adam's momentum on a quadratic of that preconditioned sharpness, P held at 1."""
    w, m = 1.0, 0.0
    for _ in range(50_000):
        m = beta1 * m + (1 - beta1) * sharpness * w
        w -= lr * m
        if abs(w) > 1e3:  # stable momentum overshoots by less than ten
            return True
    return False


def pairs(present: tuple[float, float] = (0.9, 0.999), *, lr: float = 0.1, **options: Any) -> Betas:
    """By the rule alone."""
    edge = recurrence(torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=lr, betas=present))
    rec = beta2_rule(Beta2Evidence(present=present[1], beta1=present[0], **options))
    return betas_rule(rec, present=present, lr=lr, edge=edge, num_steps=options.get("num_steps"))


@pytest.mark.parametrize("steps", [12_000, 20_000, 100_000])
def test_the_implied_rate_keeps_the_distance_to_the_edge(steps: int) -> None:
    """Sharpness at 0.98 and at 1.02 of the present pair's edge: the implied rate converges and diverges there, too."""
    pair = next(p for p in pairs(num_steps=steps).pairs if p.name == REFRESHED)
    assert pair.beta1 == pair.beta2 == 1 - 1000 / steps
    edge = 2 * 1.9 / 0.1 / 0.1
    assert not diverges(pair.full_batch, pair.beta1, 0.98 * edge)
    assert diverges(pair.full_batch, pair.beta1, 1.02 * edge)
    assert pair.small_batch == 0.1
    assert pair.lr == min(pair.small_batch, pair.full_batch)


def test_a_pair_with_the_same_beta1_keeps_its_rate() -> None:
    found = pairs(known=(0.98, 1.0))
    assert [p.name for p in found.pairs] == [SUGGESTED, PRESENT, TIED]
    assert (found.value.beta1, found.value.beta2) == (0.9, 0.98)
    assert all(p.lr == p.full_batch == 0.1 for p in found.pairs)
    assert found.settings == {"lr": 0.1, "betas": (0.9, 0.98)}


def test_pairs_that_are_alike_are_told_once() -> None:
    assert [p.name for p in pairs().pairs] == [SUGGESTED, TIED]  # the present value was kept
    assert [p.name for p in pairs((0.0, 0.999)).pairs] == [SUGGESTED]
    assert REFRESHED not in [p.name for p in pairs(num_steps=1500).pairs]  # a momentum of 1/3


def test_tied_factors_stay_tied() -> None:
    found = pairs((0.95, 0.95), num_steps=100_000)
    assert found.settings["betas"] == (0.99, 0.99)
    assert found.value.full_batch == pytest.approx(0.1 * (1.99 / 0.01) / (1.95 / 0.05))
    assert found.value.lr == 0.1  # small batches do not allow more


def test_refused() -> None:
    found = pairs(num_steps=10)
    assert str(found).startswith("betas: refused")
    for ask in (lambda: found.value, lambda: found.settings, found.require):
        with pytest.raises(RefusedError):
            ask()
    assert [p.name for p in found.pairs] == [PRESENT, TIED]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
def test_measured(kind: Any) -> None:
    model = mlp(extras=True)
    optimizer = kind(model.parameters(), lr=2e-3)
    before = snapshot(model, optimizer)
    found = suggest(model, optimizer, num_steps=20_000)
    assert same(before, snapshot(model, optimizer))
    assert found.value.beta2 == found.beta2.value
    assert found.value.lr == 2e-3
    assert next(p for p in found.pairs if p.name == REFRESHED).full_batch > 2e-3
    kind(model.parameters(), **found.settings)
    assert "Orvieto" in found.explain()
    assert json.loads(json.dumps(found.to_dict()))["pairs"][0]["betas"] == [0.9, found.value.beta2]
    assert "&lt;" not in found._repr_html_() or "<pre>" in found._repr_html_()
    assert found.status is (Status.UNCERTAIN if kind is torch.optim.NAdam else Status.OK)


def test_names_factories_and_other_optimizers() -> None:
    by_name = suggest(mlp(), "adam", lr=1e-3)
    factory = suggest(mlp(), lambda params: torch.optim.Adam(params, lr=1e-3))
    assert by_name.to_dict() == factory.to_dict()
    model = mlp()
    for other in (torch.optim.RMSprop, torch.optim.Adafactor, torch.optim.Adamax, torch.optim.SGD):
        with pytest.raises(InvalidArgumentError, match=f"{other.__name__} has no pair"):
            suggest(model, other(model.parameters(), lr=1e-3))
    with pytest.raises(NotConvergedError):
        suggest(model, torch.optim.NAdam(model.parameters()), strict=True)


def adafactor(**options: Any) -> Any:
    model = mlp()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
    settings: dict[str, Any] = {"max_gradients": 60, "num_steps": 20_000} | options
    return suggest_beta2(model, classification(), optimizer=optimizer, criterion=CE, **settings)


def test_adafactors_exponent() -> None:
    """1 - T^c is the factor of the last step; the rate is relative, so that the path is lr / 20."""
    rec = adafactor()
    assert rec.knob == "beta2_decay"
    assert last_factor(rec.value, 20_000) == pytest.approx(1 - 1e-2 / 20)
    assert rec.low < rec.value < rec.high < 0
    assert rec.evidence["present value"] == pytest.approx(1 - 20_000**-0.8)
    assert rec.status is Status.UNCERTAIN
    # what torch's own average keeps at the last step
    row = torch.zeros(3, 1)
    row.lerp_(torch.ones(3, 1), 20_000.0**rec.value)
    assert row[0, 0] == pytest.approx(1e-2 / 20)
    assert exponent_of(0.99, 10_000) == pytest.approx(-0.5)


def test_adafactor_needs_the_length() -> None:
    with pytest.raises(InvalidArgumentError, match="num_steps=None"):
        adafactor(num_steps=None)
    with pytest.raises(InvalidArgumentError, match="probe=5000 with Adafactor"):
        adafactor(probe=5000)
    with pytest.raises(InvalidArgumentError, match=r"beta2_decay=0\.5"):
        last_factor(0.5, 100)
