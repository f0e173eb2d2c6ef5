"""The blends' numbers are those of a fresh fit to the committed sweeps, and they scale as learning rates do."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.lr import fit
from dyntune.suggest import blend
from dyntune.suggest.blend import ONSET, VALUE, Blend, usual, vertex
from dyntune.suggest.lr import suggest_lr
from tests.suggest.problems import classification, mlp

WRITTEN = {"value": (VALUE, blend.VALUE_INTERVAL), "onset": (ONSET, blend.ONSET_INTERVAL)}


def test_the_numbers_are_those_of_a_fresh_fit() -> None:
    digits = 5e-4  # they are written with three or four
    found = fit.numbers()
    assert set(found) == set(WRITTEN)
    for target, (fresh, interval) in found.items():
        written, ends = WRITTEN[target]
        assert fresh.base == written.base
        assert fresh.constant == pytest.approx(written.constant, abs=digits)
        assert fresh.adaptive == pytest.approx(written.adaptive, abs=digits)
        assert fresh.momentum == pytest.approx(written.momentum, abs=digits)
        assert fresh.weights == pytest.approx(written.weights, abs=digits)
        assert interval == pytest.approx(ends, abs=digits)


def test_the_levels_are_what_was_measured_on_the_test_half() -> None:
    held = json.loads((fit.RESULTS / "ours.json").read_text())["ranges"]
    assert held["range"]["held"] / held["range"]["of"] == pytest.approx(blend.LEVEL, abs=5e-3)
    assert held["max_stable_range"]["held"] / held["range"]["of"] == pytest.approx(blend.ONSET_LEVEL, abs=5e-3)


def test_what_is_said_of_validation_is_what_the_sweeps_show() -> None:
    sweeps = json.loads((fit.RESULTS / "sweeps.json").read_text())["scenarios"].values()
    octaves = [(found["best_val"] - found["best"]) / 4 for found in sweeps]  # the grid's step is a quarter
    assert (sum(abs(x) > 1 for x in octaves), sum(x < -1 for x in octaves), len(octaves)) == (15, 11, 120)
    rec = suggest_lr(mlp(), classification(), criterion=torch.nn.CrossEntropyLoss(), max_gradients=60)
    assert any("15 of 120" in check for check in rec.checks)


def test_no_scenario_of_the_test_half_was_used() -> None:
    curves, rows = fit.load()
    assert len(curves) >= 40
    assert {row.scenario for row in rows} == set(curves)
    halves = fit.halves()
    assert {halves[name] for name in curves} == {"tune"}


def test_a_fit_finds_the_weights_that_made_the_targets() -> None:
    """Targets from a known blend, many rows: ridge takes off less than one percent."""
    made = Blend(-1.0, 0.5, 0.3, "usual", {"vertex": 0.6, "critical": 0.2})
    rows = []
    for i in range(4000):
        rates = {"critical": 2.0 ** (i % 7 - 3), "vertex": 2.0 ** (i % 5 - 6), "usual": 2.0 ** (i % 3)}
        adaptive = bool(i % 2)
        momentum = 0.0 if adaptive else (0.0, 0.5, 0.9)[i % 11 % 3]
        row = fit.Row(f"s{i}", "f", adaptive, momentum, rates, {})
        rows.append(replace(row, targets={"value": fit.suggestion(made, row)}))
    found = fit.fit(rows, "value", "usual", ("vertex", "critical"))
    assert found.constant == pytest.approx(-1.0, abs=0.01)
    assert found.adaptive == pytest.approx(0.5, abs=0.01)
    assert found.momentum == pytest.approx(0.3, abs=0.01)
    assert found.weights == pytest.approx(made.weights, abs=0.01)


@pytest.mark.parametrize("numbers", [VALUE, ONSET], ids=["value", "onset"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_rates_times_c_give_the_value_times_c(numbers: Blend, adaptive: bool) -> None:
    rates = {"vertex": 0.03, "blow_up": 2.0, "critical": 0.5, "usual": 0.2}
    one = numbers.value(rates, adaptive=adaptive, momentum=0.9)
    scaled = numbers.value({name: rate / 8 for name, rate in rates.items()}, adaptive=adaptive, momentum=0.9)
    assert scaled == pytest.approx(one / 8, rel=1e-12)


def test_vertex_of_a_parabola_in_octaves_is_its_minimum() -> None:
    rates = [2.0**k for k in (-6, -4, -2, 0)]
    for centre in (-4.9, -4.0, -3.1, -2.2):
        losses = [0.3 + 0.05 * (math.log2(rate) - centre) ** 2 for rate in rates]
        assert math.log2(vertex(rates, losses)) == pytest.approx(centre, abs=1e-9)
        assert vertex(rates, [7 * loss for loss in losses]) == pytest.approx(vertex(rates, losses), rel=1e-9)


def test_vertex_at_an_end_or_beside_a_failure_is_the_rate_itself() -> None:
    rates = [1.0, 4.0, 16.0]
    assert vertex(rates, [1.0, 2.0, 3.0]) == 1.0
    assert vertex(rates, [3.0, 2.0, 1.0]) == 16.0
    assert vertex(rates, [3.0, 2.0, math.inf]) == 4.0
    assert vertex(rates, [2.0, 2.0, 2.0]) == 1.0


def test_usual_rates() -> None:
    assert usual(5.0, adaptive=True, critical=3.0) == usual(0.1, adaptive=True, critical=7.0)
    assert usual(5.0, adaptive=False, critical=3.0) == 0.2
    assert usual(0.0, adaptive=False, critical=3.0) == 3.0
