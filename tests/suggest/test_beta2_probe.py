"""The paired probe: what is compared, what its losses say, and trainings in which one value really is better."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dyntune import suggest_beta2
from dyntune.errors import InvalidArgumentError
from dyntune.records import Estimate, Recommendation, Status
from dyntune.suggest.beta2_probe import CLOSE, SEEDS, candidates, judge_probe, least_probe, plan_probe
from dyntune.suggest.beta2_rule import MEMORIES, momentum_floor
from dyntune.suggest.beta2_trial import PROBE_NAME
from tests.suggest.problems import classification, mlp, same, snapshot


@given(
    value=st.floats(0.6, 0.9999),
    present=st.floats(0.5, 0.9999),
    low=st.floats(0.0, 0.85),
    high=st.floats(0.9, 1.0),
)
def test_candidates_begin_with_the_value_and_stay_within_the_bounds(
    value: float, present: float, low: float, high: float
) -> None:
    value = min(max(value, low), high)
    found = candidates(value, present=present, low=low, high=high)
    assert found[0] == value
    assert len(found) <= 4
    assert all(low <= factor <= high for factor in found)
    memories = sorted(1 / (1 - f) for f in found if f < 1)
    assert all(b / a > CLOSE * (1 - 1e-6) for a, b in itertools.pairwise(memories))


@settings(max_examples=60)
@given(probe=st.integers(200, 20_000), accumulate=st.integers(1, 3))
def test_plans_keep_to_the_budget_and_lose_no_candidate(probe: int, accumulate: int) -> None:
    factors = (0.995, 0.999, 0.95, 0.9995)
    if probe < least_probe(accumulate):
        return
    plan = plan_probe(factors, probe=probe, accumulate=accumulate)
    assert sorted(f for arm in plan.arms for f in arm.stands_for) == sorted(factors)
    assert factors[0] in plan.arms[0].stands_for
    assert len(plan.arms) * SEEDS * plan.steps * accumulate <= probe
    for arm in plan.arms:
        # no arm has a memory that its training is not three times as long as
        assert 1 / (1 - arm.factor) <= plan.steps / MEMORIES * (1 + 1e-6)
    assert bool(plan.merged) is any(arm.stands_for != (arm.factor,) for arm in plan.arms)


def test_what_it_takes_to_tell_two_apart_is_said_and_true() -> None:
    short = plan_probe((0.999, 0.99), probe=400)
    assert len(short.arms) == 1
    assert short.needed is not None
    assert len(plan_probe((0.999, 0.99), probe=short.needed).arms) == 2
    assert len(plan_probe((0.999, 0.99), probe=short.needed - 50).arms) == 1


def test_noise_seldom_changes_a_value() -> None:
    """Student's interval for all comparisons at once: at most a fortieth of verdicts on pure noise."""
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(2000):
        order = rng.standard_normal(SEEDS)  # shared by the arms
        losses = {b: (1 + 0.1 * order + 0.01 * rng.standard_normal(SEEDS)).tolist() for b in (0.999, 0.99, 0.9)}
        changed += judge_probe(losses, proposed=0.999, initial=5.0).value is not None
    assert changed / 2000 < 0.025 + 4 * math.sqrt(0.025 * 0.975 / 2000)


def test_a_difference_that_orders_share_is_seen_through_their_noise() -> None:
    rng = np.random.default_rng(1)
    order = rng.standard_normal(SEEDS)
    losses = {
        b: (1 + order + shift + 0.01 * rng.standard_normal(SEEDS)).tolist() for b, shift in ((0.9, 0.1), (0.99, 0))
    }
    found = judge_probe(losses, proposed=0.9, initial=9.0)
    assert found.value == 0.99
    assert found.differences[0.99].value == pytest.approx(-0.1, abs=0.03)
    kept = judge_probe(losses, proposed=0.99, initial=9.0)
    assert kept.value is None
    assert "0.99 ended lowest" in kept.said


def test_a_training_that_was_stopped_is_as_bad_as_none() -> None:
    losses = {0.9: [math.inf] * SEEDS, 0.999: [0.5, 0.6, 0.55, 0.5, 0.61]}
    found = judge_probe(losses, proposed=0.9, initial=2.0)
    assert found.value == 0.999
    assert -1.6 < float(found.differences[0.999]) < -1.3  # to the initial loss, not to infinity
    assert judge_probe(losses, proposed=0.999, initial=2.0).value is None
    both = {b: [math.inf] * SEEDS for b in losses}
    assert "does not tell them apart" in judge_probe(both, proposed=0.9, initial=2.0).said


