"""Flat losses, by noise or by a layer that is stuck; losses that fall by meeting rows again. Series and trainings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dyntune
from dyntune.detect.experimental import Memorised, Plateau
from dyntune.detect.memorised import staircase
from dyntune.detect.plateau import BLOCKS, LEFT, NOISY
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row
from tests.detect.series import hostile, run_of_rows, told_of

N = 32 * 40


def flat_after(fall: int = 320, *, level: float = 0.5, noise: float = 0.05, seed: int = 0, slope: float = 0.0) -> Any:
    """Falls from 1 to a level, and stays."""
    rng = np.random.default_rng(seed)
    steps = np.arange(N)
    mean = np.maximum(level, 1.0 - (1.0 - level) * steps / fall) * (1.0 - slope * np.maximum(steps - fall, 0) / N)
    return mean * np.exp(noise * rng.standard_normal(N))


def looks(*, alike: float = 0.01, fallen: float = 0.0, dead: float = 0.0) -> list[Row]:
    """Bursts and looks at four tensors, one of whose gradients falls by so many logarithms after the first."""
    rows = []
    for at in range(40, N, 100):
        last = 0.0 if at == 40 else -fallen
        tensors = {f"grad/log_rms/{name}": x for name, x in zip("abcd", (last, 0.1, 0.0, -0.1), strict=True)}
        rows.append(Row(step=at, values=tensors | {"grad/autocorr_raw_lag1": alike, "units/dead/1": dead}))
    return rows


def told(loss: Any, rows: list[Row] | None = None, *, lr: Any = 0.1, first: int = 0) -> list[Alert]:
    shifted = [Row(step=row.step + first, values=row.values) for row in (looks() if rows is None else rows)]
    columns = {"train/loss": loss, "train/lr": lr}
    return told_of(Plateau, run_of_rows(len(loss), columns, shifted, first=first))


@pytest.mark.parametrize("first", [0, 5000])
def test_a_plateau_of_noise_is_said_once(first: int) -> None:
    (alert,) = told(flat_after(), first=first)
    assert (alert.kind, alert.cause, alert.severity) == ("plateau-noise", Cause.NOISE_PLATEAU, "warning")
    assert alert.recommender == "dyntune.suggest_schedule"
    assert first + 320 + 32 * BLOCKS - 64 <= alert.step <= first + 320 + 32 * (BLOCKS + 8)
    assert alert.since == alert.step + 1 - 32 * BLOCKS


@pytest.mark.parametrize(("rows", "cause"), [(looks(fallen=6.0), Cause.VANISHING), (looks(dead=0.9), Cause.DEAD_UNITS)])
def test_a_stuck_layer_is_told_with_its_place(rows: list[Row], cause: Cause) -> None:
    (alert,) = told(flat_after(), rows)
    assert (alert.kind, alert.cause) == ("plateau-stuck", cause)
    assert alert.where in (("a",), ("1",))
    assert "would not help" in alert.advice


def test_what_is_no_plateau() -> None:
    assert told(flat_after(slope=0.5)) == []  # still falling
    assert told(flat_after(level=0.97)) == []  # never moved: for another
    assert told(flat_after(level=0.9 * LEFT)) == []  # has learnt what there is
    assert told(flat_after(), looks(alike=1.1 / (1 + NOISY))) == []  # the mean gradient is not hidden
    assert told(flat_after(), []) == []
    rates = 0.1 * 0.5 ** (np.arange(N) // 256)
    assert told(flat_after(), lr=rates) == []  # its rate is being lowered
    for name, rows in hostile(("train/loss", "grad/autocorr_raw_lag1", "train/lr")).items():
        assert isinstance(told_of(Plateau, rows), list), name


def passes(length: int, count: int, *, within: float, jump: float, noise: float = 0.01) -> list[Row]:
    """A loss of 2 in the first pass; later ones fall at their beginning and within."""
    rng = np.random.default_rng(0)
    rows, level = [], 2.0
    for number in range(count):
        level *= 1.0 - jump if number else 1.0
        for i in range(length):
            share = within * i / length if number else 0.0
            values = {"train/loss": level * (1 - share) * float(np.exp(noise * rng.standard_normal()))}
            rows.append(Row(step=number * length + i, values=values | ({"train/pass": number + 1.0} if i == 0 else {})))
        level *= 1.0 - within if number else 1.0
    return rows


def test_a_staircase_of_passes_is_memory() -> None:
    (alert,) = told_of(Memorised, passes(200, 5, within=0.02, jump=0.15))
    assert (alert.kind, alert.cause) == ("memorised", Cause.WRONG_LABELS)
    assert alert.since == 200
    assert 600 <= alert.step < 700


def test_what_is_no_staircase() -> None:
    assert told_of(Memorised, passes(200, 5, within=0.2, jump=0.01)) == []  # falls within passes
    assert told_of(Memorised, passes(200, 5, within=0.0, jump=0.02)) == []  # hardly falls
    assert told_of(Memorised, passes(100, 9, within=0.02, jump=0.15)) == []  # passes too short to tell
    assert told_of(Memorised, passes(200, 3, within=0.02, jump=0.3)) == []  # too few
    for name, rows in hostile(("train/loss", "train/pass")).items():
        assert isinstance(told_of(Memorised, rows), list), name
    edges = np.arange(0, 20 * 32, 32)
    learns = np.linspace(2.0, 1.0, 20)
    assert staircase(np.array([0, 160, 320, 480]), edges, edges + 31, learns) is None


def watched(
    model: nn.Module, loader: Any, *, lr: float, epochs: int, spoil: Any = None, adam: bool = False
) -> list[Alert]:
    """What the two say of a training."""
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(model.parameters(), lr=lr)
    criterion = nn.CrossEntropyLoss()
    detectors = (Plateau(), Memorised())
    with dyntune.Monitor(model, optimizer, criterion=criterion, detectors=detectors, overhead=0.5) as monitor:
        for epoch in range(epochs):
            if spoil is not None and epoch == 1:
                spoil(model)
            for x, y in monitor.watch(loader, progress=False):
                loss = criterion(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.observe(loss)
    return monitor.alerts


def digits(rows: int = 1200) -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:rows] / 16, dtype=torch.float32), torch.tensor(y[:rows])


@pytest.mark.slow
def test_shuffled_labels_are_memorised_and_right_ones_are_not() -> None:
    x, y = digits()
    for shuffled in (True, False):
        g = torch.Generator().manual_seed(0)
        labels = y[torch.randperm(len(y), generator=g)] if shuffled else y
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        loader = DataLoader(TensorDataset(x, labels), batch_size=4, shuffle=True, generator=g)
        kinds = {alert.kind for alert in watched(model, loader, lr=1e-3, epochs=12, adam=True)}
        assert ("memorised" in kinds) is shuffled


@pytest.mark.slow
def test_a_plateau_of_noise_in_a_training_is_one_that_a_lower_rate_ends() -> None:
    """Labels of which a third are wrong, new at each step, in batches of 4: the rest is noise of the steps."""
    x, y = digits()
    g = torch.Generator().manual_seed(0)

    class Noisy:
        def __len__(self) -> int:
            return 400

        def __iter__(self) -> Any:
            for _ in range(400):
                rows = torch.randint(len(x), (4,), generator=g)
                wrong = torch.rand(4, generator=g) < 0.3
                yield x[rows], torch.where(wrong, torch.randint(10, (4,), generator=g), y[rows])

    def level(model: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x), y))

    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    alerts = watched(model, Noisy(), lr=0.5, epochs=6)
    assert [alert.kind for alert in alerts] == ["plateau-noise"]
    before = level(model)
    watched(model, Noisy(), lr=0.05, epochs=2)
    assert level(model) < before


@pytest.mark.slow
def test_a_network_whose_units_die_is_stuck() -> None:
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def spoil(model: Any) -> None:
        with torch.no_grad():
            model[2].bias.fill_(-100.0)

    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    alerts = watched(model, loader, lr=0.1, epochs=6, spoil=spoil)
    assert [alert.kind for alert in alerts] == ["plateau-stuck"]
    assert alerts[0].where
