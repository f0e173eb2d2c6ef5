"""Where the best rate and the onset of failure lie: a search over a grid of half octaves that asks for trainings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dyntune.numerics.optimum import FEWEST, Optimum, cubic_optimum

__all__ = ["LEVEL", "SweepFound", "SweepSearch", "nearest", "rate_of"]

# Half octaves: factors of four and two with one seed, then of sqrt(2) with all (as in benchmarks/lr/search.py).
COARSE, OCTAVE, FINE = 4, 2, 1
REACH = 3  # 1.5 octaves either side of the best are filled before a curve is fitted
FARTHEST = 28  # 14 octaves from where it began: a side without an end is left at that
MOVES = 8  # of the finest grid; a noisy curve could lead it on for ever
LEVEL = 0.95


def rate_of(k: float) -> float:
    """The rate of a grid point: ``2 ** (k / 2)``, the same number on every machine."""
    return float(2.0 ** (k / 2))


def nearest(rate: float) -> int:
    """The grid point nearest to a rate."""
    return round(2 * math.log2(rate))


@dataclass(frozen=True)
class SweepFound:
    """What a search found; rates are peak rates of the first parameter group.

    Args:
        best: The grid's best by the mean over all seeds; None where no rate lowered the loss.
        inside: Whether rates on both sides of it were worse.
        optimum: Of the curve through the survivors near it, in log2 of the rate; None where that has none.
        fitted: How many rates it is through.
        capped: Whether these end below a rate that failed.
        survives: Highest rate below the onset at which most seeds did not fail.
        fails: Lowest rate found at which most did; None where none was found.
        curve: Mean clipped loss by rate, over the seeds that were trained.
        failed: Rates at which most of the seeds that were trained failed.
    """

    best: float | None
    inside: bool
    optimum: Optimum | None
    fitted: int
    capped: bool
    survives: float | None
    fails: float | None
    curve: Mapping[float, float]
    failed: tuple[float, ...]


class SweepSearch:
    """Asks for trainings until best rate and onset are bracketed.

    A training fails that was stopped at a blow-up, or ends above the midpoint of the initial loss and the best one. Its
    loss is clipped at the initial one: a rate cannot do worse than not to train at all.

    Args:
        ask: ``[(rate, seed), ...] -> {(rate, seed): final loss}``, infinite where it was stopped.
        initial: Loss before training.
        seeds: How many; every rate is compared on the same ones.
        onset_factor: The onset is bisected until failing and surviving rate differ by this factor at most, > 1.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[tuple[float, int]]], Mapping[tuple[float, int], float]],
        *,
        initial: float,
        seeds: int,
        onset_factor: float,
    ) -> None:
        self._ask = ask
        self._initial = initial
        self._seeds = range(seeds)
        self._onset_factor = onset_factor
        self._losses: dict[tuple[float, int], float] = {}

    def run(self, start: float) -> SweepFound:
        """Search from a rate.

        Args:
            start: Where it begins; the grid is the same for every start.
        """
        best = self._coarse(nearest(start))
        if self._loss(best, 0) >= self._initial:
            return self._found(None, inside=False, optimum=None, fitted=0, capped=False, survives=None, fails=None)
        best = self._best(best, OCTAVE)
        best = self._fine(best)
        if not self._mean(best) < self._initial:
            return self._found(None, inside=False, optimum=None, fitted=0, capped=False, survives=None, fails=None)
        window = [best + step for step in range(-REACH, REACH + 1)]
        floor = self._mean(best)
        inside = best not in (window[0], window[-1]) and all(self._mean(best + s) > floor for s in (-FINE, FINE))
        alive = [k for k in window if not any(self._failed(rate_of(k), seed, floor) for seed in self._seeds)]
        optimum = None
        if len(alive) >= FEWEST:
            rows = [[self._losses[rate_of(k), seed] for k in alive] for seed in self._seeds]
            optimum = cubic_optimum([k / 2 for k in alive], rows, level=LEVEL)
        survives, fails = self._onset(best, floor)
        capped = bool(alive) and alive[-1] < window[-1] and fails is not None
        return self._found(
            best, inside=inside, optimum=optimum, fitted=len(alive), capped=capped, survives=survives, fails=fails
        )

    # -- the best rate -----------------------------------------------------------------------------------------------

    def _learn(self, rates: Sequence[float], seeds: Sequence[int]) -> None:
        asked = [(rate, seed) for rate in rates for seed in seeds if (rate, seed) not in self._losses]
        if asked:
            self._losses |= self._ask(asked)

    def _loss(self, k: int, seed: int) -> float:
        return min(self._losses[rate_of(k), seed], self._initial)

    def _mean(self, k: int) -> float:
        return float(np.mean([self._loss(k, seed) for seed in self._seeds]))

    def _coarse(self, start: int) -> int:
        """Factors of four, one seed: until the best has worse rates on both sides."""
        low, high = start - COARSE, start + COARSE
        while True:
            ks = range(low, high + 1, COARSE)
            self._learn([rate_of(k) for k in ks], self._seeds[:1])
            best = min(ks, key=lambda k: (self._loss(k, 0), k))
            if self._loss(best, 0) >= self._initial:  # nothing trains: too high where a blow-up says so, else too low
                if math.isinf(self._losses[rate_of(high), 0]):
                    low -= COARSE
                else:
                    high += COARSE
            elif best == high:
                high += COARSE
            elif best == low:
                low -= COARSE
            else:
                return best
            if max(start - low, high - start) > FARTHEST:
                return best

    def _best(self, middle: int, step: int) -> int:
        """The best of three, one seed."""
        ks = (middle - step, middle, middle + step)
        self._learn([rate_of(k) for k in ks], self._seeds[:1])
        return min(ks, key=lambda k: (self._loss(k, 0), k))

    def _fine(self, best: int) -> int:
        """Factors of sqrt(2), all seeds: until the best is in the middle of what is filled around it."""
        for _ in range(MOVES):
            ks = range(best - REACH, best + REACH + 1)
            self._learn([rate_of(k) for k in ks], self._seeds)
            winner = min(ks, key=lambda k: (self._mean(k), k))
            if winner == best:
                break
            best = winner
        else:
            self._learn([rate_of(k) for k in range(best - REACH, best + REACH + 1)], self._seeds)
        return best

    # -- the onset of failure ----------------------------------------------------------------------------------------

    def _failed(self, rate: float, seed: int, floor: float) -> bool:
        loss = self._losses[rate, seed]
        return not math.isfinite(loss) or loss > (self._initial + floor) / 2

    def _fails(self, rate: float, floor: float) -> bool:
        """Whether at least half of the seeds fail; no more of them are trained than settle it."""
        half = math.ceil(len(self._seeds) / 2)
        self._learn([rate], self._seeds[:half])
        count = sum(self._failed(rate, seed, floor) for seed in self._seeds[:half])
        even = 2 * half == len(self._seeds)  # then the other half alone could still make it half
        if count < half and (count > 0 or even):
            self._learn([rate], self._seeds)
            count = sum(self._failed(rate, seed, floor) for seed in self._seeds)
        return 2 * count >= len(self._seeds)

    def _onset(self, best: int, floor: float) -> tuple[float, float | None]:
        """The bracket of the onset above the best: monotone failure is assumed."""
        low, high = rate_of(best), None
        for rate in sorted(rate for rate, seed in self._losses if seed == 0 and rate > low):
            suspect = self._failed(rate, 0, floor) or (rate, self._seeds[-1]) in self._losses
            if suspect and self._fails(rate, floor):
                high = rate
                break
            low = rate
        while high is None:
            if low > rate_of(best + FARTHEST):
                return low, None
            above = low * rate_of(OCTAVE)
            if self._fails(above, floor):
                high = above
            else:
                low = above
        # A hair more than the factor: three bisections of an octave leave it up to rounding.
        while high / low > self._onset_factor * (1 + 1e-9):
            middle = math.sqrt(low * high)
            if self._fails(middle, floor):
                high = middle
            else:
                low = middle
        return low, high

    def _found(
        self,
        best: int | None,
        *,
        inside: bool,
        optimum: Optimum | None,
        fitted: int,
        capped: bool,
        survives: float | None,
        fails: float | None,
    ) -> SweepFound:
        curve, failed = {}, []
        floor = self._initial if best is None else self._mean(best)
        for rate in sorted({rate for rate, _ in self._losses}):
            seeds = [seed for seed in self._seeds if (rate, seed) in self._losses]
            curve[rate] = float(np.mean([min(self._losses[rate, seed], self._initial) for seed in seeds]))
            if 2 * sum(self._failed(rate, seed, floor) for seed in seeds) >= len(seeds):
                failed.append(rate)
        return SweepFound(
            best=None if best is None else rate_of(best),
            inside=inside,
            optimum=optimum,
            fitted=fitted,
            capped=capped,
            survives=survives,
            fails=fails,
            curve=curve,
            failed=tuple(failed),
        )
