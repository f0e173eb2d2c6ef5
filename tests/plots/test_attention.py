"""What the figures of attention and of the stability map show."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.figure import Figure

from dyntune.errors import InvalidArgumentError
from dyntune.plots import plot_attention, plot_stability_map
from dyntune.plots.attention import attention_data
from dyntune.plots.stability_map import stability_map_data
from dyntune.records import Estimate
from dyntune.suggest.heads_rule import HeadCourse
from tests.plots.test_heads import result, row

COURSE = HeadCourse(
    steps=(0, 10, 20),
    max_logit=((1.0, 2.0, 3.0), (2.0, 2.0, 9.0), (3.0, math.nan, 40.0)),
    relative_entropy=((0.9, 0.8, 0.7), (0.9, 0.8, 0.2), (0.9, 0.8, 0.05)),
)


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value / 2, high=value * 2, level=0.95, unit="x", method="test", covers="sampling")


def drawn(ax: Any) -> Any:
    figure = ax.get_figure(root=True)
    figure.draw_without_rendering()
    return figure


def test_a_line_for_each_head() -> None:
    found = result(row(1, course=COURSE), row(2))
    data = attention_data(found)
    assert data.steps == (0, 10, 20)
    assert data.logits[0] == (1.0, 2.0, 3.0)
    assert data.logits[2] == (3.0, 9.0, 40.0)
    assert data.entropy[2] == (0.7, 0.2, 0.05)
    ax = found.plot_attention()
    figure = drawn(ax)
    assert len(figure.axes) == 2
    assert len(ax.lines) == 3 + 1  # one for each head, and where the softmax saturates
    assert {t.get_text() for axes in figure.axes for t in axes.texts} == {"saturated", "collapsed"}
    alone = Figure().add_subplot()
    assert plot_attention(found, heads=1, ax=alone) is alone


def test_small_logits_need_no_mark() -> None:
    quiet = HeadCourse(steps=(0, 5), max_logit=((1.0,), (2.0,)), relative_entropy=((0.9,), (0.9,)))
    assert len(result(row(1, course=quiet)).plot_attention().lines) == 1


def test_attention_that_was_not_read() -> None:
    with pytest.raises(InvalidArgumentError, match="no attention was read"):
        plot_attention(result())
    with pytest.raises(InvalidArgumentError, match="read for 1 heads"):
        plot_attention(result(row(1, course=COURSE), row(2)), heads=2)


def test_a_map_over_a_brute_force() -> None:
    outcomes = {2: {0.1: 2.0, 0.2: 1.5, 0.4: math.inf}, 1: {0.1: 2.1, 0.2: 1.7, 0.4: math.nan, 0.8: math.inf}}
    found = result(row(1), row(2))
    ax = found.plot_map(outcomes)
    drawn(ax)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2"]
    assert {t.get_text() for t in ax.texts} == {"failed", "expected to fail", "lowest loss", "suggested"}
    data = stability_map_data(outcomes, critical={2: estimate(0.3)}, suggested={2: estimate(0.1)})
    assert data.choices == ("2", "1")
    assert data.outcomes[1][2] == (0.4, math.inf)
    assert data.edges == ((0.3, 0.15, 0.6), None)
    assert data.suggested == (0.1, None)


def test_a_map_of_one_rate_and_bad_input() -> None:
    drawn(plot_stability_map({"a": {0.1: 1.0}}))
    for outcomes, match in (({}, "empty"), ({1: {}}, "empty"), ({1: {0.0: 1.0}}, "positive")):
        with pytest.raises(InvalidArgumentError, match=match):
            plot_stability_map(outcomes)
