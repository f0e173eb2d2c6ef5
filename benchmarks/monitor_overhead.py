"""What watching a training costs, beside the bare loop, interleaved and paired in one run.

    python benchmarks/monitor_overhead.py

Two copies of one training take turns, a block of steps each, one of them watched (`monitor.watch`, a loss for every
step, a log on disk). Times are CPU seconds of this process on one thread, so other programs on the machine do not
count. Three phases for each model: *first*, until everything was measured once, which costs the same however long
training is and is given in seconds; *steady*, the rest, as the ratio of paired blocks less 1, with a bootstrap over
blocks; and *by its own clock*, what the monitor says of itself and how often it would measure each thing from then on.
The cost of a step on which nothing is measured is that of hooks alone, from pairs of `optimizer.step()` on the same
parameters with and without them, gradients left as they are.

Takes about six minutes on one core. Exit status 1 if a steady overhead's interval lies above its budget (2% where a
step takes 2.5 ms or more, 50 microseconds per step below), or an idle step costs more than 30 microseconds.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_suite.paired import MODELS, SEED, Training, paired, summary
from peer_suite.provenance import provenance
from peer_suite.watchers import Dyntune
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dyntune
from dyntune.monitor.monitor import SHARES

RESULT = Path(__file__).resolve().parent / "results" / "monitor_overhead.json"
SCHEMA = 1
IDLE_LIMIT = 30e-6
BUDGET, FLOOR = 0.02, 50e-6  # what a monitor's defaults promise


def overhead(name: str, pairs: int | None) -> dict[str, Any]:
    """Bare and watched, in turn."""
    make, block, usual = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        bare, watched = Training(make), Dyntune(make, Path(folder), block)
        bare.steps(block)
        first, count = 0.0, 0
        while not watched.ready and count < 100:
            first += watched.steps(block) - bare.steps(block)
            count += 1
        times = paired(bare.steps, watched.steps, block=block, pairs=usual if pairs is None else pairs)
        budget = watched.monitor._session.budget
        cost = summary(times)
        periods = {kind: _json(budget.period(kind, share=share)) for kind, share in SHARES.items()}
        found = {
            "parameters": sum(p.numel() for p in bare.model.parameters()),
            "steps": len(times.bare) * block,
            "step_seconds": times.step_seconds,
            "first_seconds": first,
            "first_steps": count * block,
            "steady_overhead": cost["overhead"],
            "steady_interval": cost["interval"],
            "seconds_per_step": cost["seconds_per_step"],
            "own_clock": {
                "overhead_with_first": budget.share,
                "hooks_per_step": budget.kinds["hooks"] / budget.steps,
                "records_per_step": budget.kinds["log"] / budget.steps,
                "costs": dict(budget.costs),
                "steps_between": periods,
            },
        }
        watched.close()
    return found


def _json(value: float) -> float | None:
    return value if np.isfinite(value) else None


def idle(repetitions: int) -> dict[str, Any]:
    """Hooks alone, on steps on which nothing is measured and nothing is written."""
    torch.manual_seed(SEED)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    model(torch.ones(2, 4)).sum().backward()
    with dyntune.Monitor(model, optimizer, overhead=0.0, on_error="raise") as monitor:
        for _ in range(200):  # everything was measured once
            optimizer.step()
        hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        kept = [dict(h) for h in hooks]
        block, pairs = 20, []
        for _ in range(repetitions):
            for h in hooks:
                h.clear()
            without = _steps(optimizer, block)
            for h, held in zip(hooks, kept, strict=True):
                h.update(held)
            monitor._countdown = 10 * block  # no decision falls into the block
            pairs.append((without, _steps(optimizer, block)))
            monitor._landing.pending.steps.clear()
    differences = np.array([(b - a) / block for a, b in pairs])
    rng = np.random.default_rng(SEED)
    medians = np.median(rng.choice(differences, (2000, len(differences))), axis=1)
    return {
        "step_seconds": float(np.median([a / block for a, _ in pairs])),
        "hooks_seconds": float(np.median(differences)),
        "interval": np.quantile(medians, [0.025, 0.975]).tolist(),
    }


def _steps(optimizer: torch.optim.Optimizer, count: int) -> float:
    began = time.process_time()
    for _ in range(count):
        optimizer.step()
    return time.process_time() - began


def main() -> int:
    """Measure, save, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=None, help="of blocks, for every model")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"schema": SCHEMA, "provenance": provenance(), "idle": idle(1000), "models": {}}
    quiet = result["idle"]
    print(f"idle step: {1e6 * quiet['hooks_seconds']:.1f} us for both hooks", file=sys.stderr)
    failed = quiet["interval"][0] > IDLE_LIMIT
    for name in arguments.models:
        found = result["models"][name] = overhead(name, arguments.pairs)
        allowed = max(BUDGET, FLOOR / found["step_seconds"])
        found["allowed"] = allowed
        failed |= found["steady_interval"][0] > allowed
        low, high = (100 * end for end in found["steady_interval"])
        print(
            f"{name}: a step of {1e3 * found['step_seconds']:.2f} ms; steady {100 * found['steady_overhead']:.2f}% "
            f"({low:.2f} .. {high:.2f}) of {100 * allowed:.1f}% allowed; first {found['first_seconds']:.2f} s",
            file=sys.stderr,
        )
        print(f"  {json.dumps(found['own_clock'])}", file=sys.stderr)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