class Slope(nn.Module):
    """A weight in a valley far below it, whose slope is mostly up and rarely, steeply, down."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.mean() * self.weight + 0.002 * self.weight**2).mean().reshape(1, 1)


def rare() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three slopes of 10 among twenty, else -1: after Reddi et al. (2018), section 3, in a random order."""
    return [(torch.full((4, 1), 10.0 if i % 7 == 0 else -1.0), torch.zeros(4, 1)) for i in range(20)]


def probed(**options: Any) -> Recommendation:
    model = Slope()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, betas=(0.0, 0.999))
    settings: dict[str, Any] = {"max_gradients": 60, "probe": 6000, "known": (0.8, 1.0), "accumulate": 1} | options
    return suggest_beta2(model, rare(), lambda m, batch: m(batch[0]).mean(), optimizer=optimizer, **settings)


def test_where_a_short_memory_walks_the_wrong_way_a_longer_one_is_taken() -> None:
    """At beta1 = 0 and beta2 = 0.8 rare steep slopes count for less than they are: Adam climbs (Reddi et al. 2018)."""
    rec = probed()
    assert rec.evidence["without the probe"] == 0.8
    assert rec.evidence["active bound"] == PROBE_NAME
    assert rec.value is not None
    assert rec.value >= 0.97
    assert rec.low < rec.value < rec.high
    assert rec.status is Status.UNCERTAIN
    difference = rec.evidence[f"probe: loss at {rec.value:g} less that at 0.8"]
    assert isinstance(difference, Estimate)
    assert difference.high < -1  # of a loss that begins at 1: it went down instead of up
    assert probed().to_dict() == rec.to_dict()


def test_a_proposal_that_is_the_better_one_is_kept() -> None:
    rec = probed(known=(0.99, 1.0))
    assert rec.value == pytest.approx(0.99)
    assert any("0.99 ended lowest" in check for check in rec.checks)
    assert rec.evidence["active bound"] != PROBE_NAME


def suggest(**options: Any) -> Recommendation:
    model = mlp(extras=True)
    given: dict[str, Any] = {"max_gradients": 60, "probe": 900, "num_steps": 3000} | options
    optimizer = given.pop("optimizer", torch.optim.AdamW(model.parameters(), lr=1e-3))
    return suggest_beta2(model, classification(), optimizer=optimizer, criterion=nn.CrossEntropyLoss(), **given)


def test_nothing_moves_and_every_gradient_is_charged() -> None:
    model = mlp(extras=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for x, y in classification(3):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    before = snapshot(model, optimizer)
    rec = suggest_beta2(
        model,
        classification(),
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        max_gradients=60,
        probe=900,
        known=(0.9, 1.0),
    )
    assert same(before, snapshot(model, optimizer))
    assert 60 + 0.8 * 900 < rec.cost <= 60 + 900
    assert any("5 orders of the batches" in check for check in rec.checks)


def test_alike_values_are_kept() -> None:
    """A few steps from a start hardly depend on beta2 where gradients are steady: the proposal stays in all of ten."""
    kept = [suggest(seed=seed, known=(0.9, 1.0), probe=700) for seed in range(10)]
    assert sum(rec.evidence["active bound"] != PROBE_NAME for rec in kept) >= 9


def test_a_probe_too_short_for_its_candidates_says_what_it_would_take() -> None:
    rec = suggest(probe=least_probe(1))
    assert rec.evidence["active bound"] != PROBE_NAME
    said = next(check for check in rec.checks if "no probe was trained" in check)
    assert "would tell two of them apart" in said
    with pytest.raises(InvalidArgumentError, match=rf"probe=10 buys no .* at least {least_probe(1)}"):
        suggest(probe=10)


def test_bounds_hold_for_candidates() -> None:
    rec = suggest(num_steps=200, probe=3000)
    assert rec.value is not None
    names = [k for k in rec.evidence if k.startswith("probe: loss at")]
    assert names
    assert momentum_floor(0.9) <= rec.value <= 1 - 3 / 200


def test_groups_with_another_factor_keep_it() -> None:
    model = mlp()
    parts = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "betas": (0.9, 0.98)}]
    optimizer = torch.optim.Adam(parts, lr=1e-3)
    rec = suggest_beta2(
        model,
        classification(),
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        max_gradients=60,
        probe=900,
        known=(0.9, 1.0),
    )
    assert rec.evidence["group 1"] is not None
    assert [g["betas"][1] for g in optimizer.param_groups] == [0.999, 0.98]
