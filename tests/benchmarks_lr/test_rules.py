"""Rules that need no tool: fitted where they may be, picked by what they say."""

from __future__ import annotations

import dataclasses
import math

import pytest

from benchmarks.lr import metrics, rules, verdict
from benchmarks.lr.scenario import OPTIMIZERS, Scenario
from benchmarks.lr.scenarios import select

SCENARIO = Scenario("ruled", "digits/mlp-relu", "tune", "sgd", batch=64, width=16)
SWEEPS = verdict.load_sweeps()


def test_short_run_is_fifteen_plain_steps():
    seen = []

    class Seen(Scenario):
        def loss_fn(self, model, batch):
            loss = super().loss_fn(model, batch)
            seen.append(loss.item())
            return loss

    scenario = Seen(**{f.name: getattr(SCENARIO, f.name) for f in dataclasses.fields(SCENARIO)})
    found = rules.short_run(scenario, 0.1, 3)
    assert len(seen) == 15
    assert found == pytest.approx(sum(seen[-5:]) / 5)
    assert seen[-1] < seen[0]


def test_short_run_that_blows_up_is_infinite():
    scenario = dataclasses.replace(SCENARIO, family="diabetes/mlp-gelu", loss="regression")
    assert rules.short_run(scenario, 1e30, 0) == math.inf


def test_pick_is_the_lowest_of_the_runs():
    lrs = (1e-4, 0.1, 1e3)
    assert rules._pick(SCENARIO, lrs, 0) == 0.1
    assert rules._pick(SCENARIO, lrs[::-1], 0) == 0.1


def test_constants_and_ranges_see_the_tune_half_alone():
    tune = {name: row for name, row in SWEEPS.items() if row["scenario"]["half"] == "tune"}
    assert rules.fit_constants(tune) == rules.fit_constants(SWEEPS)
    assert rules.fit_ranges(tune) == rules.fit_ranges(SWEEPS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_constant_is_the_best_of_its_kind(optimizer):
    constant, (low, high) = rules.fit_constants(SWEEPS)[optimizer], rules.fit_ranges(SWEEPS)[optimizer]
    curves = []
    for scenario in select(half="tune"):
        if scenario.optimizer == optimizer:
            sweep = verdict.sweep_of(scenario, SWEEPS)
            assert 2 * low <= sweep.best <= high / 2
            curves.append((sweep.curve(), sweep.at(sweep.best)[0].initial))

    def total(lr):
        losses = (
            (metrics.loss_at(curve, lr), metrics.loss_at(curve, metrics.best_lr(curve)), i) for curve, i in curves
        )
        return sum((loss - best) / (initial - best) for loss, best, initial in losses)

    # One initial loss here, the mean of five there: a shift of a quarter octave is within that.
    assert total(constant) <= min(total(constant * factor) for factor in (0.25, 0.5, 2.0, 4.0))


def test_every_rule_gives_a_rate_within_reason():
    found = {name: rule(SCENARIO, 0) for name, rule in rules.rules(SWEEPS).items()}
    assert found["naive-sweep-0.3x"] == pytest.approx(0.3 * found["naive-sweep"])
    assert all(1e-4 < lr < 30 for lr in found.values())
    assert rules.rules(SWEEPS)["random"](SCENARIO, 0) == found["random"] != rules.rules(SWEEPS)["random"](SCENARIO, 1)
