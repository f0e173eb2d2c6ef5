"""SAC's temperature: the coupled map against its iteration, and entropies that no policy has."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dyntune.errors import InvalidArgumentError
from dyntune.rl import TemperatureMap, feasible_entropy

# eta, eta_a, alpha, stable: on both sides of both conditions
CASES = [
    (0.05, 1.9, 1.0, True),
    (0.05, 2.1, 1.0, False),
    (1.2, 1.0, 1.0, True),
    (1.2, 0.3, 1.0, False),
    (0.5, 0.1, 2.0, True),
    (1.1, 0.1, 1.0, False),
    (0.01, 0.001, 1.0, True),
]


def grows(lr: float, alpha_lr: float, alpha: float, steps: int) -> bool:
    """The Gaussian arm itself: log std and log alpha, both moved at once from beside the fixed point."""
    k = alpha  # then the fixed point has log std 0
    target = 0.0
    log_std, log_alpha = 1e-7, math.log(alpha)
    reach = []
    for _ in range(steps):
        a = math.exp(log_alpha)
        gradient = -k * math.exp(2 * log_std) + a
        log_std, log_alpha = log_std + lr * gradient, log_alpha - alpha_lr * (log_std - target)
        reach.append(math.hypot(log_std, log_alpha - math.log(alpha)))
        if reach[-1] > 1:  # beyond where the map is linear, and a million times where it began
            return True
    return max(reach[-steps // 10 :]) > max(reach[: steps // 10])


@pytest.mark.parametrize(("lr", "alpha_lr", "alpha", "stable"), CASES)
def test_stability_is_that_of_the_iteration(lr: float, alpha_lr: float, alpha: float, stable: bool) -> None:
    found = TemperatureMap(lr=lr, alpha_lr=alpha_lr, alpha=alpha)
    assert found.stable is stable
    assert (found.radius < 1) is stable
    steps = 400
    while stable and found.radius**steps > 0.1:
        steps *= 2
    assert grows(lr, alpha_lr, alpha, steps) is not stable


def test_small_temperatures_oscillate() -> None:
    slow = TemperatureMap(lr=0.1, alpha_lr=0.1, alpha=0.01)
    assert slow.oscillates
    assert slow.period == pytest.approx(2 * math.pi / math.sqrt(0.1 * 0.1 * 0.01), rel=0.02)
    quick = TemperatureMap(lr=0.1, alpha_lr=0.01, alpha=1.0)
    assert not quick.oscillates
    assert quick.period == math.inf
    assert np.isreal(np.linalg.eigvals(quick.jacobian)).all()


def test_targets_that_no_policy_has() -> None:
    assert feasible_entropy(0.98 * math.log(2), actions=2) == (True, pytest.approx(math.log(2)))
    assert feasible_entropy(math.log(4), actions=4)[0] is False
    assert feasible_entropy(-6.0, dimensions=6)[0] is True
    assert feasible_entropy(-1.0, dimensions=1, scale=0.18)[0] is False  # below exp(-1) / 2
    assert feasible_entropy(-1.0, dimensions=1, scale=0.19)[0] is True
    for wrong in ({}, {"actions": 2, "dimensions": 1}, {"actions": 0}, {"dimensions": 1, "scale": 0.0}):
        with pytest.raises(InvalidArgumentError):
            feasible_entropy(0.0, **wrong)
    with pytest.raises(InvalidArgumentError, match="alpha_lr=0"):
        TemperatureMap(lr=1.0, alpha_lr=0.0, alpha=1.0)
