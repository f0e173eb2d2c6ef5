"""Strengths of mild, medium and severe faults, by measured harm.

    python benchmarks/faults/calibrate.py [--only GLOB] [--jobs N]      # resumable; .cache/calibration: a file a cell
    python benchmarks/faults/calibrate.py --pack                        # writes results/severities.json
    python benchmarks/faults/calibrate.py --table                       # prints it

For every cell a grid of strengths is tried on one seed and refined where a severity's band of harm (`harm.py`) was
stepped over; what is chosen is confirmed on a second seed. A severity that no strength reaches is left out: the fault
cannot do that much harm there, or not that little. Where severity is the size of the fault, the harm is measured and
reported, and nothing is chosen. The seeds are used for nothing else. Where a generator changes, delete its files.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.faults.harm import BANDS, LEVELS, Curve, harm, level_of, onset_of, train
from benchmarks.faults.split import CELLS, Cell
from benchmarks.faults.training import Training
from benchmarks.faults.workloads import ARCHITECTURES

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache" / "calibration"
RESULT = HERE / "results" / "severities.json"
SEEDS = (9001, 9002)
GRID = 5
RUNS = 13  # with the fault, per cell at most
CLOSEST = 1.1  # ratio of two strengths between which nothing is tried: what lies there is a cliff, not a severity
TARGETS = {"mild": 0.05, "medium": 0.25, "severe": 0.8}  # about the middle of the bands; of what is in one, the nearest
DIGITS = 4


class Calibration:
    """One cell: what was run, and what is chosen from it."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.passes = cell, cell.fault.judged == "lost"
        self.twins: dict[int, Curve] = {}
        self.harms: dict[float, dict[int, float]] = {}  # by strength and seed
        self.runs = self.steps = 0
        self.seconds = 0.0

    def twin(self, seed: int) -> Curve:
        if seed not in self.twins:
            onset = onset_of(self.cell, seed, self.cell.workload.steps)
            self.twins[seed] = train(Training(self.cell.workload, seed), onset=onset, passes=self.passes)
        return self.twins[seed]

    def measure(self, strength: float, seed: int) -> None:
        onset = onset_of(self.cell, seed, self.cell.workload.steps)
        fault = self.cell.fault(strength, onset=onset, seed=seed)
        training = Training(self.cell.workload, seed, [fault])
        began = time.thread_time()
        curve = train(training, onset=onset, passes=self.passes)
        self.seconds, self.steps = self.seconds + time.thread_time() - began, self.steps + training.step
        self.runs += 1
        self.harms.setdefault(strength, {})[seed] = harm(self.cell, curve, self.twin(seed))

    def means(self) -> dict[float, float]:
        """Mean harm by strength, weakest first."""
        return {strength: fmean(found.values()) for strength, found in sorted(self.harms.items())}

    def chosen(self) -> dict[str, float]:
        """Severity to the strength in its band that is nearest to the middle of it, unless a second seed denied it."""
        found: dict[str, float] = {}
        for level in LEVELS:
            inside = [(s, h) for s, h in self.means().items() if level_of(h) == level and not self.is_denied(level, s)]
            if inside:
                found[level] = min(inside, key=lambda item: abs(math.log(item[1] / TARGETS[level])))[0]
        return found

    def gap(self) -> float | None:
        """A strength between two that step over a band in which nothing lies."""
        means = list(self.means().items())
        for level in LEVELS:
            low, high = BANDS[level]
            if level in self.chosen() or math.isinf(high):
                continue
            for (weak, a), (strong, b) in itertools.pairwise(means):
                if a < low and b >= high and strong / weak > CLOSEST:
                    return float(f"{math.sqrt(weak * strong):.3g}")
        return None

    def search(self) -> None:
        if self.cell.fault.judged == "size":
            for strength in self.cell.fault.sizes:
                self.measure(strength, SEEDS[0])
            return
        weakest, strongest = self.cell.fault.weakest, self.cell.fault.strongest
        for i in range(GRID):
            self.measure(float(f"{weakest * (strongest / weakest) ** (i / (GRID - 1)):.3g}"), SEEDS[0])
        while self.runs < RUNS:
            gap = self.gap()
            once = [s for s in self.chosen().values() if len(self.harms[s]) == 1]
            if once:
                self.measure(once[0], SEEDS[1])
            elif gap is not None and gap not in self.harms:
                self.measure(gap, SEEDS[0])
            else:
                return

    def is_confirmed(self, level: str, strength: float) -> bool:
        """Whether both seeds were harmed; the mean alone lies in the band of `medium` for 0 and 0.9, too."""
        found = self.harms[strength].values()
        return len(found) == len(SEEDS) and min(found) >= BANDS[level][0] / 2

    def is_denied(self, level: str, strength: float) -> bool:
        return len(self.harms[strength]) == len(SEEDS) and not self.is_confirmed(level, strength)

    def row(self) -> dict[str, Any]:
        """The outcome, as JSON."""
        is_size = self.cell.fault.judged == "size"
        chosen = dict(zip(LEVELS, self.cell.fault.sizes, strict=True)) if is_size else self.chosen()
        levels = {
            level: {"strength": strength, "harm": [round(h, DIGITS) for h in self.harms[strength].values()]}
            for level, strength in chosen.items()
            if is_size or self.is_confirmed(level, strength)
        }
        twin = self.twins[SEEDS[0]]
        return {
            "half": self.cell.half,
            "cause": self.cell.fault.cause.value,
            "workload": self.cell.workload.name,
            "unit": self.cell.fault.unit,
            "judged": self.cell.fault.judged,
            "levels": levels,
            "tried": {str(s): round(h, DIGITS) for s, h in self.means().items()},
            "twin": {"start": round(twin.start, DIGITS), "end": round(twin.end, DIGITS)},
            "ms_per_step": round(1e3 * self.seconds / self.steps, 3),
        }


