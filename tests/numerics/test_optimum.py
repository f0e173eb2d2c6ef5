"""The minimum of a noisy curve: exact without noise, and its interval covers as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from dyntune.numerics.optimum import RESOLUTION, Optimum, cubic_optimum

HALF_OCTAVES = np.arange(7) / 2 - 1.5


def found(x: np.ndarray, y: np.ndarray, level: float = 0.95) -> Optimum:
    result = cubic_optimum(x, y, level=level)
    assert result is not None
    return result


@pytest.mark.parametrize("shape", [lambda z: 0.3 * z**2, lambda z: 0.3 * z**2 + 0.05 * z**3])
def test_without_noise_it_is_the_minimum(shape) -> None:
    y = np.stack([shape(HALF_OCTAVES - 0.2) + offset for offset in (0.0, 5.0, -3.0)])
    result = found(HALF_OCTAVES, y)
    spacing = 3 / (RESOLUTION - 1)
    assert result.value == pytest.approx(0.2, abs=1e-4)  # between two points of the grid the derivative is a line
    assert result.low <= 0.2 <= result.high
    assert result.high - result.low <= 4 * spacing
    assert result.height == pytest.approx(np.mean([0.0, 5.0, -3.0]), abs=1e-3)
    assert result.bounded_below
    assert result.bounded_above


def test_moving_stretching_and_lifting_move_stretch_and_change_nothing() -> None:
    rng = np.random.default_rng(0)
    y = 0.1 * HALF_OCTAVES**2 + rng.normal(0, 0.01, (3, 7))
    one = found(HALF_OCTAVES, y)
    moved = found(3 * HALF_OCTAVES - 7, 11 * y + rng.normal(0, 100, (3, 1)))
    # Rounding of a grid and of sums around 100.
    assert (moved.value, moved.low, moved.high) == pytest.approx(
        (3 * one.value - 7, 3 * one.low - 7, 3 * one.high - 7), abs=1e-6
    )


def test_a_curve_without_a_minimum_has_none() -> None:
    assert cubic_optimum(HALF_OCTAVES, [np.exp(-HALF_OCTAVES)], level=0.95) is None
    assert cubic_optimum(HALF_OCTAVES, [-(HALF_OCTAVES**2)], level=0.95) is None


def test_noise_that_hides_the_minimum_leaves_it_unbounded() -> None:
    rng = np.random.default_rng(1)
    results = [
        cubic_optimum(HALF_OCTAVES, 0.01 * HALF_OCTAVES**2 + rng.normal(0, 0.3, (3, 7)), level=0.95) for _ in range(50)
    ]
    assert not any(r.bounded_below and r.bounded_above for r in results if r is not None)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="4 points"):
        cubic_optimum(HALF_OCTAVES[:4], np.zeros((2, 4)), level=0.95)


CURVES = {
    "parabola": lambda z: 0.05 * z**2,
    "skewed": lambda z: 0.05 * z**2 + 0.015 * z**3,
    # A loss that falls as a power of the rate and explodes as another: as steep as trainings are, and no cubic.
    "steep": lambda z: 0.15 * np.exp(-0.8 * z) + 0.15 * 0.8 / 3 * np.exp(3 * z),
    "gentle": lambda z: 0.3 * np.exp(-0.5 * z) + 0.1 * np.exp(1.5 * z),
}


@pytest.mark.slow  # twenty seconds together
@pytest.mark.parametrize("rows", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.003, 0.02])
@pytest.mark.parametrize("tilt", [0.0, 0.01])
@pytest.mark.parametrize("curve", CURVES)
def test_the_interval_covers_as_often_as_it_says(curve: str, tilt: float, noise: float, rows: int) -> None:
    """400 draws each, a row having a height and a tilt of its own. At 95%, 0.925 or more in 98.5% of such cases."""
    rng = np.random.default_rng([rows, round(1e4 * noise), round(1e4 * tilt), *curve.encode()])
    covered = 0
    for _ in range(400):
        truth = rng.uniform(-0.25, 0.25)
        y = CURVES[curve](HALF_OCTAVES - truth) + rng.normal(0, 0.2, (rows, 1))
        y = y + rng.normal(0, tilt, (rows, 1)) * HALF_OCTAVES + rng.normal(0, noise, (rows, 7))
        result = cubic_optimum(HALF_OCTAVES, y, level=0.95)
        covered += result is not None and result.low <= truth <= result.high
    assert covered >= 0.925 * 400
