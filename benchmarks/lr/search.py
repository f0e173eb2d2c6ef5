"""Where the best learning rate and the onset of failure lie, by training: adaptive grids over recorded runs.

A learning rate is an integer `k`, in quarter octaves: lr = 2 ** (k / 4). Every run that is asked for is looked up
first, so a search that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lr.judge import VERSION, Run, train
from benchmarks.lr.metrics import OK, clipped, failure, onset
from benchmarks.lr.scenario import ADAPTIVE, Scenario
from benchmarks.lr.scenarios import SCENARIOS

COARSE, OCTAVE, FINE = 8, 4, 2  # factors of 4, 2 and sqrt(2)
REACH = 6  # the finest grid goes 1.5 octaves either side of the best
FARTHEST = 56  # 14 octaves from the best: a side without an end is left at that
WORSE_ABOVE, WORSE_BELOW = 0.2, 0.1  # regrets at which the coarse grid has seen enough of a side
SEEDS = (0, 1)
ONSET_SEEDS = (0, 1, 2, 3, 4)
FRESH_SEEDS = (100, 101, 102, 103, 104)  # for the grid's winners, and for whatever is judged against them

# Where the coarse grid begins; it moves to where the losses lead it.
FIRST = {"sgd": 0.1, "momentum": 0.02, "nesterov": 0.02, "rmsprop": 2e-3}
FIRST_ADAM = 4e-3


Train = Callable[[Any, float, int], Run]


def lr_of(k: float) -> float:
    return float(2.0 ** (k / 4))


class Store:
    """Runs, and what was found from them, in a file of JSON lines; a line that a kill cut short is passed over."""

    def __init__(self, path: Path, kind: type[Run] = Run) -> None:
        self.path = path
        self.runs: dict[str, dict[tuple[float, int], Run]] = {}  # by definition, then (k or LR, seed)
        self.found: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0  # CPU time of all recorded runs
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
                if "found" in row:
                    self.found.setdefault(row["digest"], {}).update(row["found"])
                else:
                    self.runs.setdefault(row["digest"], {})[row["k"], row["seed"]] = kind(*row["run"])
                    self.seconds += row["seconds"]
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, under a lock, on a line of its own even where the last one was cut short."""
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, 2)
            if end:
                file.seek(end - 1)
            cut = end > 0 and file.read(1) != b"\n"
            file.write(b"\n" * cut + json.dumps(row).encode() + b"\n")


class Runs:
    """The runs of one scenario: looked up, or trained and recorded."""

    def __init__(self, scenario: Scenario, store: Store, *, version: int = VERSION, train: Train = train) -> None:
        self.scenario, self.store, self.train = scenario, store, train
        self.digest = f"{scenario.digest()}-{version}"
        self.known = store.runs.setdefault(self.digest, {})
        self.found = store.found.setdefault(self.digest, {})

    def run(self, k: float, seed: int) -> Run:
        if (k, seed) not in self.known:
            began = time.process_time()
            run = self.train(self.scenario, lr_of(k), seed)
            row = {"scenario": self.scenario.name, "digest": self.digest, "k": k, "seed": seed}
            row |= {"run": dataclasses.astuple(run), "seconds": round(time.process_time() - began, 4)}
            self.store.add(row)
            self.known[k, seed] = run
        return self.known[k, seed]

    def conclude(self, **found: Any) -> None:
        self.store.add({"scenario": self.scenario.name, "digest": self.digest, "found": found})
        self.found.update(found)

    def loss(self, k: float, seeds: tuple[int, ...], which: str = "train") -> float:
        """Mean over seeds of the clipped loss, ``"train"`` or ``"val"``."""
        runs = [self.run(k, seed) for seed in seeds]
        start = {"train": "initial", "val": "initial_val"}[which]
        return float(np.mean([clipped(getattr(run, which), getattr(run, start)) for run in runs]))

    def both(self) -> list[int]:
        """The learning rates that were trained with all of ``SEEDS``."""
        return sorted(k for k in {k for k, _ in self.known} if all((k, seed) in self.known for seed in SEEDS))


def first(scenario: Scenario) -> int:
    lr = FIRST.get(scenario.optimizer, FIRST_ADAM)
    if scenario.optimizer not in ADAPTIVE:
        lr /= scenario.loss_scale
    return COARSE * round(4 * math.log2(lr) / COARSE)


