"""What the figure of a story shows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dyntune.errors import InvalidArgumentError
from dyntune.monitor.run import Row, Run
from dyntune.monitor.story import explain
from dyntune.plots import plot_story
from dyntune.plots.story import POINTS, story_data
from dyntune.plots.svg import to_svg
from tests.plots.records import HOSTILE
from tests.report.runs import monitored


def test_loss_gradient_and_rate_then_two_columns_of_the_evidence() -> None:
    run = monitored("diverging")
    wanted = ("train/loss", "absent", "monitor/step_s", "stability/lr_ratio", "stability/batch_ratio")
    data = story_data(run, since=456, noticed=470, others=(570,), columns=wanted)
    names = [panel.name for panel in data.panels]
    assert names == ["train/loss", "grad/norm", "train/lr", "monitor/step_s", "stability/lr_ratio"]
    assert data.panels[0].missing.tolist() == [step for step in range(600) if step / 600 > 0.95]
    assert data.span == (0.0, 599.0)
    figure = plot_story(run, since=456, noticed=470, others=(570,), columns=wanted, title="so")
    assert len(figure.axes) == 5
    for ax in figure.axes:  # at every panel, where it began, where it was noticed, and what came later
        across = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
        assert {float(x[0]) for x in across if x[0] == x[1]} == {456.0, 470.0, 570.0}
    assert "from step 456, noticed at 470" in [text.get_text() for text in figure.axes[0].texts]


def test_numbers_far_apart_are_on_a_logarithmic_axis_if_they_are_positive() -> None:
    def log(*losses: float) -> bool:
        rows = [Row(step=i, values={"train/loss": x}) for i, x in enumerate(losses)]
        return story_data(Run(rows=rows)).panels[0].log

    assert log(1.0, 1e6, math.nan)
    assert not log(1.0, 2.0)
    assert not log(0.0, 1e6)
    assert not log(math.nan)


def test_a_spike_of_one_step_is_seen_in_a_long_run() -> None:
    losses = np.ones(200_000)
    losses[123_456] = 50.0
    rows = [Row(step=i, values={"train/loss": x}) for i, x in enumerate(losses.tolist())]
    (panel,) = story_data(Run(rows=rows)).panels
    assert panel.steps.size == POINTS
    assert panel.values.max() == 1.0
    at = int(panel.high.argmax())
    assert panel.high[at] == 50.0
    assert abs(panel.steps[at] - 123_456) < 200_000 / POINTS


def test_rates_of_other_groups_stand_beside_the_first() -> None:
    rows = [Row(step=i, values={"train/loss": 1.0, "train/lr": 0.1, "train/lr/1": 30.0}) for i in range(5)]
    panel = story_data(Run(rows=rows)).panels[1]
    assert [(name, values.tolist()) for name, _, values in panel.groups] == [("group 1", [30.0] * 5)]
    assert panel.log
    axes = plot_story(Run(rows=rows)).axes[1]
    assert "group 1" in [text.get_text() for text in axes.texts]


def test_what_does_not_change_is_drawn_from_zero() -> None:
    rows = [Row(step=i, values={"train/loss": 1.0 + i, "train/lr": 2e-3}) for i in range(5)]
    figure = plot_story(Run(rows=rows))
    assert figure.axes[1].get_ylim() == pytest.approx((0.0, 3e-3))


@pytest.mark.parametrize("values", [[math.nan], [math.inf, -math.inf], [0.0], [1e308, -1e308], [5e-324, 1.0]])
def test_every_number_can_be_drawn(values: list[float]) -> None:
    rows = [Row(step=i, values={"train/loss": x, "train/lr": x}) for i, x in enumerate(values)]
    plot_story(Run(rows=rows), since=0, noticed=10**6, title="odd").draw_without_rendering()


def test_names_of_any_kind_leave_the_figure_readable() -> None:
    for words in (HOSTILE, "$x^{", "w" * 3000):
        told = explain(monitored("diverging", words=words))
        svg = to_svg(told.plot(), name="story", description=told.text, standalone=True)
        assert svg.startswith("<svg")
        assert "<script" not in svg


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="nothing to draw"):
        plot_story(Run(rows=[Row(step=0, values={"other": 1.0})]))
