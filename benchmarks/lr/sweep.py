"""The brute force that learning rates are judged by: sweeps of real training, resumable.

    python benchmarks/lr/sweep.py [--half tune|test] [--only GLOB] [--stage grid|onset] [--jobs N]
    python benchmarks/lr/sweep.py --status
    python benchmarks/lr/sweep.py --pack

The first form trains what is missing: stage "grid" (best learning rates to a factor of sqrt(2), their winners once
more on fresh seeds), then "onset" (where training begins to fail, to 1.2x). Every run is appended at once to
benchmarks/lr/.cache/runs.jsonl, under a hash of its scenario's definition: it may be killed at any time, and a scenario
that changes is trained anew. `--pack` writes benchmarks/lr/results/sweeps.json, which is committed.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import dataclasses
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.lr.data import CACHE, digest
from benchmarks.lr.judge import VERSION
from benchmarks.lr.scenario import Scenario
from benchmarks.lr.scenarios import select
from benchmarks.lr.search import FRESH_SEEDS, STAGES, Runs, Store, work
from benchmarks.peer_suite.provenance import provenance

RUNS = CACHE / "runs.jsonl"
RESULT = Path(__file__).resolve().parent / "results" / "sweeps.json"
SCHEMA = 1
DIGITS = 5  # significant, of a packed loss


def _start_worker(nice: int) -> None:
    torch.set_num_threads(1)
    os.nice(nice)


def _work(task: tuple[str, str]) -> str:
    return work(*task, RUNS)


def sweep(scenarios: list[Scenario], stages: list[str], *, jobs: int, nice: int) -> None:
    tasks = [(scenario.name, stage) for stage in stages for scenario in scenarios]
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=_start_worker, initargs=(nice,)) as pool:
        for done, line in enumerate(pool.imap_unordered(_work, tasks), start=1):
            print(f"[{done}/{len(tasks)}] {time.strftime('%H:%M:%S')} {line}", flush=True)


def _number(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _row(runs: Runs) -> dict[str, Any]:
    """One scenario: its definition, what was found, and every run."""
    by_rate: dict[str, dict[str, list[float | None]]] = {}
    for (k, seed), run in sorted(runs.known.items()):
        by_rate.setdefault(str(k), {})[str(seed)] = [_number(value) for value in dataclasses.astuple(run)]
    about = {"scenario": runs.scenario.settings(), "data": digest(runs.scenario.data_name), "judge": VERSION}
    return about | runs.found | {"runs": by_rate}


def _reran(runs: Runs) -> bool:
    rates = {runs.found.get("best"), runs.found.get("best_val")}
    return all((k, seed) in runs.known for k in rates for seed in FRESH_SEEDS)


def status(scenarios: list[Scenario], store: Store) -> dict[str, Any]:
    """How much of each half is there."""
    counts: dict[str, Any] = {}
    for half in ("tune", "test"):
        rows = [Runs(scenario, store) for scenario in scenarios if scenario.half == half]
        counts[half] = {
            "families": len({row.scenario.family for row in rows}),
            "scenarios": len(rows),
            "steps_4000_or_more": sum(row.scenario.steps >= 4000 for row in rows),
            "grids": sum("best" in row.found for row in rows),
            "reruns": sum(_reran(row) for row in rows),
            "onsets": sum("onset" in row.found for row in rows),
            "runs": sum(len(row.known) for row in rows),
        }
    return counts


def pack(store: Store) -> None:
    scenarios = select()
    about = provenance() | {"command": "python benchmarks/lr/sweep.py --pack", "cores": os.cpu_count()}
    about["cpu_seconds_of_training"] = round(store.seconds)
    result = {
        "schema": SCHEMA,
        "about": "runs: k -> seed -> [initial, train, val, peak, failed, initial_val]; lr = 2 ** (k / 4); null: not "
        "finite; failed: 0 no, 1 not finite, 3 peak above twice the initial loss (2, an end above the midpoint, is "
        "decided by metrics.failure). best, best_val, onset: k; seeds from 100: the winners rerun.",
        "provenance": about,
        "complete": status(scenarios, store),
        "scenarios": {scenario.name: _row(Runs(scenario, store)) for scenario in scenarios},
    }
    # One scenario a line: small, and a change of one is a change of one line.
    head = json.dumps({k: v for k, v in result.items() if k != "scenarios"}, indent=1)
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in result["scenarios"].items()]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(head[:-2] + ',\n "scenarios": {\n' + ",\n".join(lines) + "\n}}\n")
    print(f"{RESULT.name}: {RESULT.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tune", "test"))
    parser.add_argument("--only", metavar="GLOB", help="scenarios whose names match")
    parser.add_argument("--stage", choices=tuple(STAGES), help="default: one after the other")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--status", action="store_true", help="count what is there")
    parser.add_argument("--pack", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.status:
        print(json.dumps(status(select(), Store(RUNS)), indent=1))
    elif options.pack:
        pack(Store(RUNS))
    else:
        scenarios = select(half=options.half, only=options.only)
        stages = [options.stage] if options.stage else list(STAGES)
        sweep(scenarios, stages, jobs=options.jobs, nice=options.nice)


if __name__ == "__main__":
    main()
