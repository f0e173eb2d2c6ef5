"""What the figure of a beta2 shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.axes import Axes

from dyntune.plots import plot_beta2
from dyntune.plots.beta2 import beta2_data
from dyntune.plots.svg import to_svg
from dyntune.records import Recommendation
from dyntune.suggest.beta2_rule import Beta2Evidence, beta2_rule, half_life
from tests.plots.records import HOSTILE

SERIES = {
    "score_beta2": (0.8, 0.9, 0.99, 0.999, 0.9999),
    "score_excess": (0.3, 0.1, 0.0, 0.05, 0.08),
    "score_margin": (0.1, 0.05, 0.0, 0.02, 0.03),
}


def result(**changed: Any) -> Recommendation:
    return beta2_rule(
        Beta2Evidence(**({"present": 0.999, "beta1": 0.9, "num_steps": 9000, "series": SERIES} | changed))
    )


def words(ax: Axes) -> list[str]:
    ax.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]
    return [text.get_text() for text in ax.texts]


def test_the_curve_is_the_scores_with_their_margins() -> None:
    data = beta2_data(result())
    assert data.betas == SERIES["score_beta2"]
    assert data.excess == SERIES["score_excess"]
    assert data.low == pytest.approx([0.2, 0.05, 0.0, 0.03, 0.05])
    assert data.high == pytest.approx([0.4, 0.15, 0.0, 0.07, 0.11])
    assert data.value == 0.999
    assert data.admitted == (0.95, 1 - 3 / 9000)
    assert "present value, uncertain" in data.title


def test_the_upper_axis_is_the_half_life_in_steps_or_tokens() -> None:
    for tokens, unit in ((None, "steps"), (2e4, "tokens")):
        ax = result(tokens_per_step=tokens).plot()
        words(ax)
        upper = ax.child_axes[0]
        assert upper.get_xlabel() == f"half-life, {unit}"
        per_step = tokens or 1.0
        first = float(upper.get_xticklabels()[0].get_text())
        assert first == pytest.approx(half_life(0.8) * per_step, rel=5e-3)  # three digits


def test_a_recommendation_plots_itself_by_it() -> None:
    assert result().plot().get_xlabel() == "beta2"
    assert result(knob="alpha", beta1=None).plot().get_xlabel() == "alpha"


def test_refused_and_unscored_results_are_drawn() -> None:
    refused = plot_beta2(result(num_steps=10))
    words(refused)
    assert "No beta2 suggested" in refused.get_title(loc="left")
    assert words(plot_beta2(result(series={}))) == ["nothing was scored"]


def test_points_that_are_no_numbers_are_left_out() -> None:
    series = SERIES | {"score_excess": (0.3, None, 0.0, 0.05, 0.08)}
    assert beta2_data(result(series=series)).betas == (0.8, 0.99, 0.999, 0.9999)


def test_hostile_text_and_extreme_values() -> None:
    ax = plot_beta2(result(knob=HOSTILE, present=1 - 1e-9, num_steps=None))
    assert "<script" not in to_svg(ax.figure, name="beta2", description="a beta2")
    assert all(math.isfinite(x) for x in ax.get_xlim())
