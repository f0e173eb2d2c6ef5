"""The brute force that `suggest_heads` is judged by: real training over heads and learning rates, resumable.

    python benchmarks/heads/sweep.py [--half tune|test] [--only GLOB] [--seeds N] [--jobs N]
    python benchmarks/heads/sweep.py --status
    python benchmarks/heads/sweep.py --pack

Of each cell (group and head count) and seed: every learning rate of a grid of powers of two, the same one for all
cells, from where the loss is clearly worse than the best below up to the lowest rate that fails, and one above it to
see whether failing is for good; then the rate between the last that trains and the first that fails, to 1.09x. A run
has failed when it lost more than half of what the best rate gains (:func:`benchmarks.heads.training.failed`).

Every run is appended at once to benchmarks/heads/.cache/runs.jsonl, under a hash of its definition: it may be killed at
any time. One seed of everything comes before the next, small models first. `--pack` writes
benchmarks/heads/results/sweeps.json, which is committed, and which a machine without a cache goes on from.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import fnmatch
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.heads.training import VERSION, Run, failed, train
from benchmarks.heads.workloads import HEADS, SEEDS, Cell, Group, groups
from benchmarks.lr.data import digest
from benchmarks.lr.search import OCTAVE, Runs, Store
from benchmarks.peer_suite.provenance import provenance

HERE = Path(__file__).resolve().parent
RUNS = HERE / ".cache" / "runs.jsonl"
RESULT = HERE / "results" / "sweeps.json"
SCHEMA = 1
DIGITS = 5  # significant, of a packed loss
# A learning rate is 2 ** (k / 4). Where the grid begins, and how far it goes.
FIRST = {"momentum": -16, "adamw": -32}
LOWEST, HIGHEST = -64, 40
WORSE = 0.1  # of what there is to gain: so much worse below the best, and the grid ends there
FINEST = 0.5  # quarter octaves between the last rate that trains and the first that fails: 1.09x


def walk(runs: Runs, seed: int) -> float | None:
    """Train the grid of one seed and bisect; the lowest failing k, None where none fails up to the grid's end."""
    first = FIRST[runs.scenario.group.optimizer]
    ks = [first]

    def best() -> float:
        return min(runs.run(k, seed).final for k in ks)

    def fails(k: float) -> bool:
        return failed(runs.run(k, seed), best())

    while True:  # down, until what is below is clearly worse
        low = min(ks)
        room = runs.run(low, seed).initial - best()
        if low <= LOWEST or (len(ks) > 1 and runs.run(low, seed).final > best() + WORSE * max(room, 0.0)):
            break
        ks.append(low - OCTAVE)
        if len(ks) == 2 and runs.run(ks[1], seed).final > runs.run(ks[0], seed).final:
            break
    while max(ks) < HIGHEST and not (fails(max(ks)) and max(ks) > first):  # up, until one fails
        ks.append(max(ks) + OCTAVE)
    ks.sort()
    failing = next((k for k in ks if fails(k)), None)
    if failing is None:
        runs.conclude(**{f"failing {seed}": None})
        return None
    runs.run(failing + OCTAVE, seed)
    good = max((k for k in ks if k < failing), default=failing - OCTAVE)
    high, low = float(failing), float(good)
    while high - low > FINEST:
        middle = (low + high) / 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    runs.conclude(**{f"failing {seed}": high})
    return high


def runs_of(cell: Cell, store: Store) -> Runs:
    """Of one cell."""
    return Runs(cell, store, version=VERSION, train=train)  # type: ignore[arg-type]


def work(task: tuple[Group, int, int]) -> str:
    """One head count and seed of a group, in this process; a line about it."""
    group, heads, seed = task
    store, began = Store(RUNS, Run), time.process_time()  # type: ignore[type-var]
    runs = runs_of(Cell(group, heads), store)
    if f"failing {seed}" in runs.found:
        return f"{runs.scenario.name}: seed {seed} was there"
    high = walk(runs, seed)
    said = "none fails" if high is None else f"fails from {2 ** (high / 4):.3g}"
    return f"{runs.scenario.name}: seed {seed}, {said}, {time.process_time() - began:.0f} s"


def _start_worker(nice: int) -> None:
    torch.set_num_threads(1)
    os.nice(nice)


def sweep(chosen: list[Group], *, seeds: int, jobs: int, nice: int) -> None:
    """One seed of everything after the other."""
    tasks = [(group, heads, seed) for seed in SEEDS[:seeds] for group in chosen for heads in HEADS]
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=_start_worker, initargs=(nice,)) as pool:
        for done, line in enumerate(pool.imap_unordered(work, tasks), start=1):
            print(f"[{done}/{len(tasks)}] {time.strftime('%H:%M:%S')} {line}", flush=True)


