"""Calibration errors: formulas against plain ones and a peer, exact claims, and inputs that have none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dyntune.calibration.calibration_error import calibration_error
from dyntune.calibration.estimators import BINS, ESTIMATORS, Kind, smoothed_residuals
from dyntune.errors import DyntuneError, InvalidArgumentError, NonFiniteError

KINDS: tuple[Kind, ...] = ("smooth", "debiased", "equal-mass", "binned")


def forecasts(rows: int, seed: int, power: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences like a classifier's, and what came true with their power as its chance."""
    rng = np.random.default_rng(seed)
    f = rng.beta(5, 1.2, rows)
    return f, rng.random(rows) < f**power


def test_binned_is_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(7) * 0.4, 900)
    y = rng.integers(0, 7, 900)
    theirs = metrics.multiclass_calibration_error(torch.tensor(p), torch.tensor(y), 7, n_bins=BINS, norm="l1")
    assert float(calibration_error(p, y, kind="binned")) == pytest.approx(float(theirs), abs=1e-6)
    f, came = forecasts(500, 1)
    theirs = metrics.binary_calibration_error(torch.tensor(f), torch.tensor(came.astype(int)), n_bins=BINS, norm="l1")
    assert float(calibration_error(f, came, kind="binned")) == pytest.approx(float(theirs), abs=1e-6)


def test_debiased_and_equal_mass_are_their_formulas() -> None:
    f, y = forecasts(600, 2, power=1.5)
    order = np.argsort(f)
    squares, absolute = 0.0, 0.0
    for part in np.array_split(order, BINS):  # no ties: 40 rows each
        gap, share = f[part].mean() - y[part].mean(), y[part].mean()
        squares += len(part) / 600 * (gap**2 - share * (1 - share) / (len(part) - 1))
        absolute += len(part) / 600 * abs(gap)
    ones = np.ones((1, 600))
    assert ESTIMATORS["debiased"](f, y, ones)[0] == pytest.approx(
        math.copysign(abs(squares) ** 0.5, squares), abs=1e-12
    )
    assert ESTIMATORS["equal-mass"](f, y, ones)[0] == pytest.approx(absolute, abs=1e-12)


