"""What the figure of curvature numbers shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from dyntune import Estimate, Sharpness, Status
from dyntune.plots import plot_sharpness
from dyntune.plots.sharpness import sharpness_data
from dyntune.plots.svg import to_svg

H, P = "loss / parameter^2", "1 / learning rate"
RATE = 0.1
WEIGHT = [torch.nn.Parameter(torch.zeros(1))]


def estimate(value: float | None, low: float, high: float, unit: str, **changed: Any) -> Estimate:
    fields: dict[str, Any] = {"level": 0.95, "method": "by hand", "covers": "sampling"}
    return Estimate(value=value, low=low, high=high, unit=unit, **(fields | changed))


def result(unit: str = H, **changed: Any) -> Sharpness:
    fields: dict[str, Any] = {
        "lambda_max": estimate(10.0, 9.0, 12.0, H, covers="numerical", level=0.9999),
        "lambda_min": estimate(-3.0, -4.0, -3.0, H, covers="numerical", level=0.9999),
        "preconditioned": estimate(19.0, 18.0, 20.0, unit, covers="numerical"),
        "batch": estimate(8.0, 6.0, 10.0, unit),
        "directional": estimate(4.0, -1.0, 9.0, unit),
        "critical_lr": estimate(0.4, 0.2, math.inf, "learning rate"),
    }
    return Sharpness(**(fields | changed), record={"num_rows": 64}, num_products=40)


def rows(data, panel: int = 0):
    return {row.name: row for row in data.panels[panel].rows}


def words(axes) -> str:
    axes.get_figure(root=True).draw_without_rendering()
    return "\n".join(text.get_text() for part in (axes, *axes.child_axes) for text in part.texts)


def test_without_an_optimizer_every_unit_has_its_own_axis():
    data = sharpness_data(result(P))
    assert [panel.xlabel for panel in data.panels] == ["loss / parameter²", P, "learning rate"]
    assert [panel.edge for panel in data.panels] == [None] * 3
    assert [len(panel.rows) for panel in data.panels] == [2, 3, 1]
    assert rows(data)["largest eigenvalue"].value == 10.0
    assert data.title == "Curvature on 64 rows"


def test_gradient_descent_is_compared_with_two_over_its_rate():
    data = sharpness_data(result(), optimizer=torch.optim.SGD(WEIGHT, lr=RATE))
    shown = rows(data)
    assert data.panels[0].edge == 1.0
    top = shown["largest eigenvalue"]
    assert (top.value, top.low, top.high) == pytest.approx((0.5, 0.45, 0.6), rel=1e-12)  # of 2 / 0.1 = 20
    assert shown["batch sharpness"].value == pytest.approx(0.4, rel=1e-12)
    assert shown["curvature of a bare step"].low == pytest.approx(-0.05, rel=1e-12)
    assert [row.name for row in data.panels[1].rows] == ["smallest eigenvalue"]
    assert "(0.9 .. 1) of its limit" in data.title  # of P = 1: 19 of 20


def test_a_critical_rate_turns_over():
    row = rows(sharpness_data(result(), optimizer=torch.optim.SGD(WEIGHT, lr=RATE)))["rate of a bare step"]
    assert (row.value, row.low, row.high) == pytest.approx((0.25, 0.0, 0.5), rel=1e-12)
    assert row.text == "0.1 of 0.4 (0.2 .. inf)"


def test_momentum_has_one_limit_for_all_rows_and_another_for_small_batches():
    shown = rows(sharpness_data(result(), optimizer=torch.optim.SGD(WEIGHT, lr=RATE, momentum=0.9)))
    assert shown["largest eigenvalue"].value == pytest.approx(10.0 / 38, rel=1e-12)  # 2 (1 + 0.9) / 0.1
    assert shown["batch sharpness"].value == pytest.approx(8.0 / 2, rel=1e-12)  # 2 (1 - 0.9) / 0.1


def test_adam_bounds_the_preconditioned_matrix_and_no_eigenvalue_of_the_hessian():
    data = sharpness_data(result(P), optimizer=torch.optim.Adam(WEIGHT, lr=RATE))
    assert rows(data)["largest, preconditioned"].value == pytest.approx(19.0 / 380, rel=1e-12)
    assert list(rows(data, 1)) == ["largest eigenvalue", "smallest eigenvalue"]


def test_a_batch_sharpness_along_the_plain_gradient_is_not_compared_with_adams_limit():
    data = sharpness_data(result(H), optimizer=torch.optim.Adam(WEIGHT, lr=RATE))
    assert list(rows(data)) == ["rate of a bare step"]


def test_coupled_decay_lowers_the_limit_of_the_hessian_and_hides_what_it_acts_on_otherwise():
    shown = rows(sharpness_data(result(), optimizer=torch.optim.SGD(WEIGHT, lr=RATE, weight_decay=4.0)))
    assert shown["largest eigenvalue"].value == pytest.approx(10.0 / 16, rel=1e-12)  # 20 less 4
    assert "batch sharpness" not in shown
    adam = sharpness_data(result(P), optimizer=torch.optim.Adam(WEIGHT, lr=RATE, weight_decay=1e-2))
    assert list(rows(adam)) == ["rate of a bare step"]


@pytest.mark.parametrize("optimizer", [torch.optim.Rprop(WEIGHT, lr=RATE), torch.optim.SGD(WEIGHT, lr=0.0)])
def test_without_a_limit_nothing_is_compared_with_one(optimizer):
    data = sharpness_data(result(critical_lr=None, directional=None), optimizer=optimizer)
    assert all(panel.edge is None for panel in data.panels)


def test_says_what_each_interval_covers():
    text = words(result().plot())
    assert "interval: solver, 99.99 %" in text
    assert text.count("interval: batches, 95 %") == 3


def test_what_is_refused_or_doubtful_is_said():
    nothing = estimate(None, -math.inf, math.inf, H, status=Status.REFUSED, reason="no direction", level=None)
    doubtful = estimate(8.0, -math.inf, math.inf, H, status=Status.ONE_BATCH, reason="one batch")
    data = sharpness_data(result(batch=nothing, directional=doubtful), optimizer=torch.optim.SGD(WEIGHT, lr=RATE))
    shown = rows(data)
    assert shown["batch sharpness"].value is None
    assert shown["batch sharpness"].text == "refused: no direction"
    assert not shown["curvature of a bare step"].sure
    assert math.isinf(shown["curvature of a bare step"].high)
    assert all(math.isfinite(end) for panel in data.panels for end in panel.x_range)
    only = Sharpness(batch=nothing, record={"num_rows": 1}, num_products=0)
    assert "no direction" in words(only.plot(optimizer=torch.optim.SGD(WEIGHT, lr=RATE)))


@pytest.mark.parametrize("width", [3.2, 5.4, 9.0])
@pytest.mark.parametrize("unit", [H, P])
def test_draws_narrow_and_wide_on_given_axes(width, unit):
    figure = Figure(figsize=(width, 4.5), layout="constrained")
    axes = figure.add_subplot()
    assert plot_sharpness(result(unit), optimizer=torch.optim.Adam(WEIGHT, lr=RATE), ax=axes) is axes
    text = words(axes)
    for name in ("largest eigenvalue", "largest, preconditioned", "rate of a bare step"):
        assert name in text


def test_same_bytes_and_colours_that_follow_the_page():
    def svg() -> str:
        figure = result(P).plot(optimizer=torch.optim.Adam(WEIGHT, lr=RATE)).get_figure(root=True)
        return to_svg(figure, name="sharpness", description="curvature")

    assert svg() == svg()
    ticks = [line for line in svg().split("<text")[1:] if "var(--dt-" not in line.split(">")[0]]
    assert ticks == []