def coarse(runs: Runs) -> int:
    """Factor 4 with one seed: until the best is inside, and both sides are clearly worse."""
    start = first(runs.scenario)
    ks = {start - COARSE, start, start + COARSE}
    while True:
        losses = {k: runs.loss(k, SEEDS[:1]) for k in sorted(ks)}
        best = min(losses, key=lambda k: losses[k])
        low, high = min(ks), max(ks)
        room = runs.run(best, 0).initial - losses[best]
        if high == best or (losses[high] - losses[best] < WORSE_ABOVE * room and high - best < FARTHEST):
            step = high + COARSE
        elif low == best or (losses[low] - losses[best] < WORSE_BELOW * room and best - low < FARTHEST):
            step = low - COARSE
        else:
            return best
        if room <= 0:  # everything fails: the best is farther down
            step = low - COARSE
        if abs(step - start) > 2 * FARTHEST:
            raise RuntimeError(f"{runs.scenario.name}: no learning rate trains")
        ks.add(step)


def grid(runs: Runs) -> None:
    """The best learning rates: factors 4, 2, then sqrt(2) with two seeds, until the best has its neighbourhood filled.

    For the validation loss, the finest grid is carried on until its best is inside, too.
    """
    if "best" in runs.found:
        return
    best = coarse(runs)
    octaves = [best - COARSE, best - OCTAVE, best, best + OCTAVE, best + COARSE]
    best = min(octaves, key=lambda k: runs.loss(k, SEEDS[:1]))
    for _ in range(8):
        for k in range(best - REACH, best + REACH + 1, FINE):
            runs.loss(k, SEEDS)
        if winner(runs) == best:
            break
        best = winner(runs)
    for _ in range(4):
        ks, best_val = runs.both(), winner(runs, "val")
        if best_val not in (ks[0], ks[-1]):
            break
        runs.loss(best_val + (FINE if best_val == ks[-1] else -FINE), SEEDS)
    runs.conclude(best=winner(runs), best_val=winner(runs, "val"))


def winner(runs: Runs, which: str = "train") -> int:
    """The grid's best by the mean over ``SEEDS``."""
    return min(runs.both(), key=lambda k: runs.loss(k, SEEDS, which))


def rerun(runs: Runs) -> None:
    """The grid's winners, for training and for validation loss, once more on fresh seeds."""
    for k in (runs.found["best"], runs.found["best_val"]):
        runs.loss(k, FRESH_SEEDS)


def failure_onset(runs: Runs) -> None:
    """The smallest learning rate, to a quarter octave, at which most of five seeds fail; None: none found.

    Monotone failure is assumed between the best and the first failing rate above.
    """
    if "onset" in runs.found:
        return
    best = runs.found["best"]
    floor = runs.loss(best, SEEDS)

    def fails_once(k: int, seed: int) -> bool:
        run = runs.run(k, seed)
        return failure(run.train, run.peak, run.failed, initial=run.initial, best=floor) != OK

    def fails(k: int) -> bool:
        count = 0
        for done, seed in enumerate(ONSET_SEEDS, start=1):  # no more seeds than settle it
            count += fails_once(k, seed)
            if 2 * max(count, done - count) > len(ONSET_SEEDS):
                break
        return 2 * count > len(ONSET_SEEDS)

    seen = sorted(k for k, seed in runs.known if seed == 0 and k > best)
    low, high = best, next((k for k in seen if fails_once(k, 0)), max([best, *seen]) + COARSE)
    low = max([best, *(k for k in seen if k < high)])
    while not fails(high):
        if high - best > FARTHEST:
            runs.conclude(onset=None)
            return
        low, high = high, high + FINE
    while low > best and fails(low):
        low, high = max(best, low - FINE), low
    runs.conclude(onset=onset(fails, low, high))


STAGES: dict[str, tuple[Callable[[Runs], None], ...]] = {
    "grid": (grid, rerun),
    "onset": (grid, rerun, failure_onset),
}


def work(name: str, stage: str, path: Path) -> str:
    """One stage of one scenario, in this process; a line that says what was found."""
    runs = Runs(SCENARIOS[name], Store(path))
    before, began = len(runs.known), time.process_time()
    try:
        for step in STAGES[stage]:
            step(runs)
    except RuntimeError as error:
        return f"{stage} {name}: {error}"
    found = {key: None if k is None else float(f"{lr_of(k):.3g}") for key, k in runs.found.items()}
    return f"{stage} {name}: {found}, {len(runs.known) - before} new runs, {time.process_time() - began:.0f} s"
