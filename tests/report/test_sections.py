"""Sections made from results."""

from __future__ import annotations

import dataclasses
import math

from dyntune import Status
from dyntune.report import Page, density_section, eigenvalues_section, recommendation_section, render
from tests.plots.records import HOSTILE, SWEEP, density, estimate, found, recommendation
from tests.report.reading import assert_self_contained


def cells(section) -> dict[str, tuple[str, ...]]:
    assert section.table is not None
    return {row[0]: row[1:] for row in section.table.rows}


def test_recommendation_says_value_range_limit_and_cost():
    section = recommendation_section(recommendation())
    assert section.heading == "Learning rate"
    assert "3e-3 is suggested; 1e-3 to 9e-3" in section.finding
    assert "somewhere from 0.01 to 0.04" in section.finding
    rows = cells(section)
    assert rows["suggested"] == ("3e-3", "1e-3 .. 9e-3", "learning rate")
    assert rows["lambda max"] == ("12", "11 .. 13", "loss / parameter²")
    assert rows["absent"][0] == "not measured"
    assert rows["cost"] == ("150", "", "gradients")
    assert section.advice[0] == "Set the learning rate to 3e-3, warmed up linearly over 20 steps."
    assert any("by hand" in line for line in section.background)


def test_recommendation_without_a_known_limit_does_not_invent_one():
    open_ended = recommendation_section(recommendation(max_stable=estimate(1e-2, 5e-3, math.inf)))
    assert "no higher rate was seen to fail" in open_ended.finding
    assert "stable" not in recommendation_section(recommendation(max_stable=None)).finding


def test_doubt_and_refusal_are_said():
    doubtful = recommendation_section(recommendation(status=Status.UNCERTAIN, reason="it is foggy"))
    assert any("it is foggy" in line for line in doubtful.advice)
    refused = recommendation_section(
        recommendation(value=None, low=0.0, high=math.inf, status=Status.REFUSED, reason="no light at all")
    )
    assert "no light at all" in refused.finding
    assert "suggested" not in cells(refused)


def test_the_sweep_is_explained_where_there_is_one():
    record = recommendation()
    swept = dataclasses.replace(record, series=dict(record.series) | SWEEP)
    assert "Green" in recommendation_section(swept).figures[0].caption
    assert "Green" not in recommendation_section(record).figures[0].caption


def test_eigenvalues_say_whether_they_are_certified():
    section = eigenvalues_section(found(k=2))
    assert "certified to 1 %" in section.finding
    assert not section.advice
    assert cells(section)["largest"][3] == "yes"
    short = eigenvalues_section(found(k=3, max_products=6))
    assert "at least so far" in short.finding
    assert "max_products" in short.advice[0]


def test_density_says_where_the_bulk_is():
    result = density()
    section = density_section(result)
    assert "400 eigenvalues" in section.finding
    assert cells(section)["mean eigenvalue"][0] == f"{float(result.trace) / 400:.3g}"


def test_a_page_of_hostile_results_is_harmless():
    record = recommendation(
        knob=HOSTILE,
        rule=HOSTILE,
        reason=HOSTILE,
        status=Status.UNCERTAIN,
        sources=(HOSTILE,),
        checks=(HOSTILE,),
        evidence={HOSTILE: estimate(1e-3, 1e-4, 1e-2, unit=HOSTILE), "name": HOSTILE},
    )
    sections = (recommendation_section(record), eigenvalues_section(found()), density_section(density()))
    assert_self_contained(render(Page(title="t", lead="l", sections=sections)))
