"""What is to be beaten: constants, chance, naive sweeps, the finders people use, optimizers that need no LR.

    .venv-bench/bin/pip install --no-deps -r benchmarks/lr/requirements.txt
    .venv-bench/bin/python benchmarks/lr/baselines.py [--half tune|test] [--only GLOB] [--method GLOB] [--jobs N]
    .venv-bench/bin/python benchmarks/lr/baselines.py --pack

Every suggestion is made once, with the seed of the first run that judges it, and judged by real training at it on five
fresh seeds (see verdict.py). Needs complete sweeps. Resumable, as sweep.py is; a tool that gives no suggestion, or
breaks, is judged as one that trains nothing. `--pack` writes benchmarks/lr/results/baselines.json.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import dataclasses
import functools
import json
import multiprocessing
import sys
import time
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.lr.data import CACHE
from benchmarks.lr.finders import FINDERS, STEPS
from benchmarks.lr.judge import VERSION
from benchmarks.lr.metrics import mean_interval
from benchmarks.lr.rules import COSTS, Rule, fit_constants, fit_ranges, rules
from benchmarks.lr.scenario import Scenario
from benchmarks.lr.scenarios import SCENARIOS, select
from benchmarks.lr.search import FRESH_SEEDS, Store
from benchmarks.lr.tuners import TUNERS
from benchmarks.lr.verdict import Judge, StaleSweepError, Verdict, load_sweeps, sweep_of, verdict_on
from benchmarks.peer_suite.provenance import provenance

SUGGESTED = CACHE / "suggested.jsonl"
TUNED = CACHE / "tuned.jsonl"
RESULT = Path(__file__).resolve().parent / "results" / "baselines.json"
PACKAGES = ("torch-lr-finder", "lightning", "fastai", "prodigyopt", "dadaptation", "schedulefree")


@functools.cache
def _methods() -> dict[str, Rule]:
    return rules(load_sweeps()) | FINDERS


@functools.cache
def _judge() -> Judge:
    return Judge()


def _suggestion(scenario: Scenario, name: str, store: Store, digest: str) -> float | None:
    """Made once and kept; an error counts as no suggestion, and its text is kept, too."""
    known = store.found.setdefault(digest, {})
    if name not in known:
        try:
            found: dict[str, Any] = {name: _methods()[name](scenario, FRESH_SEEDS[0])}
        except Exception as error:  # a peer's error is a result
            found = {name: None, f"{name} error": f"{type(error).__name__}: {error}"[:200]}
        store.add({"scenario": scenario.name, "digest": digest, "found": found})
        known.update(found)
    lr: float | None = known[name]
    return lr


def _tuned(scenario: Scenario, name: str, store: Store, digest: str) -> Verdict:
    known = store.runs.setdefault(f"{digest} {name}", {})
    for seed in FRESH_SEEDS:
        if (0, seed) not in known:
            run = TUNERS[name](scenario, seed)
            row = {"scenario": scenario.name, "digest": f"{digest} {name}", "k": 0, "seed": seed, "seconds": 0.0}
            store.add(row | {"run": dataclasses.astuple(run)})
            known[0, seed] = run
    return verdict_on([known[0, seed] for seed in FRESH_SEEDS], sweep_of(scenario, _judge().sweeps))


NOTHING = Verdict(None, 1.0, 1.0, None, 1.0)


def judged(scenario: Scenario, method: str) -> Verdict:
    """One baseline on one scenario."""
    digest = f"{scenario.digest()}-{VERSION}"
    if method in TUNERS:
        return _tuned(scenario, method, Store(TUNED), digest)
    lr = _suggestion(scenario, method, Store(SUGGESTED), digest)
    return NOTHING if lr is None else _judge().verdict(scenario, lr)


def _start_worker(nice: int) -> None:
    torch.set_num_threads(1)
    os.nice(nice)


def _work(task: tuple[str, str]) -> str:
    name, method = task
    began = time.process_time()
    try:
        verdict = judged(SCENARIOS[name], method)
    except StaleSweepError as error:
        return f"left out: {error}"
    lr = "" if verdict.lr is None else f" at {verdict.lr:.3g}"
    return f"{method}, {name}: regret {verdict.regret:.3f}{lr}; {time.process_time() - began:.0f} s"


def _summary(table: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    rows = [row[name] for row in table.values()]
    regrets = [row["regret"] for row in rows]
    return {
        "regret": mean_interval(regrets),
        "regret_val": mean_interval([row["regret_val"] for row in rows]),
        "p95": float(np.quantile(regrets, 0.95)),
        "worst": max(regrets),
        "failed": sum(row["failed"] >= 0.5 for row in rows),
        "no_suggestion": sum(row["lr"] is None for row in rows) if name not in TUNERS else None,
        "gradients": STEPS if name in FINDERS else COSTS.get(name, 0),
    }


def _errors(scenarios: list[Scenario]) -> dict[str, str]:
    """What the tools said where they broke, by scenario and tool."""
    found = Store(SUGGESTED).found
    return {
        f"{scenario.name}, {key.removesuffix(' error')}": text
        for scenario in scenarios
        for key, text in found.get(f"{scenario.digest()}-{VERSION}", {}).items()
        if key.endswith(" error")
    }


def pack(scenarios: list[Scenario], methods: list[str]) -> None:
    table = {}
    for scenario in scenarios:
        try:
            verdicts = {method: judged(scenario, method) for method in methods}
        except StaleSweepError as error:
            print(f"left out: {error}")
            continue
        table[scenario.name] = {name: dataclasses.asdict(verdict) for name, verdict in verdicts.items()}
    halves = {half: {k: v for k, v in table.items() if SCENARIOS[k].half == half} for half in ("tune", "test")}
    sweeps = load_sweeps()
    result = {
        "provenance": provenance() | {"packages": {name: metadata.version(name) for name in PACKAGES}},
        "constants": fit_constants(sweeps),
        "ranges": fit_ranges(sweeps),
        "errors": _errors(scenarios),
        "scenarios": {half: len(rows) for half, rows in halves.items()},
        "summary": {half: {name: _summary(rows, name) for name in methods} for half, rows in halves.items() if rows},
        "verdicts": table,
    }
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    RESULT.write_text(json.dumps(rounded, indent=1) + "\n")
    for half, rows in rounded["summary"].items():
        print(f"{half}: mean training regret [95%], 95th percentile, worst, failed")
        for name, row in sorted(rows.items(), key=lambda item: item[1]["regret"]["mean"]):
            mean = row["regret"]
            print(f"  {name:20s} {mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}] ", end="")
            print(f"{row['p95']:.3f} {row['worst']:.3f} {row['failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tune", "test"), help="default: both")
    parser.add_argument("--only", metavar="GLOB", help="scenarios whose names match")
    parser.add_argument("--method", metavar="GLOB", default="*", help="baselines whose names match")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--pack", action="store_true", help=f"train what is missing, then write {RESULT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scenarios = select(half=options.half, only=options.only)
    methods = [method for method in (*_methods(), *TUNERS) if fnmatch(method, options.method)]
    if options.pack:
        pack(scenarios, methods)
        return
    # Method by method: what is there first is a whole column.
    tasks = [(scenario.name, method) for method in methods for scenario in scenarios]
    with multiprocessing.get_context("spawn").Pool(options.jobs, _start_worker, (options.nice,)) as pool:
        for done, line in enumerate(pool.imap_unordered(_work, tasks), start=1):
            print(f"[{done}/{len(tasks)}] {line}", flush=True)


if __name__ == "__main__":
    main()
