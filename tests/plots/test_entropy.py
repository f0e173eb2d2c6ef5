"""What the figures of the entropy coefficient show."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from dyntune.errors import InvalidArgumentError
from dyntune.plots import plot_entropy, plot_entropy_coef
from dyntune.plots.entropy import entropy_coef_data
from dyntune.rl import SoftmaxBandit
from tests.suggest.test_entropy_coef import REWARDS, bandit_at, suggest


def drawn(ax: Any) -> Any:
    figure = ax.get_figure(root=True)
    figure.draw_without_rendering()
    return figure


def test_rates_are_those_of_the_result() -> None:
    _, objective = bandit_at(SoftmaxBandit(REWARDS).optimum(1.0))
    found = suggest(objective, lr=2.0, present=5.0)
    data = entropy_coef_data(found)
    assert data.alphas[0] == 0.0
    assert data.alphas[-1] == 6.0
    for alpha, rate, low, high in list(zip(data.alphas, data.critical, data.low, data.high, strict=True))[::20]:
        assert (rate, low, high) == (
            found.critical_lr(alpha).value,
            found.critical_lr(alpha).low,
            found.critical_lr(alpha).high,
        )
    assert data.stable == (found.low, found.high)
    ax = found.plot()
    drawn(ax)
    assert {t.get_text() for t in ax.texts} == {"critical", "learning rate", "in use", "suggested"}
    assert ax.get_yscale() == "log"
    alone = Figure().add_subplot()
    assert plot_entropy_coef(found, ax=alone) is alone


def test_refused_and_endless_rates() -> None:
    _, objective = bandit_at(torch.tensor([0.3, 0.0, -0.2, 0.1]).double(), 100 * REWARDS)
    refused = suggest(objective, lr=100.0)
    ax = refused.plot()
    drawn(ax)
    assert "No entropy coefficient" in ax.get_title(loc="left")
    assert "suggested" not in {t.get_text() for t in ax.texts}
    low, high = ax.get_ylim()
    assert 0 < low < high < math.inf
    unknown = suggest(objective, optimizer=torch.optim.Rprop(objective.policy.parameters()), present=0.5)
    drawn(unknown.plot())


def test_entropy_over_training() -> None:
    ax = plot_entropy([1, 2, 3], [0.6, 0.5, 0.4], [-0.1, 0.0, 0.1], ratio=[math.nan, 0.1, 0.2])
    assert len(drawn(ax).axes) == 3
    assert len(drawn(plot_entropy([1], [0.6], [0.0])).axes) == 2
    for wrong in (([], [], []), ([1], [0.1, 0.2], [0.0])):
        with pytest.raises(InvalidArgumentError):
            plot_entropy(*wrong)
