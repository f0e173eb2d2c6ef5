"""A learning rate judged: real training at it on fresh seeds, beside the grid's best on the same seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lr import metrics
from benchmarks.lr.data import CACHE, digest
from benchmarks.lr.judge import VERSION, Run, train
from benchmarks.lr.scenario import Scenario
from benchmarks.lr.search import FRESH_SEEDS, SEEDS, Store, lr_of

SWEEPS = Path(__file__).resolve().parent / "results" / "sweeps.json"
JUDGED = CACHE / "judged.jsonl"


class StaleSweepError(Exception):
    """The committed sweep is of another definition of the scenario, or not finished."""


@dataclass(frozen=True)
class Sweep:
    """The brute force on one scenario, as committed.

    Args:
        best: The best LR for the training loss.
        best_val: For the validation loss.
        onset: The LR at which most of five seeds fail; None: none was found.
        runs: k -> seed -> run; lr = 2 ** (k / 4).
    """

    best: float
    best_val: float
    onset: float | None
    runs: dict[int, dict[int, Run]]

    def at(self, lr: float, seeds: Sequence[int] = FRESH_SEEDS) -> list[Run]:
        """The runs at a learning rate of the grid."""
        by_seed = self.runs[round(4 * math.log2(lr))]
        return [by_seed[seed] for seed in seeds]

    def curve(self, which: str = "train") -> metrics.Curve:
        """Learning rate -> clipped losses of the grid's seeds (one or two): for developing without training."""
        start = {"train": "initial", "val": "initial_val"}[which]
        return {
            lr_of(k): [metrics.clipped(getattr(run, which), getattr(run, start)) for run in found]
            for k, by_seed in self.runs.items()
            if (found := [by_seed[seed] for seed in SEEDS if seed in by_seed])
        }


def load_sweeps(path: Path = SWEEPS) -> dict[str, dict[str, Any]]:
    """The committed sweeps by name, as JSON."""
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())["scenarios"]
    return found


def sweep_of(scenario: Scenario, sweeps: dict[str, dict[str, Any]]) -> Sweep:
    """The sweep of a scenario, once it is complete and of this very definition.

    Data are compared for text alone: pydoc's changes with Python's version, the tables at most in their last bit.
    """
    row = sweeps.get(scenario.name, {})
    same = (row.get("scenario"), row.get("judge")) == (scenario.settings(), VERSION)
    same = same and (scenario.loss != "text" or row["data"] == digest(scenario.data_name))
    if not same or not {"best", "best_val", "onset"} <= row.keys():
        raise StaleSweepError(f"{scenario.name}: run `sweep.py --only '{scenario.name}'`, then `sweep.py --pack`.")
    runs = {
        int(k): {int(s): Run(*(math.inf if v is None else v for v in values)) for s, values in by_seed.items()}
        for k, by_seed in row["runs"].items()
    }
    onset = None if row["onset"] is None else lr_of(row["onset"])
    return Sweep(lr_of(row["best"]), lr_of(row["best_val"]), onset, runs)


@dataclass(frozen=True)
class Verdict:
    """What a learning rate is worth on one scenario.

    Args:
        lr: The learning rate; None for an optimizer that chooses its own.
        regret: On the training loss: 0 as good as the grid's best, 1 as bad as no training.
        regret_val: On the validation loss, beside the best LR for that.
        octaves: From the grid's best; None without `lr`.
        failed: Share of the seeds that failed.
    """

    lr: float | None
    regret: float
    regret_val: float
    octaves: float | None
    failed: float


def verdict_on(runs: Sequence[Run], sweep: Sweep, *, lr: float | None = None) -> Verdict:
    """Judge runs on ``FRESH_SEEDS``, in that order."""
    best, best_val = sweep.at(sweep.best), sweep.at(sweep.best_val)
    regret = metrics.regret([r.train for r in runs], [r.train for r in best], [r.initial for r in best])
    val = metrics.regret([r.val for r in runs], [r.val for r in best_val], [r.initial_val for r in best_val])
    floor = float(np.mean([run.train for run in best]))
    fails = [metrics.failure(r.train, r.peak, r.failed, initial=r.initial, best=floor) != metrics.OK for r in runs]
    distance = None if lr is None else metrics.octaves(lr, sweep.best)
    return Verdict(lr, regret, val, distance, float(np.mean(fails)))


class Judge:
    """Verdicts on learning rates; every run is recorded, so that the same question costs nothing twice."""

    def __init__(self, sweeps: Path = SWEEPS, judged: Path = JUDGED) -> None:
        self.sweeps, self.store = load_sweeps(sweeps), Store(judged)

    def verdict(self, scenario: Scenario, lr: float) -> Verdict:
        """Train at `lr` (the first group's, at the peak) on every fresh seed."""
        sweep = sweep_of(scenario, self.sweeps)
        digest = f"{scenario.digest()}-{VERSION}"
        known = self.store.runs.setdefault(digest, {})
        for seed in FRESH_SEEDS:
            if (lr, seed) not in known:
                run = train(scenario, lr, seed)
                row = {"scenario": scenario.name, "digest": digest, "k": lr, "seed": seed, "seconds": 0.0}
                self.store.add(row | {"run": dataclasses.astuple(run)})
                known[lr, seed] = run
        return verdict_on([known[lr, seed] for seed in FRESH_SEEDS], sweep, lr=lr)
