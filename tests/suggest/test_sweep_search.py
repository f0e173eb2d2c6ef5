"""The search of a sweep, on curves that are known: it finds optimum and onset, and its interval covers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from dyntune.suggest.sweep_search import SweepFound, SweepSearch, nearest, rate_of

Curve = Callable[[float], float]
INITIAL = 2.3


def steep(z: float) -> float:
    """Falls slowly as the rate rises, then explodes; lowest at z = 0, where it is 0.19."""
    return float(0.15 * np.exp(-0.8 * z) + 0.04 * np.exp(3 * z))


def gentle(z: float) -> float:
    return float(0.3 * np.exp(-0.5 * z) + 0.1 * np.exp(1.5 * z))


class Trainings:
    """Final losses by a formula, with a height of its own for each seed, and noise.

    Args:
        curve: Mean loss by octaves above the best rate.
        optimum: log2 of the best rate.
        onset: log2 of the lowest rate that fails.
        noise: Standard deviation of each training, beyond that of its seed.
        draw: Seed of all noise.
    """

    def __init__(self, curve: Curve, *, optimum: float, onset: float, noise: float = 0.0, draw: int = 0) -> None:
        self.curve, self.optimum, self.onset, self.noise, self.draw = curve, optimum, onset, noise, draw
        self.asked: list[tuple[float, int]] = []

    def __call__(self, asked: Sequence[tuple[float, int]]) -> Mapping[tuple[float, int], float]:
        self.asked += asked
        return {key: self.loss(*key) for key in asked}

    def loss(self, rate: float, seed: int) -> float:
        octaves = math.log2(rate)
        if octaves >= self.onset:
            return math.inf
        height = np.random.default_rng([self.draw, seed]).normal(0, 5 * self.noise)
        own = np.random.default_rng([self.draw, seed, round(1e6 * octaves) % 2**32]).normal(0, self.noise)
        return self.curve(octaves - self.optimum) + height + own

    def first_failure(self, floor: float) -> float:
        """The lowest rate that is stopped or ends above the midpoint, to a ten-thousandth of an octave."""
        octaves = np.arange(self.optimum, self.optimum + 20, 1e-4)
        return 2.0 ** next(
            z for z in octaves if z >= self.onset or self.curve(z - self.optimum) > (INITIAL + floor) / 2
        )


def search(trainings: Trainings, *, start: float = 1.0, seeds: int = 3, factor: float = math.sqrt(2)) -> SweepFound:
    return SweepSearch(trainings, initial=INITIAL, seeds=seeds, onset_factor=factor).run(start)


@pytest.mark.parametrize("start", [2.0**-9, 2.0**-3, 1.0, 2.0**6])
@pytest.mark.parametrize("curve", [steep, gentle])
def test_optimum_and_onset_are_found_from_anywhere(curve: Curve, start: float) -> None:
    trainings = Trainings(curve, optimum=-3.3, onset=-1.63)
    found = search(trainings, start=start)
    assert found.best == rate_of(-7)  # the grid's nearest to -3.3 is -3.5
    assert found.inside
    assert found.optimum is not None
    assert found.optimum.low <= -3.3 <= found.optimum.high
    # Without noise only the shape is off: a cubic through 3 octaves of a sum of exponentials, measured at most 0.14.
    assert found.optimum.value == pytest.approx(-3.3, abs=0.2)
    assert found.survives is not None
    assert found.fails is not None
    assert found.survives < trainings.first_failure(found.curve[found.best]) <= found.fails
    assert found.fails / found.survives <= math.sqrt(2) * (1 + 1e-9)
    assert len(trainings.asked) == len(set(trainings.asked))


@pytest.mark.parametrize("factor", [2.0, 2.0**0.25, 1.05])
def test_the_onset_is_bracketed_as_closely_as_asked(factor: float) -> None:
    found = search(Trainings(gentle, optimum=-3.3, onset=-1.9), factor=factor)
    assert found.survives < 2.0**-1.9 <= found.fails  # type: ignore[operator]
    assert found.fails / found.survives <= factor * (1 + 1e-9)  # type: ignore[operator]


def test_the_grid_does_not_depend_on_the_start() -> None:
    rates = [
        {rate for rate, _ in trainings.asked}
        for start in (0.11, 0.13)
        if (trainings := Trainings(gentle, optimum=-3.3, onset=0.77)) and search(trainings, start=start)
    ]
    assert rates[0] == rates[1]
    assert nearest(rate_of(-7)) == -7


def test_every_seed_is_compared_on_the_same_rates() -> None:
    trainings = Trainings(gentle, optimum=-3.3, onset=0.77)
    found = search(trainings, seeds=4)
    near = [rate for rate in found.curve if abs(math.log2(rate / found.best)) < 1.6]  # type: ignore[operator]
    assert len(near) == 7
    assert all((rate, seed) in trainings.asked for rate in near for seed in range(4))


def test_a_side_without_an_end_is_left_at_that() -> None:
    found = search(Trainings(lambda z: 0.1 + 0.02 * abs(z), optimum=0.0, onset=math.inf))
    assert found.fails is None
    assert found.survives is not None
    assert found.survives > 2.0**14
    falling = search(Trainings(lambda z: 1 / (1 + 2.0**z), optimum=0.0, onset=math.inf))
    assert not falling.inside


def test_where_no_rate_lowers_the_loss_there_is_no_best() -> None:
    for curve in (lambda z: INITIAL, lambda z: math.inf, lambda z: INITIAL + 1):
        found = search(Trainings(curve, optimum=0.0, onset=math.inf))
        assert (found.best, found.optimum, found.survives, found.fails) == (None, None, None, None)


@pytest.mark.parametrize(("failing", "seeds", "fails"), [((0,), 3, False), ((1, 2), 3, True), ((1,), 2, True)])
def test_at_least_half_of_the_seeds_decide(failing: tuple[int, ...], seeds: int, fails: bool) -> None:
    """One octave above the best some seeds fail, three octaves above all."""
    whole = Trainings(lambda z: 0.1 + 0.05 * z**2, optimum=0.0, onset=3.0)

    def ask(asked: Sequence[tuple[float, int]]) -> Mapping[tuple[float, int], float]:
        return {
            (rate, seed): math.inf if rate >= 2 and seed in failing else whole.loss(rate, seed) for rate, seed in asked
        }

    found = SweepSearch(ask, initial=INITIAL, seeds=seeds, onset_factor=math.sqrt(2)).run(1.0)
    assert found.fails is not None
    assert (found.fails == 2.0) == fails
    assert fails or found.survives < 8.0 <= found.fails * (1 + 1e-9)  # type: ignore[operator]


def test_an_end_above_the_midpoint_is_a_failure() -> None:
    found = search(Trainings(lambda z: 0.3 if z < 2 else 1.31, optimum=0.0, onset=math.inf))
    assert found.survives < 4.0 <= found.fails  # type: ignore[operator]
    assert found.survives > 2.0  # type: ignore[operator]
    without = search(Trainings(lambda z: 0.3 if z < 2 else 1.29, optimum=0.0, onset=math.inf))
    assert without.fails is None


@pytest.mark.slow  # half a minute together
@pytest.mark.parametrize("noise", [0.002, 0.01])
@pytest.mark.parametrize("curve", [steep, gentle])
@pytest.mark.parametrize("seeds", [2, 3])
def test_the_interval_covers_though_noise_chose_its_window(curve: Curve, noise: float, seeds: int) -> None:
    """300 whole searches. At 95%, 300 draws give 0.92 or more in 99% of cases."""
    best = min(np.linspace(-1, 1, 20001), key=curve)
    rng = np.random.default_rng(1)
    covered = total = 0
    for draw in range(300):
        optimum = rng.uniform(-4, -3)
        found = search(Trainings(curve, optimum=optimum, onset=optimum + 2.2, noise=noise, draw=draw), seeds=seeds)
        if found.optimum is not None and found.inside:  # OK or UNCERTAIN with an interval
            total += 1
            covered += found.optimum.low <= optimum + best <= found.optimum.high
    assert total >= 0.9 * 300
    assert covered >= 0.92 * total
