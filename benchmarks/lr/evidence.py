"""What `suggest_lr` measures on the scenarios: the inputs of its rule, recorded once per seed.

    python benchmarks/lr/evidence.py --half tune [--max-gradients N] [--seeds N] [--jobs N]

Writes results/evidence-HALF.json anew (evidence-HALF-N.json for another budget than 200); a few minutes on one core.
`fit.py` fits the rule to the tune half.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peer_suite.provenance import provenance

import dyntune
from benchmarks.lr.scenario import Scenario
from benchmarks.lr.scenarios import SCENARIOS
from dyntune.errors import DyntuneError

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = 5
# Apart from the seeds that the sweeps (0 to 4) and the fresh runs (100 to 104) use for weights and order of the rows.
FIRST_SEED = 1000
BUDGET = 200  # the default of suggest_lr
FEATURES = {
    "vertex": "best in short runs",
    "pick": "best rate tried in short runs",
    "blow_up": "lowest rate that blew up",
    "survived": "highest rate that short runs survived",
    "tried": "highest rate tried",
    "critical": "one-step critical rate at the start",
    "usual": "usual rate",
}


def number(item: Any) -> float | None:
    value = item.get("value") if isinstance(item, dict) else item
    return value if value is not None and math.isfinite(value) and value > 0 else None


def measure(scenario: Scenario, seed: int, max_gradients: int) -> dict[str, Any]:
    """One suggestion and what it rests on; learning rates."""
    model = scenario.new_model(FIRST_SEED + seed)
    try:
        found = dyntune.suggest_lr(
            model,
            scenario.loader(FIRST_SEED + seed),
            scenario.loss_fn,
            optimizer=scenario.new_optimizer(model, 1.0),
            num_steps=scenario.steps,
            schedule=scenario.schedule,
            clip_norm=scenario.clip,
            max_gradients=max_gradients,
            seed=seed,
            progress=False,
        ).to_dict()
    except DyntuneError as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    row = {name: number(found["evidence"][key]) for name, key in FEATURES.items()}
    row |= {name: found[name] for name in ("value", "low", "high", "status", "cost")}
    limit = found["max_stable"] or {}
    row |= {f"max_stable{end}": limit.get(end.strip("_") or "value") for end in ("", "_low", "_high")}
    return json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.6g}"))


def _measured(task: tuple[str, int, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, seed, max_gradients = task
    return measure(SCENARIOS[name], seed, max_gradients)


def path_of(half: str, max_gradients: int = BUDGET) -> Path:
    """Where the evidence of a half at a budget is written."""
    return RESULTS / f"evidence-{half}{'' if max_gradients == BUDGET else f'-{max_gradients}'}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--half", choices=("tune", "test"), required=True)
    parser.add_argument("--max-gradients", type=int, default=BUDGET)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    names = [scenario.name for scenario in SCENARIOS.values() if scenario.half == options.half]
    tasks = [(name, seed, options.max_gradients) for name in names for seed in range(options.seeds)]
    found: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for (name, seed, _), row in zip(tasks, pool.imap(_measured, tasks), strict=True):
            entry = found.setdefault(name, {"digest": SCENARIOS[name].digest(), "seeds": {}})
            entry["seeds"][str(seed)] = row
            print(name, seed, row.get("value", row), flush=True)
    text = json.dumps(
        {"provenance": provenance(), "max_gradients": options.max_gradients, "scenarios": found}, indent=1
    )
    path_of(options.half, options.max_gradients).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
