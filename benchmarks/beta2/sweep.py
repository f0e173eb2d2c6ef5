"""The brute force that rules for beta2 are judged by: real training over a grid, resumable.

    python benchmarks/beta2/sweep.py [--half tune|test] [--only GLOB] [--seeds N] [--jobs N]
    python benchmarks/beta2/sweep.py --status
    python benchmarks/beta2/sweep.py --pack

The first form trains what is missing: of each workload the best learning rate at beta2 = 0.999 to a factor of 2 (two
seeds), then every beta2 at that learning rate, a third and three times of it, one paired seed after the other. Every
run is appended at once to benchmarks/beta2/.cache/runs.jsonl, under a hash of its definition: it may be killed at any
time. `--pack` writes benchmarks/beta2/results/sweeps.json, which is committed. Some 4 hours of CPU time for six seeds.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import json
import math
import multiprocessing
import sys
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.beta2.training import VERSION, Run, train
from benchmarks.beta2.workloads import WORKLOADS, Workload, select
from benchmarks.lr.data import digest
from benchmarks.lr.search import COARSE, OCTAVE, SEEDS, Runs, Store, coarse, lr_of
from benchmarks.peer_suite.provenance import provenance

HERE = Path(__file__).resolve().parent
RUNS = HERE / ".cache" / "runs.jsonl"
RESULT = HERE / "results" / "sweeps.json"
SCHEMA = 1
DIGITS = 6  # significant, of a packed loss
USUAL = 0.999
THIRD = OCTAVE * math.log2(3)  # in quarter octaves
APART = {"a third": -THIRD, "the best": 0.0, "three times": THIRD}  # learning rates
NUM_SEEDS = 6


def runs_of(workload: Workload, beta2: float, store: Store) -> Runs:
    """Of one beta2; recorded under the definition that holds it."""
    return Runs(workload.at(beta2), store, version=VERSION, train=train)


def find_lr(workload: Workload, store: Store) -> int:
    """The best learning rate for 0.999, in quarter octaves: factors of 4 with one seed, then of 2 with two."""
    runs = runs_of(workload, USUAL, store)
    if "best" not in runs.found:
        best = coarse(runs)
        octaves = [best + change for change in (-COARSE, -OCTAVE, 0, OCTAVE, COARSE)]
        best = min(octaves, key=lambda k: runs.loss(k, SEEDS[:1]))
        runs.conclude(best=min((best - OCTAVE, best, best + OCTAVE), key=lambda k: runs.loss(k, SEEDS)))
    found: int = runs.found["best"]
    return found


def work(name: str, seed: int | None) -> str:
    """The learning rate of a workload, or the grid at one seed, in this process; a line about it."""
    store, workload, began = Store(RUNS, Run), WORKLOADS[name], time.process_time()
    best = find_lr(workload, store)
    if seed is None:
        return f"{name}: best learning rate {lr_of(best):.3g}, {time.process_time() - began:.0f} s"
    for beta2 in workload.betas2:
        runs = runs_of(workload, beta2, store)
        for change in APART.values():
            runs.run(best + change, seed)
    return f"{name}: seed {seed}, {time.process_time() - began:.0f} s"


def _work(task: tuple[str, int | None]) -> str:
    return work(*task)


def _start_worker(nice: int) -> None:
    torch.set_num_threads(1)
    os.nice(nice)


def sweep(workloads: list[Workload], *, seeds: int, jobs: int, nice: int) -> None:
    """Learning rates first, then one seed of everything after the other; long runs last."""
    stages = (None, *range(seeds))
    tasks = [
        (workload.name, seed)
        for steps in sorted({workload.steps for workload in workloads})
        for seed in stages
        for workload in workloads
        if workload.steps == steps
    ]
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_start_worker, initargs=(nice,)) as pool:
        for done, line in enumerate(pool.imap_unordered(_work, tasks), start=1):
            print(f"[{done}/{len(tasks)}] {time.strftime('%H:%M:%S')} {line}", flush=True)


def row(workload: Workload, store: Store) -> dict[str, Any]:
    """One workload: its definition, its best learning rate, and its runs: beta2 -> learning rate -> seed -> run."""
    best = runs_of(workload, USUAL, store).found.get("best")
    about = {"workload": workload.settings(), "data": digest(workload.data_name), "judge": VERSION, "best": best}
    runs: dict[str, Any] = {}
    for beta2 in workload.betas2 if best is not None else ():
        known = runs_of(workload, beta2, store).known
        runs[str(beta2)] = {
            name: {str(s): [_number(x) for x in astuple(run)] for (k, s), run in sorted(known.items()) if k == best + d}
            for name, d in APART.items()
        }
    return about | {"runs": runs}


def _number(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def complete(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each half: workloads, and runs that are there of those that there shall be."""
    found: dict[str, Any] = {}
    for half in ("tune", "test"):
        own = [rows[workload.name] for workload in select(half=half)]
        there = sum(min(len(s), NUM_SEEDS) for row in own for rates in row["runs"].values() for s in rates.values())
        wanted = sum(len(workload.betas2) * len(APART) * NUM_SEEDS for workload in select(half=half))
        found[half] = {"workloads": len(own), "runs": there, "of": wanted}
    return found


def pack(store: Store) -> None:
    """Write what is there."""
    rows = {workload.name: row(workload, store) for workload in select()}
    about = provenance() | {"command": "python benchmarks/beta2/sweep.py --pack", "cores": os.cpu_count()}
    about["cpu_seconds_of_training"] = round(store.seconds)
    result = {
        "schema": SCHEMA,
        "about": "runs: beta2 -> learning rate -> seed -> [initial, train, val, peak, failed, initial_val, spikes]; "
        "lr = 2 ** (best / 4), a third and three times of it; null: not finite; failed: 0 no, 1 not finite, 3 peak "
        "above twice the initial loss",
        "provenance": about,
        "complete": complete(rows),
    }
    lines = [f"{json.dumps(name)}: {json.dumps(found, separators=(',', ':'))}" for name, found in rows.items()]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1)[:-2] + ',\n "workloads": {\n' + ",\n".join(lines) + "\n}}\n")
    print(f"{RESULT.name}: {RESULT.stat().st_size / 1e6:.2f} MB, {json.dumps(result['complete'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tune", "test"))
    parser.add_argument("--only", metavar="GLOB", help="workloads whose names match")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--status", action="store_true", help="count what is there")
    parser.add_argument("--pack", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.status:
        store = Store(RUNS, Run)
        print(json.dumps(complete({w.name: row(w, store) for w in select()}), indent=1))
    elif options.pack:
        pack(Store(RUNS, Run))
    else:
        workloads = select(half=options.half, only=options.only)
        sweep(workloads, seeds=options.seeds, jobs=options.jobs, nice=options.nice)


if __name__ == "__main__":
    main()
