"""The blend's numbers are those of a fresh fit to the committed sweeps, and it scales as learning rates do."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.lr import fit
from dyntune.suggest.blend import BLEND, INTERVAL, LEVEL, Blend, Weight


def test_the_numbers_are_those_of_a_fresh_fit() -> None:
    blend, interval = fit.numbers()
    written = 5e-4  # they are written with three or four digits
    assert blend.constant == pytest.approx(BLEND.constant, abs=written)
    assert blend.adaptive == pytest.approx(BLEND.adaptive, abs=written)
    assert set(blend.weights) == set(BLEND.weights)
    for name, weight in BLEND.weights.items():
        assert blend.weights[name].present == pytest.approx(weight.present, abs=written)
        assert blend.weights[name].missing == pytest.approx(weight.missing, abs=written)
    assert interval == pytest.approx(INTERVAL, abs=written)


def test_the_level_is_what_was_measured_on_the_test_half() -> None:
    held = json.loads((fit.RESULTS / "ours.json").read_text())["range"]
    assert held["first_held"] / held["first_of"] == pytest.approx(LEVEL, abs=5e-3)


def test_no_scenario_of_the_test_half_was_used() -> None:
    curves, rows = fit.load()
    assert len(curves) >= 40
    assert {row.scenario for row in rows} == set(curves)
    halves = fit.halves()
    assert {halves[name] for name in curves} == {"tune"}


def test_a_fit_finds_the_weights_that_made_the_targets() -> None:
    """Targets from a known blend, many rows: ridge takes off less than one percent."""
    made = Blend(-1.0, 0.5, {"pick": Weight(0.6, -0.7), "blow_up": Weight(0.2, 0.3)})
    rows = []
    for i in range(4000):
        measured = {"critical": 2.0 ** (i % 7 - 3), "pick": 2.0 ** (i % 5 - 6), "blow_up": 2.0 ** (i % 3)}
        if i % 11 == 0:
            measured["blow_up"] = None
        if i % 13 == 0:
            measured["pick"] = None
        row = fit.Row(f"s{i}", "f", bool(i % 2), measured, 0.0)
        rows.append(replace(row, target=fit.suggestion(made, row)))
    found = fit.fit(rows, ("pick", "blow_up"))
    assert found.constant == pytest.approx(-1.0, abs=0.01)
    assert found.adaptive == pytest.approx(0.5, abs=0.01)
    for name, weight in made.weights.items():
        assert found.weights[name].present == pytest.approx(weight.present, abs=0.01)
        assert found.weights[name].missing == pytest.approx(weight.missing, abs=0.01)


def test_rates_times_c_give_the_value_times_c() -> None:
    measured = {"pick": 0.03, "blow_up": 2.0, "stochastic": None}
    one = BLEND.value(measured, critical=0.5, adaptive=True)
    scaled = {name: None if rate is None else rate / 8 for name, rate in measured.items()}
    assert BLEND.value(scaled, critical=0.5 / 8, adaptive=True) == pytest.approx(one / 8, rel=1e-12)