def _number(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def row(group: Group, store: Store) -> dict[str, Any]:
    """One group: heads -> seed -> its lowest failing k, and its runs by k."""
    found: dict[str, Any] = {}
    for heads in HEADS:
        runs = runs_of(Cell(group, heads), store)
        seeds = sorted({seed for _, seed in runs.known})
        found[str(heads)] = {
            str(seed): {
                "runs": {
                    f"{k:g}": [_number(x) for x in astuple(run)]
                    for (k, s), run in sorted(runs.known.items())
                    if s == seed
                },
            }
            | ({"failing": runs.found[key]} if (key := f"failing {seed}") in runs.found else {})
            for seed in seeds
        }
    return {"group": asdict(group), "half": group.half, "heads": found}


def complete(store: Store) -> dict[str, Any]:
    """Of each half: cells whose failing rate is known for each of the seeds, of those that there are."""
    found = {}
    for half in ("tune", "test"):
        cells = [Cell(group, heads) for group in groups(half=half) for heads in HEADS]
        known = [runs_of(cell, store).found for cell in cells]
        found[half] = {"cells": len(cells)} | {f"seed {s}": sum(f"failing {s}" in f for f in known) for s in SEEDS}
    return found


def pack(store: Store) -> None:
    """Write what is there."""
    about = provenance() | {"command": "python benchmarks/heads/sweep.py --pack", "cores": os.cpu_count()}
    about |= {"cpu_seconds_of_training": round(store.seconds), "data": digest("shakespeare"), "judge": VERSION}
    result = {
        "schema": SCHEMA,
        "about": "heads -> seed -> failing: lowest k that fails, to half a step, missing where not yet known; runs: "
        "k -> [initial, final, val, steps, largest logit]; lr = 2 ** (k / 4); null: not finite, or none",
        "provenance": about,
        "complete": complete(store),
    }
    rows = {group.name: row(group, store) for group in groups()}
    lines = [f"{json.dumps(name)}: {json.dumps(found, separators=(',', ':'))}" for name, found in rows.items()]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1)[:-2] + ',\n "groups": {\n' + ",\n".join(lines) + "\n}}\n")
    print(f"{RESULT.name}: {RESULT.stat().st_size / 1e6:.2f} MB, {json.dumps(result['complete'])}")


def unpack() -> None:
    """Fill an empty cache with what was committed, if it was trained by this version; its losses have five digits."""
    if RUNS.exists() or not RESULT.exists():
        return
    packed = json.loads(RESULT.read_text())
    about = packed["provenance"]
    if about["judge"] != VERSION or about["data"] != digest("shakespeare"):
        return
    rows: list[dict[str, Any]] = []
    share = about["cpu_seconds_of_training"] / max(1, sum(1 for _ in _packed_runs(packed)))
    for group, heads, seed, found in _packed(packed):
        cell = Cell(group, heads)
        key = {"scenario": cell.name, "digest": f"{cell.digest()}-{VERSION}"}
        for k, run in found["runs"].items():
            values = [math.inf if x is None else x for x in run]
            rows.append(key | {"k": float(k), "seed": seed, "run": values, "seconds": share})
        if "failing" in found:
            rows.append(key | {"found": {f"failing {seed}": found["failing"]}})
    RUNS.parent.mkdir(exist_ok=True)
    RUNS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _packed(packed: dict[str, Any]) -> Iterator[tuple[Group, int, int, dict[str, Any]]]:
    for entry in packed["groups"].values():
        for heads, seeds in entry["heads"].items():
            for seed, found in seeds.items():
                yield Group(**entry["group"]), int(heads), int(seed), found


def _packed_runs(packed: dict[str, Any]) -> Iterator[list[float | None]]:
    for *_, found in _packed(packed):
        yield from found["runs"].values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tune", "test"))
    parser.add_argument("--only", metavar="GLOB", help="groups whose names match")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--status", action="store_true", help="count what is there")
    parser.add_argument("--pack", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    unpack()
    if options.status:
        print(json.dumps(complete(Store(RUNS, Run)), indent=1))  # type: ignore[type-var]
    elif options.pack:
        pack(Store(RUNS, Run))  # type: ignore[type-var]
    else:
        chosen = [g for g in groups(half=options.half) if fnmatch.fnmatch(g.name, options.only or "*")]
        sweep(chosen, seeds=options.seeds, jobs=options.jobs, nice=options.nice)


if __name__ == "__main__":
    main()
