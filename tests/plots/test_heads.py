"""What the figure of heads shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.figure import Figure

from dyntune.plots import plot_heads
from dyntune.plots.heads import heads_data
from dyntune.plots.svg import to_svg
from dyntune.suggest.heads_rule import HeadEvidence, Heads, heads_rule
from tests.plots.records import HOSTILE


def row(heads: int, **changed: Any) -> HeadEvidence:
    given: dict[str, Any] = {
        "heads": heads,
        "head_dim": 128 // heads,
        "parameters": 10,
        "lr": (0.01, 0.012, 0.009),
        "max_stable": (0.1, 0.12, 0.09),
        "start": (4.0, 4.1, 3.9),
        "loss": (2.0 + heads / 100, 2.1, 1.9),
        "step_seconds": (1.0, 1.0, 1.0),
    } | changed
    return HeadEvidence(**given)


def result(*rows: HeadEvidence, **options: Any) -> Heads:
    return heads_rule(rows or [row(8), row(1), row(2)], **options)


def test_points_are_those_of_the_table_in_order_of_heads() -> None:
    found = result()
    data = heads_data(found, observed={2: 0.2, 1: math.nan})
    assert data.heads == (1, 2, 8)
    by_heads = {r.heads: r for r in found.table}
    for points, name in ((data.suggested, "lr"), (data.critical, "critical_lr"), (data.losses, "loss")):
        assert [(p.heads, p.value) for p in points] == [(h, getattr(by_heads[h], name).value) for h in (1, 2, 8)]
    assert data.observed == ((2, 0.2),)
    assert data.value == found.value
    assert "critical rates: equivalent, uncertain" in data.title


def test_a_result_plots_itself_with_the_loss_below() -> None:
    ax = result().plot(observed={1: 0.3})
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    assert len(figure.axes) == 2
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "8"]
    assert {t.get_text() for t in ax.texts} == {"expected to fail", "suggested", "failed"}
    assert ax.get_yscale() == "log"
    alone = Figure().add_subplot()
    assert plot_heads(result(), ax=alone) is alone
    assert len(alone.figure.axes) == 1


def test_narrow_heads_are_hollow() -> None:
    data = heads_data(result(row(1), row(64)))
    assert data.narrow == (64,)


def test_what_is_missing_is_left_out() -> None:
    failed = row(2, loss=(math.inf,) * 3, max_stable=(math.nan,) * 3, lr=(math.nan,) * 3)
    data = heads_data(result(row(1), failed))
    assert (
        [p.heads for p in data.critical] == [p.heads for p in data.suggested] == [p.heads for p in data.losses] == [1]
    )
    refused = result(failed)
    ax = refused.plot()
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    assert "No number of heads" in ax.get_title(loc="left")
    assert [t.get_text() for t in figure.axes[1].texts] == ["every short training failed"]


def test_endless_intervals_are_cut() -> None:
    one = [row(h, lr=(0.01,), max_stable=(0.1,), start=(2.0,), loss=(1.0,)) for h in (1, 2)]
    ax = result(*one).plot()
    ax.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]
    low, high = ax.get_ylim()
    assert 0 < low < high < 1e3


def test_hostile_reasons() -> None:
    found = result(row(2, loss=(math.inf,) * 3))
    object.__setattr__(found, "reason", HOSTILE)
    assert "<script" not in to_svg(found.plot().figure, name="heads", description="heads")


def test_data_is_deterministic() -> None:
    assert heads_data(result()) == heads_data(result())
    with pytest.raises(AttributeError):
        heads_data(result()).value = 3  # type: ignore[misc]
