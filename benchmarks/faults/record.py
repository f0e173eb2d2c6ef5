"""Runs of the benchmark under a monitor, stored for detectors to be tried on.

    python benchmarks/faults/record.py --kind faults|twins|healthy --half tune|test [--limit N] [--jobs 2]
    python benchmarks/faults/record.py --status

Each run is one folder under .cache/runs/, complete or not there; what exists is left out, what was defined otherwise is
made again. Training is the same bits every time; what the monitor affords to measure depends on the clock, so nothing
else should run on the machine. A folder holds

    run.jsonl.gz   the monitor's log; `load(folder)` reads it
    steps.npz      loss, norm (of the gradient, before clipping) and lr at every step, taken by the loop itself
    truth.json     what is wrong, where, since when, and how it ended
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import gzip
import json
import math
import multiprocessing
import shutil
import sys
import tempfile
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dyntune
from benchmarks.faults.cases import KINDS, Case, cases
from benchmarks.faults.healthy import is_healthy
from benchmarks.faults.workloads import HALVES
from dyntune.errors import DyntuneError

RUNS = Path(__file__).resolve().parent / ".cache" / "runs"
# Steps take about a millisecond here: 0.3 buys as many measurements as 0.02 does where a step takes 15.
OVERHEAD = 0.3


def folder_of(case: Case, root: Path = RUNS) -> Path:
    return root / case.kind / case.half / case.name.replace("/", "--")


def load(folder: Path) -> tuple[dyntune.Run, dict[str, np.ndarray], dict[str, Any]]:
    """The monitor's record, the loop's own arrays and the truth of a stored run."""
    with tempfile.TemporaryDirectory() as place:
        plain = Path(place) / "run.jsonl"
        with gzip.open(folder / "run.jsonl.gz", "rb") as packed, plain.open("wb") as out:
            shutil.copyfileobj(packed, out)
        run = dyntune.load_run(plain)
    with np.load(folder / "steps.npz") as stored:
        arrays = dict(stored)
    return run, arrays, json.loads((folder / "truth.json").read_text())


def is_stored(case: Case, root: Path = RUNS) -> bool:
    """Whether the run is there, as it is defined now."""
    try:
        return bool(json.loads((folder_of(case, root) / "truth.json").read_text())["digest"] == case.digest)
    except FileNotFoundError:
        return False


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _train(case: Case, log: Path, overhead: float, steps: int | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One run: what is true of it, and the arrays."""
    training = case.training(steps=steps)
    start = training.evaluate()
    wall, cpu = time.perf_counter(), time.thread_time()
    # With weights that are NaN curvature is refused, which "raise" would raise: there the default, its warnings kept.
    on_error: Literal["warn", "raise"] = "warn" if case.kind == "faults" else "raise"
    with (
        warnings.catch_warnings(record=True) as caught,
        dyntune.Monitor(
            training.model,
            training.optimizer,
            criterion=training.criterion,
            log=log,
            overhead=overhead,
            on_error=on_error,
            clipped=training.clip is not None,
            seed=case.seed,
        ) as monitor,
    ):
        warnings.simplefilter("always")
        training.loop(monitor)
    truth = case.truth(training) | {"digest": case.digest, "steps": training.step, "overhead": overhead}
    truth |= {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.thread_time() - cpu}
    truth |= {"diverged": training.diverged, "dyntune": dyntune.__version__}
    truth["warnings"] = sorted({str(warning.message) for warning in caught})
    truth |= {"start": _finite(start), "end": _finite(training.evaluate())}
    if case.kind != "faults":
        truth["healthy"] = is_healthy(training.losses, start)
    columns = {"loss": training.losses, "norm": training.norms, "lr": training.lrs}
    return truth, {name: np.array(values) for name, values in columns.items()}


def record(case: Case, *, root: Path = RUNS, overhead: float = OVERHEAD, steps: int | None = None) -> dict[str, Any]:
    """Run one case and store it; `steps` shortens it."""
    folder = folder_of(case, root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as place:
        part = Path(place) / "run"
        part.mkdir()
        log = part / "run.jsonl"
        truth, arrays = _train(case, log, overhead, steps)
        with log.open("rb") as plain, gzip.open(part / "run.jsonl.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
        log.unlink()
        np.savez_compressed(part / "steps.npz", **arrays)
        (part / "truth.json").write_text(json.dumps(truth, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    return truth


def _start_worker(nice: int) -> None:
    torch.set_num_threads(1)
    os.nice(nice)


def _work(task: tuple[Case, float]) -> tuple[str, bool]:
    case, overhead = task
    try:
        truth = record(case, overhead=overhead)
    except (DyntuneError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # the monitor's: to be mended
        return f"{case.name}: FAILED, {type(error).__name__}: {error}", False
    made = f"{truth['steps']} steps in {truth['wall_seconds']:.1f} s, {truth['start']} -> {truth['end']}"
    warned = f", warned: {truth['warnings']}" if truth["warnings"] else ""
    return f"{case.name}: {made}{'' if truth.get('healthy', True) else ', NOT HEALTHY'}{warned}", True


def status() -> None:
    for kind in KINDS:
        for half in HALVES:
            every = cases(kind, half=half)
            stored = [case for case in every if is_stored(case)]
            truths = [json.loads((folder_of(case) / "truth.json").read_text()) for case in stored]
            steps, seconds = sum(t["steps"] for t in truths), sum(t["wall_seconds"] for t in truths)
            left_out = [t["case"] for t in truths if not t.get("healthy", True)]
            print(f"{kind:8} {half:5} {len(stored):4} of {len(every):4} runs, {steps:9,} steps, {seconds:6.0f} s")
            if left_out:
                print(f"         not healthy: {', '.join(left_out)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="faults")
    parser.add_argument("--half", choices=HALVES, default="tune")
    parser.add_argument("--only", default="*", help="names that match this pattern")
    parser.add_argument("--limit", type=int, help="at most so many runs")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--overhead", type=float, default=OVERHEAD)
    parser.add_argument("--status", action="store_true")
    args = parser.parse_args()
    if args.status:
        status()
        return
    missing = [c for c in cases(args.kind, half=args.half) if fnmatch(c.name, args.only) and not is_stored(c)]
    tasks = [(case, args.overhead) for case in missing[: args.limit]]
    failed = 0
    with multiprocessing.get_context("spawn").Pool(args.jobs, initializer=_start_worker, initargs=(args.nice,)) as pool:
        for done, (line, went_well) in enumerate(pool.imap_unordered(_work, tasks), start=1):
            failed += not went_well
            print(f"[{done}/{len(tasks)}] {time.strftime('%H:%M:%S')} {line}", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(tasks)} runs failed")


if __name__ == "__main__":
    main()
