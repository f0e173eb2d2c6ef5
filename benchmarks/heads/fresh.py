"""Trainings with fresh seeds of what is compared: the pair that was recommended, the grid's best, a default.

    python benchmarks/heads/fresh.py [--half tune|test] [--jobs N]

For every group that evidence.py has asked about and that the brute force has finished with one seed at least: the
(heads, learning rate) of `suggest_heads`; the pair with the lowest loss in the brute force, a mean over its seeds; the
learning rate that `suggest_heads` measured for the default number of heads, which is what `suggest_lr` says there; and
placebos. Winners of a noisy grid are never judged on the runs that chose them. Appends to .cache/fresh.jsonl; `--pack`
writes results/fresh.json, which a machine without a cache goes on from.
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

from benchmarks.heads import evidence
from benchmarks.heads.sweep import RUNS, runs_of, unpack
from benchmarks.heads.training import VERSION, Run, failed, train
from benchmarks.heads.workloads import FRESH_SEEDS, HEADS, Cell, Group, groups
from benchmarks.lr.search import Store, lr_of

FRESH = Path(__file__).resolve().parent / ".cache" / "fresh.jsonl"
PACKED = Path(__file__).resolve().parent / "results" / "fresh.json"
DEFAULT = 8  # torch.nn.Transformer's nhead
Pair = tuple[int, float]  # heads, learning rate
Trained = dict[tuple[str, int, float, int], list[float]]  # group, heads, learning rate, seed -> Run as a list


def swept(group: Group, store: Store) -> dict[int, dict[float, list[Run]]]:
    """Of the brute force: heads -> k -> runs of the seeds that are finished; empty where a count has none."""
    found: dict[int, dict[float, list[Run]]] = {}
    for heads in HEADS:
        runs = runs_of(Cell(group, heads), store)
        done = [s for s in (0, 1, 2) if f"failing {s}" in runs.found]
        if not done:
            return {}
        ks = {k for k, s in runs.known if s in done}
        found[heads] = {k: [runs.known[k, s] for s in done if (k, s) in runs.known] for k in ks}
        found[heads] = {k: r for k, r in found[heads].items() if len(r) == len(done)}
    return found


def best_pair(group: Group, store: Store) -> Pair | None:
    """The lowest mean loss of the brute force, over the seeds that are finished."""
    cells = swept(group, store)
    pairs = [
        (sum(run.final for run in runs) / len(runs), heads, k) for heads, ks in cells.items() for k, runs in ks.items()
    ]
    if not pairs:
        return None
    _, heads, k = min(pairs)
    return heads, lr_of(k)


def compared(group: Group, told: dict[str, Any], store: Store) -> dict[str, Pair]:
    """What is trained, by name; empty where the brute force has not come so far."""
    best = best_pair(group, store)
    if best is None:
        return {}
    rows = {row["heads"]: row for row in told["table"]}
    pairs: dict[str, Pair] = {"grid": best}
    if told["value"] is not None:
        pairs["suggest_heads"] = told["value"], rows[told["value"]]["lr"]["value"]
    for heads in HEADS:
        lr = rows[heads]["lr"]["value"]
        if lr is not None:
            pairs[f"{heads} heads, suggest_lr"] = heads, lr
    return pairs


def trained() -> Trained:
    """What is recorded; a line that a kill cut short is passed over."""
    found: Trained = {}
    if PACKED.exists() and (packed := json.loads(PACKED.read_text()))["version"] == VERSION:
        found |= {(group, heads, lr, seed): run for group, heads, lr, seed, run in packed["runs"]}
    for line in FRESH.read_text().splitlines() if FRESH.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["version"] == VERSION:
            found[row["group"], row["heads"], row["lr"], row["seed"]] = row["run"]
    return found


def pack() -> None:
    """Write what is known."""
    rows = [json.dumps([*key, run], separators=(",", ":")) for key, run in sorted(trained().items())]
    about = "[group, heads, learning rate, seed, [initial, final, val, steps, largest logit]]; null: not finite"
    text = f'{{"version": {VERSION},\n "about": {json.dumps(about)},\n "runs": [\n' + ",\n".join(rows) + "\n]}\n"
    PACKED.write_text(text)
    print(f"{PACKED.name}: {len(rows)} runs")


def work(task: tuple[Group, int, float, int]) -> str:
    """One training; a line of JSON."""
    group, heads, lr, seed = task
    began = time.process_time()
    run = [x if math.isfinite(x) else None for x in astuple(train(Cell(group, heads), lr, seed))]
    row = {"group": group.name, "heads": heads, "lr": lr, "seed": seed, "version": VERSION, "run": run}
    return json.dumps(row | {"seconds": round(time.process_time() - began, 2)})


def _start_worker(nice: int) -> None:
    torch.set_num_threads(1)
    os.nice(nice)


def lost(run: list[float | None], initial: float, best: float) -> bool:
    """Whether a recorded run failed, by the brute force's definition."""
    final = math.inf if run[1] is None else run[1]
    return failed(Run(initial, final, final, 0, 0.0), best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tune", "test"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--pack", action="store_true", help=f"write {PACKED.name}")
    options = parser.parse_args()
    if options.pack:
        pack()
        return
    unpack()
    store, there, asked = Store(RUNS, Run), trained(), evidence.known()  # type: ignore[type-var]
    tasks = [
        (group, heads, lr, seed)
        for group in groups(half=options.half)
        if group.name in asked
        for heads, lr in dict.fromkeys(compared(group, asked[group.name], store).values())
        for seed in FRESH_SEEDS
        if (group.name, heads, lr, seed) not in there
    ]
    FRESH.parent.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(
        options.jobs, initializer=_start_worker, initargs=(options.nice,)
    ) as pool:
        for done, line in enumerate(pool.imap_unordered(work, tasks), start=1):
            with FRESH.open("a") as file:
                file.write(line + "\n")
            if done % 20 == 0 or done == len(tasks):
                print(f"[{done}/{len(tasks)}] {time.strftime('%H:%M:%S')}", flush=True)


if __name__ == "__main__":
    main()
