"""What the figure of a beta2 shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dyntune.plots import plot_beta2
from dyntune.plots.beta2 import beta2_data
from dyntune.plots.beta2_panels import panels, place
from dyntune.plots.svg import to_svg
from dyntune.records import Estimate, Recommendation
from dyntune.suggest.beta2_decay import as_exponent
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
    bare = plot_beta2(result(series={}))
    assert words(bare) == ["beta1²", "1 − 3/steps"]  # the present value is the choice and has a line already
    assert bare.get_ylabel() == ""


MEASURED = SERIES | {
    "autocorrelation_lag": (0.0, 1.0, 2.0),
    "autocorrelation_gradient": (1.0, 0.5, 0.2),
    "autocorrelation_gradient_low": (1.0, 0.4, 0.1),
    "autocorrelation_gradient_high": (1.0, 0.6, 0.3),
    "stale_beta2": (0.8, 0.99),
    "stale_share": (0.1, 0.02),
    "stale_low": (0.05, 0.0),
    "stale_high": (0.2, 0.1),
}
LOOKS = {"staleness_step": (5.0, 1.0), "staleness_largest": (3.0, 2.0), "staleness_median": (1.0, 0.9)}


def test_what_was_measured_is_below() -> None:
    shown = panels(result(series=MEASURED))
    assert [p.title.split()[0] for p in shown] == ["Autocorrelation", "Staleness"]
    (gradients,), (share,) = shown[0].bands, shown[1].bands
    assert gradients.name == "gradients, time not established"
    assert (gradients.x, gradients.y, gradients.high) == ((0, 1, 2), (1.0, 0.5, 0.2), (1.0, 0.6, 0.3))
    assert (share.x, share.low) == ((0.8, 0.99), (0.05, 0.0))
    figure = plot_beta2(result(series=MEASURED)).figure
    figure.draw_without_rendering()  # type: ignore[union-attr]
    assert len(figure.axes) == 3
    upper, _, lower = figure.axes
    assert upper.get_xlim() == lower.get_xlim()
    assert [t.get_text() for t in upper.get_xticklabels()] == [t.get_text() for t in lower.get_xticklabels()]


def test_a_record_has_staleness_over_time() -> None:
    (panel,) = panels(result(series=LOOKS))
    largest, median = panel.bands
    assert (largest.x, largest.y) == ((1.0, 5.0), (2.0, 3.0))
    assert median.y == (0.9, 1.0)
    ax = plot_beta2(result(series=LOOKS)).figure.axes[1]
    assert ax.get_ylim()[1] > 3.0
    assert any("not calibrated" in text.get_text() for text in ax.texts)


def test_the_time_is_told_with_its_interval() -> None:
    time = Estimate(value=4.0, low=3.0, high=6.0, level=0.95, unit="steps", method="", covers="sampling")
    (panel, _) = panels(result(series=MEASURED, measured={"autocorrelation time of gradients": time}))
    assert panel.bands[0].name == "gradients, time 4 steps (3 .. 6)"


def test_given_axes_hold_the_upper_panel_alone() -> None:
    ax = Figure().add_subplot()
    assert plot_beta2(result(series=MEASURED), ax=ax) is ax
    assert len(ax.figure.axes) == 1


def test_numbers_that_are_none_are_left_out_of_panels() -> None:
    broken = MEASURED | {"autocorrelation_gradient": (1.0, math.nan, 0.2), "stale_share": (None, None)}
    (panel,) = panels(result(series=broken))
    assert panel.bands[0].x == (0.0, 2.0)
    assert panels(result(series=MEASURED | {"autocorrelation_lag": (), "stale_beta2": ()})) == []


def test_the_present_value_and_the_bounds_are_marked() -> None:
    ax = plot_beta2(result(known=(0.98, 1.0)))
    assert words(ax) == ["beta1²", "1 − 3/steps", "present"]
    at = {round(float(line.get_xdata()[0]), 9) for line in ax.lines if len(line.get_xdata()) == 2}
    assert {round(place(b), 9) for b in (0.98, 0.999, 1 - 3 / 9000)} <= at


def test_an_exponent_is_drawn_by_its_factor() -> None:
    rec = as_exponent(result(known=(0.98, 1.0), beta1=None, knob="beta2_decay"), 9000)
    data = beta2_data(rec)
    assert data.value == pytest.approx(0.98)
    assert data.knob == "beta2 at the last step"
    assert "beta2_decay" in data.title


def test_points_that_are_no_numbers_are_left_out() -> None:
    series = SERIES | {"score_excess": (0.3, None, 0.0, 0.05, 0.08)}
    assert beta2_data(result(series=series)).betas == (0.8, 0.99, 0.999, 0.9999)


def test_hostile_text_and_extreme_values() -> None:
    ax = plot_beta2(result(knob=HOSTILE, present=1 - 1e-9, num_steps=None))
    assert "<script" not in to_svg(ax.figure, name="beta2", description="a beta2")
    assert all(math.isfinite(x) for x in ax.get_xlim())