def _file(name: str) -> Path:
    return CACHE / f"{name.replace('/', '--')}.json"


def _start_worker(nice: int) -> None:
    torch.set_num_threads(1)
    os.nice(nice)


def _work(name: str) -> str:
    calibration = Calibration(CELLS[name])
    began = time.perf_counter()
    calibration.search()
    row = calibration.row()
    CACHE.mkdir(parents=True, exist_ok=True)
    part = _file(name).with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(row))
    part.replace(_file(name))
    found = {level: (x["strength"], x["harm"]) for level, x in row["levels"].items()}
    return f"{name:32} {calibration.runs:3} runs {time.perf_counter() - began:5.0f} s  {found}"


def pack() -> None:
    rows = {name: json.loads(_file(name).read_text()) for name in CELLS if _file(name).exists()}
    RESULT.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    RESULT.write_text(f"{{\n{lines}\n}}\n")
    print(f"{len(rows)} of {len(CELLS)} cells, {sum(len(row['levels']) for row in rows.values())} severities")


def table() -> None:
    """Mean harm of each severity, a line a cell; in parentheses the strength."""
    print("| cell | half | workload | " + " | ".join(LEVELS) + " | strength is |\n|---|---|---|---|---|---|---|")
    for name, row in json.loads(RESULT.read_text()).items():
        found = [row["levels"].get(level) for level in LEVELS]
        shown = ["–" if x is None else f"{fmean(x['harm']):.2f} ({x['strength']:g})" for x in found]
        print(f"| {name} | {row['half']} | {row['workload']} | {' | '.join(shown)} | {row['unit']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.pack or args.table:
        pack() if args.pack else table()
        return
    names = [name for name in CELLS if fnmatch(name, args.only) and not _file(name).exists()]
    names.sort(key=lambda name: ARCHITECTURES.index(CELLS[name].architecture))  # the cheap ones first
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs, initializer=_start_worker, initargs=(args.nice,)) as pool:
        for done, line in enumerate(pool.imap_unordered(_work, names), start=1):
            print(f"[{done}/{len(names)}] {time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    main()
