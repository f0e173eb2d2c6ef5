"""What the figures of blocks show."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import dyntune
from dyntune import Estimate, Status
from dyntune.curvature.blocks import BlockMass
from dyntune.plots import plot_block_mass, plot_blocks
from dyntune.plots.blocks import blocks_data, mass_data, short_names
from dyntune.plots.style import BLUE, INK, ORANGE
from dyntune.plots.svg import to_svg
from tests.plots.records import HOSTILE, estimate, found


def problem() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        return model, (torch.randn(8, 3).double(), torch.randn(8, 2).double())


def texts(axes) -> str:
    axes.get_figure(root=True).draw_without_rendering()
    names = [text.get_text() for text in axes.get_yticklabels()]
    return "\n".join([*names, *(text.get_text() for text in axes.texts)])


def refused() -> Estimate:
    return Estimate(
        value=None, low=-math.inf, high=math.inf, level=None, unit="1", method="none", covers="numerical",
        status=Status.REFUSED, reason="by hand",
    )  # fmt: skip


def test_shows_every_blocks_values_and_intervals_as_they_are():
    model, batch = problem()
    result = dyntune.block_eigenvalues(model, batch, criterion=nn.MSELoss(), k=2)
    data = blocks_data(result)
    assert [row.name for row in data.rows] == list(result) == ["0", "2"]
    for row, item in zip(data.rows, result.values(), strict=True):
        assert row.values == tuple(item.values.tolist())
        assert row.low == tuple(item.low.tolist())
        assert row.high == tuple(item.high.tolist())
        assert row.sure
    sharpest = max(result, key=lambda name: float(result[name]))
    assert data.title.endswith(f"in {sharpest}")
    assert data.x_range[0] <= 0.0 < data.x_range[1]


def test_the_whole_matrix_is_a_line_at_its_value_that_no_block_passes():
    model, batch = problem()
    result = dyntune.block_eigenvalues(model, batch, criterion=nn.MSELoss())
    whole = dyntune.hessian_eigenvalues(model, batch, criterion=nn.MSELoss())
    axes = result.plot(whole=whole)
    lines = [line.get_xdata() for line in axes.lines if line.get_color() == INK and line.get_linestyle() == "--"]
    assert [list(x) for x in lines] == [[float(whole)] * 2]
    assert max(float(item) for item in result.values()) <= float(whole)
    assert "the whole matrix" in texts(axes)


def test_estimates_may_be_negative_unbounded_or_refused():
    items = {
        "open": estimate(3.0, 2.0, math.inf, unit="1"),
        "below": estimate(-1.0, -2.0, 1.0, unit="1"),
        "no": refused(),
    }
    data = blocks_data(items, quantity="trace")
    assert data.x_range[0] < -2.0
    assert data.x_range[1] > 3.0
    assert data.title == "Largest trace of 3 blocks: 3 in open; 1 NOT established"
    assert [row.values for row in data.rows] == [(3.0,), (-1.0,), ()]
    axes = plot_blocks(items, quantity="trace")
    assert "refused" in texts(axes)
    assert axes.get_xlabel() == "trace (1)"


def test_nothing_established_is_said():
    assert "No block has an established" in blocks_data({"a": refused()}).title
    plot_blocks({"a": refused()}).get_figure(root=True).draw_without_rendering()


def test_what_is_not_certified_has_another_colour_and_says_so():
    axes = plot_blocks({"a": found(k=2), "b": found(k=2, max_products=5)})
    assert texts(axes).count("not established") == 1
    colors = {line.get_color() for line in axes.lines}
    assert {BLUE, ORANGE} <= colors


def test_long_names_keep_what_tells_them_apart():
    names = [f"transformer.encoder.layers.{i}.self_attention.projection.weight" for i in range(12)]
    short = short_names(names)
    assert short == [str(i) for i in range(12)]
    mixed = short_names([*names, "head.weight"])
    assert len(set(mixed)) == 13
    assert max(map(len, mixed)) <= 34
    assert short_names(["a.weight", "b.weight"]) == ["a.weight", "b.weight"]
    assert len(short_names(["x" * 200])[0]) == 34
    assert short_names(["a" * 40, "a" * 40 + ".b"]) == short_names(["a" * 40, "a" * 40 + ".b"])


def test_shares_and_what_a_random_direction_has():
    model, batch = problem()
    operator = dyntune.hessian(model, batch, criterion=nn.MSELoss())
    shares = dyntune.block_mass(operator, dyntune.eigenvalues(operator).vectors[0])
    assert shares.sizes == {"0": 16, "2": 10}
    data = mass_data(shares)
    assert [row.share for row in data.rows] == list(shares.values())
    assert [row.expected for row in data.rows] == [16 / 26, 10 / 26]
    axes = shares.plot()
    assert [bar.get_width() for bar in axes.patches] == list(shares.values())
    ticks = [line.get_xdata()[0] for line in axes.lines if line.get_color() == ORANGE]
    assert ticks == [16 / 26, 10 / 26]
    assert "random direction" in texts(axes)


def test_a_direction_of_ones_lies_where_the_parameters_are():
    model, batch = problem()
    operator = dyntune.hessian(model, batch, criterion=nn.MSELoss())
    data = mass_data(dyntune.block_mass(operator, [torch.ones_like(p) for p in model.parameters()]))
    assert [row.share for row in data.rows] == pytest.approx([row.expected for row in data.rows], rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 60])
@pytest.mark.parametrize("width", [3.2, 5.4, 9.0])
def test_draws_few_and_many_blocks_narrow_and_wide(count, width):
    items = {f"layers.{i}.attention": estimate(1.0 + i, 0.5 + i, 2.0 + i, unit="1") for i in range(count)}
    mass = BlockMass(dict.fromkeys(items, 1 / count), dict.fromkeys(items, 7))
    for draw in (lambda ax: plot_blocks(items, ax=ax), lambda ax: plot_block_mass(mass, ax=ax)):
        figure = Figure(figsize=(width, 2 + 0.15 * count), layout="constrained")
        axes = figure.add_subplot()
        assert draw(axes) is axes
        figure.draw_without_rendering()
        assert len(axes.get_yticklabels()) == count
        bottom, top = axes.get_ylim()
        assert bottom > top


def test_hostile_names_come_out_as_text_and_the_same_bytes_every_time():
    def svg() -> str:
        figure = plot_blocks({HOSTILE: found(), "b": found()}).get_figure(root=True)
        return to_svg(figure, name="blocks", description="blocks")

    assert svg() == svg()
    assert "<script" not in svg()
