"""What `suggest_lr` measures on the scenarios: the inputs of its rule, recorded once per seed.

    python benchmarks/lr/evidence.py --half tune

Writes results/evidence-HALF.json anew; a few minutes on one core. `fit.py` fits the rule to the tune half.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
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
SEEDS = (0, 1, 2, 3, 4)
# Apart from the seeds that the sweeps (0 to 4) and the fresh runs (100 to 104) use for weights and order of the rows.
FIRST_SEED = 1000
FEATURES = {
    "pick": "best in short runs",
    "blow_up": "lowest rate that blew up",
    "critical": "one-step critical rate at the start",
    "stochastic": "stochastic threshold",
    "deterministic": "deterministic threshold",
}


def number(item: Any) -> float | None:
    value = item.get("value") if isinstance(item, dict) else item
    return value if value is not None and math.isfinite(value) and value > 0 else None


def measure(scenario: Scenario, seed: int) -> dict[str, Any]:
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
            seed=seed,
        ).to_dict()
    except DyntuneError as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    row = {name: number(found["evidence"][key]) for name, key in FEATURES.items()}
    return row | {"value": found["value"], "low": found["low"], "high": found["high"], "status": found["status"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--half", choices=("tune", "test"), required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = RESULTS / f"evidence-{arguments.half}.json"
    found = {}
    for scenario in SCENARIOS.values():
        if scenario.half == arguments.half:
            seeds = {str(seed): measure(scenario, seed) for seed in SEEDS}
            found[scenario.name] = {"digest": scenario.digest(), "seeds": seeds}
            print(scenario.name, [row.get("value") for row in seeds.values()], flush=True)
    path.write_text(json.dumps({"provenance": provenance(), "scenarios": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
