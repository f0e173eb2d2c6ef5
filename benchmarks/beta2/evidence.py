"""What `suggest_beta2` says in every cell of the sweep, from its pilot, before anything is trained.

    python benchmarks/beta2/evidence.py [--half tune|test] [--jobs N]

A cell is a workload at a learning rate; the optimizer that is given has beta2 = 0.999, which the pilot trains with.
Every answer is appended to benchmarks/beta2/.cache/evidence.jsonl. A bandit's batches are those of the first rollouts,
taken with the model as it is before training.
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
from itertools import islice
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.beta2.sweep import APART, RESULT, USUAL
from benchmarks.beta2.training import VERSION
from benchmarks.beta2.workloads import WORKLOADS, Workload, select
from benchmarks.lr.search import Store, lr_of
from dyntune import suggest_beta2
from dyntune.records import Estimate, Recommendation

HERE = Path(__file__).resolve().parent
EVIDENCE = HERE / ".cache" / "evidence.jsonl"
SEED = 100  # of model and batches: none of the sweep's
BATCHES = 256


def tokens(workload: Workload) -> float | None:
    """Characters of a step; None for what is not text."""
    return float(workload.batch * workload.data().x.shape[1]) if workload.loss == "text" else None


def suggested(workload: Workload, lr: float, **options: Any) -> Recommendation:
    """What the recommender says before training."""
    told = workload.at(USUAL)
    model = told.new_model(SEED)
    batches: Any = told.loader(SEED)
    if told.bandit:
        batches = list(islice(told.batches(model, SEED), BATCHES))
    return suggest_beta2(
        model,
        batches,
        told.loss_fn,
        optimizer=told.new_optimizer(model, lr),
        num_steps=told.steps,
        tokens_per_step=tokens(told),
        clip_norm=told.clip,
        **options,
    )


def key(name: str, lr: str) -> str:
    """Of a cell; a change of the workload makes its evidence stale."""
    return f"{WORKLOADS[name].digest()}-{VERSION}-{lr}"


def plain(value: Any) -> Any:
    """As JSON takes it."""
    if isinstance(value, Estimate):
        return {"value": value.value, "low": plain(value.low), "high": plain(value.high)}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _work(task: tuple[str, str, int]) -> str:
    name, lr, best = task
    began = time.process_time()
    found = suggested(WORKLOADS[name], lr_of(best + APART[lr]))
    row = {"key": key(name, lr), "workload": name, "lr": lr, "value": found.value, "low": found.low, "high": found.high}
    row |= {"evidence": {k: plain(v) for k, v in found.evidence.items()}, "series": found.series, "cost": found.cost}
    row |= {"checks": found.checks}
    Store(EVIDENCE).add(row)
    return f"{name}, {lr}: {found.value}, {found.evidence['active bound']}, {time.process_time() - began:.0f} s"


def load() -> dict[tuple[str, str], dict[str, Any]]:
    """By workload and learning rate; those of other definitions are left out."""
    found = {}
    for line in EVIDENCE.read_text().splitlines() if EVIDENCE.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # cut short
            continue
        if row["workload"] in WORKLOADS and row["key"] == key(row["workload"], row["lr"]):
            found[row["workload"], row["lr"]] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tune", "test"), default="tune")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, known = json.loads(RESULT.read_text())["workloads"], load()
    tasks = [
        (w.name, lr, rows[w.name]["best"])
        for w in select(half=options.half)
        for lr in APART
        if rows[w.name]["best"] is not None and (w.name, lr) not in known
    ]
    with multiprocessing.get_context("spawn").Pool(options.jobs, initializer=torch.set_num_threads, initargs=(1,)) as p:
        for line in p.imap_unordered(_work, tasks):
            print(line, flush=True)


if __name__ == "__main__":
    main()
