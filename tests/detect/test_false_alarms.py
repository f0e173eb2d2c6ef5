"""False alarms of the default detectors on series that nothing is wrong with, and alarms where something is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dyntune.detect import default_detectors
from dyntune.monitor.alerts import Alert
from tests.detect.series import NOISE, alarms, rows_of

RUN = 20_000
SCALES = (0.02, 0.3)  # of the logarithm of the loss: full batches, and batches of two


def run_of(noise: str, scale: float, seed: int, *, jump: float = 1.0) -> list[Alert]:
    """A run whose loss and gradient norm scatter, and whose loss falls; `jump`: a factor on both from 15,000 on."""
    rng = np.random.default_rng(seed)
    fall = 1.0 / np.sqrt(1.0 + np.arange(RUN) / 50.0)
    factor = np.where(np.arange(RUN) >= 15_000, jump, 1.0)
    columns = {
        "train/loss": (0.3 + 2.0 * fall) * np.exp(scale * NOISE[noise](RUN, rng)) * factor,
        "grad/norm": np.exp(scale * NOISE[noise](RUN, rng)) * factor,
        "train/lr": np.full(RUN, 0.1),
    }
    return alarms(default_detectors(), rows_of(columns))


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISE)
def test_at_most_one_false_critical_alarm_in_100_000_steps(noise: str) -> None:
    """Two million steps of each kind of noise, in runs of 20,000 and of two scales."""
    counts: Counter[str] = Counter()
    for seed in range(100):
        counts.update(alert.severity for alert in run_of(noise, SCALES[seed % 2], seed))
    # At the allowed rate of 1 in 100,000 there are 20 in 2,000,000, and 11 or fewer in 2% of trials.
    assert counts["critical"] <= 11
    # Warnings are made for at most that rate by one detector.
    assert counts["warning"] <= 20


@pytest.mark.parametrize("noise", NOISE)
def test_a_jump_that_lasts_is_found(noise: str) -> None:
    found = [alert for alert in run_of(noise, 0.1, 0, jump=12.0) if alert.severity == "critical"]
    assert found
    assert all(15_000 <= alert.step < 15_300 for alert in found)