def test_smooth_is_its_fixed_point_by_a_direct_sum() -> None:
    """Reflected Gaussians summed row by row on a grid of their own."""
    f, y = forecasts(80, 3, power=2.0)
    width = float(calibration_error(f, y, kind="smooth"))
    at = (np.arange(4000) + 0.5) / 4000
    images = np.concatenate([2 * k + s * f for k in (-1, 0, 1) for s in (1, -1)])
    kernel = np.exp(-0.5 * ((at[:, None] - images) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    residual = np.tile(y - f, 6)
    assert np.abs(kernel @ residual).mean() / 80 == pytest.approx(width, rel=2e-3)  # cells of 1/2048 against the sum
    total = smoothed_residuals(f, y.astype(float), width)[0].mean()
    assert total == pytest.approx((y - f).mean(), abs=1e-12)  # smoothing with reflection keeps the mass


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_repeated_rows(kind: Kind) -> None:
    f, y = forecasts(60, 4)
    times = np.random.default_rng(5).integers(0, 4, 60)
    twice = ESTIMATORS[kind](np.repeat(f, times), np.repeat(y, times).astype(float), np.ones((1, times.sum())))
    once = ESTIMATORS[kind](f, y.astype(float), times[None].astype(float))
    # Equal-mass edges are those of the rows given: of repeated rows they lie elsewhere.
    assert once[0] == pytest.approx(twice[0], abs=1e-9 if kind in ("smooth", "binned") else 0.06)


def test_a_constant_forecast_is_off_by_its_bias() -> None:
    y = np.arange(1000) % 10 < 3
    for kind in KINDS:
        # The squared form of debiased takes off the mean's own variance.
        close = 2e-3 if kind == "debiased" else 1e-6
        if kind == "smooth":  # the fixed point of a point mass: what is left of it within [0, 1] is all of it
            close = 1e-6
        assert abs(float(calibration_error(np.full(1000, 0.5), y, kind=kind))) == pytest.approx(0.2, abs=close)
        assert float(calibration_error(np.full(1000, 0.3), y, kind=kind)) <= 1e-6


def test_the_table_of_biases_under_perfect_calibration() -> None:
    """Means of 40 draws against those measured by others with 60; both sets vary by a few percent."""
    expected = {200: (0.062, 0.077, 0.044), 1000: (0.029, 0.034, 0.025)}
    for rows, means in expected.items():
        drawn = [forecasts(rows, seed) for seed in range(40)]
        for kind, mean in zip(("binned", "equal-mass", "smooth"), means, strict=True):
            values = [ESTIMATORS[kind](f, y.astype(float), np.ones((1, rows)))[0] for f, y in drawn]  # type: ignore[index]
            assert np.mean(values) == pytest.approx(mean, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_miscalibration_is_claimed_of_what_is_and_rarely_of_what_is_not(kind: Kind) -> None:
    """At most 5% by construction; of 100 draws up to 12 false ones in 99.8% of the time."""
    false = sum(
        calibration_error(*forecasts(200, s), kind=kind, num_resamples=59, seed=s).miscalibrated for s in range(100)
    )
    assert false <= 12
    right = sum(
        calibration_error(*forecasts(1000, s, 2.0), kind=kind, num_resamples=59).miscalibrated for s in range(20)
    )
    assert right == 20


def test_the_interval_holds_a_clear_error() -> None:
    """E|f - f^2| under Beta(5, 1.2) is the true smooth-less error, 0.134; smooth's own is a little above it."""
    found = [calibration_error(*forecasts(1000, s, 2.0), kind="debiased", num_resamples=99) for s in range(40)]
    truth = math.sqrt(np.mean((lambda f: (f - f**2) ** 2)(np.random.default_rng(0).beta(5, 1.2, 10**6))))
    covered = sum(truth in f.error for f in found)
    assert covered >= 34  # 95% nominal; below 34 of 40 has a chance of 0.3%
    assert not any(0.0 in f.error for f in found)


def test_classes_one_by_one_draw_one_class_for_each_row() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), 400)
    y = np.array([rng.choice(4, p=row) for row in p])
    found = calibration_error(p, y, classes="each")
    assert list(found.each) == ["class 0", "class 1", "class 2", "class 3"]
    assert float(found) == pytest.approx(np.mean([float(part) for part in found.each.values()]))
    assert not found.miscalibrated
    assert calibration_error(p[:, ::-1], y, classes="each").miscalibrated
    labels = rng.random((300, 3)) < 0.5
    many = calibration_error(np.full((300, 3), 0.5), labels.astype(int))
    assert list(many.each) == ["label 0", "label 1", "label 2"]
    assert not many.miscalibrated


def test_seeds_and_kinds_of_numbers() -> None:
    f, y = forecasts(300, 6)
    first, again = (calibration_error(f, y, seed=3) for _ in range(2))
    assert first.to_dict() == again.to_dict()
    state = torch.get_rng_state()
    as_tensor = calibration_error(torch.tensor(f, requires_grad=True), torch.tensor(y), seed=3)
    assert as_tensor.to_dict() == first.to_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert "not told from perfect" in str(first)


@pytest.mark.parametrize(
    ("p", "y", "error"),
    [
        ([], [], InvalidArgumentError),
        ([0.5, math.nan], [0, 1], NonFiniteError),
        ([1.5, 0.2], [0, 1], InvalidArgumentError),
        ([[0.7, 0.7]], [0], InvalidArgumentError),
        ([[0.7, 0.3]], [2], InvalidArgumentError),
        ([[0.7, 0.3]], [-100], InvalidArgumentError),
        ([[0.7, 0.3]], [0.5], InvalidArgumentError),
        ([0.7, 0.3], [0, 2], InvalidArgumentError),
        ([0.7, 0.3], [0], InvalidArgumentError),
        (["a"], [0], InvalidArgumentError),
    ],
)
def test_what_has_no_calibration(p: Any, y: Any, error: type[DyntuneError]) -> None:
    with pytest.raises(error):
        calibration_error(p, y)


def test_options_that_are_not() -> None:
    with pytest.raises(InvalidArgumentError, match="smooth, debiased"):
        calibration_error([0.5], [1], kind="ece")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="39"):
        calibration_error([0.5], [1], num_resamples=10)
    with pytest.raises(InvalidArgumentError, match="each"):
        calibration_error([0.5], [1], classes="all")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [200, 1000, 10_000])
def test_false_claims_over_two_thousand_draws(rows: int) -> None:
    """5% (+-1.5) for every kind but those of 10,000 rows, where two are enough."""
    for kind in KINDS if rows < 10_000 else ("smooth", "binned"):
        claims = [calibration_error(*forecasts(rows, s), kind=kind, num_resamples=99, seed=s) for s in range(2000)]
        share = np.mean([c.miscalibrated for c in claims])
        assert 0.035 <= share <= 0.065, (kind, share)
