"""Temperatures: a known one is found and covered, reliability is judged on other rows, and the hopeless is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dyntune.calibration.temperature import checked_logits, fit_temperature
from dyntune.errors import DyntuneError, InvalidArgumentError, NonFiniteError, RefusedError
from dyntune.records import Status
from dyntune.suggest.temperature import suggest_temperature


def drawn(rows: int, seed: int, factor: float = 2.5, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Logits times a factor, targets from the softmax of what they were."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((rows, classes)) * 2
    return factor * z, (z + rng.gumbel(size=z.shape)).argmax(1)


def test_the_known_factor_is_covered_in_most_draws() -> None:
    covered = 0
    for seed in range(200):
        fit = fit_temperature(*checked_logits(*drawn(500, seed)))
        covered += abs(math.log(fit.temperature / 2.5)) <= 1.959964 * fit.error
    assert 182 <= covered <= 196  # 91 to 98%


def test_the_fit_is_a_minimum_and_does_not_depend_on_offsets_or_scale() -> None:
    z, y = checked_logits(*drawn(300, 0))
    fit = fit_temperature(z, y)
    t = torch.tensor(fit.temperature, dtype=torch.float64, requires_grad=True)
    scaled = torch.tensor(z) / t
    loss = torch.nn.functional.cross_entropy(scaled, torch.tensor(y))
    assert loss.item() == pytest.approx(fit.nll, rel=1e-12)
    (slope,) = torch.autograd.grad(loss, t)
    assert abs(float(slope)) < 1e-10
    shifted = fit_temperature(z * 1e3 + np.arange(300)[:, None], y)
    assert shifted.temperature == pytest.approx(1e3 * fit.temperature, rel=1e-9)
    assert shifted.error == pytest.approx(fit.error, rel=1e-6)


def test_extreme_logits_do_not_overflow() -> None:
    z, y = drawn(400, 1)
    fit = fit_temperature(*checked_logits(z * 1e8 - 1e10, y))
    assert fit.temperature == pytest.approx(1e8 * fit_temperature(*checked_logits(z, y)).temperature, rel=1e-6)


def test_a_rescaled_softmax_is_calibrated_afterwards() -> None:
    z, y = drawn(2000, 2)
    found = suggest_temperature(torch.tensor(z), torch.tensor(y))
    assert found.status is Status.OK
    assert found.low < 2.5 < found.high
    assert found.before.miscalibrated
    assert found.after is not None
    assert not found.after.miscalibrated
    assert torch.equal(found.scale(torch.tensor(z)), torch.tensor(z) / found.value)
    kept = suggest_temperature(z / 2.5, y)
    assert any("can stay as they are" in check for check in kept.checks)


def test_one_class_and_labels() -> None:
    rng = np.random.default_rng(3)
    z = rng.standard_normal((1500, 3)) * 2
    y = (rng.random((1500, 3)) < 1 / (1 + np.exp(-z))).astype(int)
    labels = suggest_temperature(3 * z, y)
    assert labels.low < 3 < labels.high
    single = suggest_temperature(3 * z[:, 0], y[:, 0])
    pair = suggest_temperature(np.stack([np.zeros(1500), 3 * z[:, 0]], 1), y[:, 0])
    assert single.value == pytest.approx(pair.value, rel=1e-9)


@pytest.mark.parametrize("objective", ["smooth", "debiased"])
def test_the_calibration_error_itself_as_the_objective(objective: Any) -> None:
    z, y = drawn(500, 4)
    found = suggest_temperature(z, y, objective=objective, num_folds=2, num_resamples=39)
    plain = suggest_temperature(z, y, num_folds=2, num_resamples=39)
    assert found.low <= float(found) <= found.high
    assert float(found) == pytest.approx(2.5, rel=0.2)  # the error is flat around its least value
    assert found.after is not None
    assert float(found.after) < float(found.before) / 3
    assert found.high / found.low > plain.high / plain.low


def test_no_temperature_is_most_likely() -> None:
    z, y = drawn(200, 5)
    right = suggest_temperature(z, z.argmax(1))
    assert right.status is Status.REFUSED
    assert "every one of 200 rows" in right.reason
    assert right.after is None
    assert suggest_temperature(-z, y).status is Status.REFUSED
    assert "same probabilities" in suggest_temperature(np.ones((50, 3)), np.arange(50) % 3).reason
    with pytest.raises(RefusedError):
        suggest_temperature(z, z.argmax(1), strict=True)
    with pytest.raises(RefusedError):
        float(right)


def test_few_rows_are_uncertain() -> None:
    z, y = drawn(8, 7, classes=3)
    found = suggest_temperature(z, y, num_folds=2)
    assert found.status is not Status.OK


@pytest.mark.parametrize(
    ("z", "y", "error"),
    [
        ([], [], InvalidArgumentError),
        ([[1.0, math.inf]], [0], NonFiniteError),
        ([[1.0, 2.0]], [2], InvalidArgumentError),
        ([[1.0], [2.0]], [0, 0], InvalidArgumentError),
        ([1.0, 2.0], [0, 3], InvalidArgumentError),
        ([[1.0, 2.0]], [0], InvalidArgumentError),  # one row, five folds
    ],
)
def test_bad_input(z: Any, y: Any, error: type[DyntuneError]) -> None:
    with pytest.raises(error):
        suggest_temperature(z, y)


def test_figures() -> None:
    z, y = drawn(500, 8)
    found = suggest_temperature(z, y, num_resamples=39)
    ax = found.plot()
    assert "held-out" in ax.get_title(loc="left")
    assert found.before.plot().get_xlabel() == "predicted probability"


def test_netcal_finds_the_same() -> None:
    scaling = pytest.importorskip("netcal.scaling")
    z, y = drawn(1000, 9)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    theirs = scaling.TemperatureScaling()
    theirs.fit(p, y)
    assert 1 / float(np.ravel(theirs.temperature)[0]) == pytest.approx(
        fit_temperature(*checked_logits(z, y)).temperature, rel=1e-3
    )
