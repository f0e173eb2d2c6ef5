"""Suggested pairs of learning rate and entropy coefficient for PPO, against the brute force and the defaults.

The rule was written down before any pilot of it was run; CartPole's grid had been seen (two of three seeds), Acrobot's
had not. Pilots take seeds 1000 to 1002, the comparison ten fresh ones; intervals are bootstraps over those, paired.

    python benchmarks/rl/suggested.py
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peer_suite.provenance import provenance
from benchmarks.rl.brute_force import ALPHAS, CACHE, FRESH, RATES, SEEDS, STEPS, key, known, run

RESULTS = Path(__file__).resolve().parent / "results" / "suggested.json"
DEFAULTS = (0.0, 3e-4)  # stable-baselines3's entropy coefficient and rate


def suggest(env: str) -> dict[str, Any]:
    """The pair, with what it cost."""
    from stable_baselines3 import PPO

    from dyntune.integrations.stable_baselines3_lr import suggest_lr_for

    began = time.perf_counter()
    found = suggest_lr_for(lambda lr, seed: PPO("MlpPolicy", env, learning_rate=lr, seed=seed, device="cpu"), seed=1000)
    alpha = DEFAULTS[0] if found.entropy is None or found.entropy.value is None else found.entropy.value
    return {
        "alpha": alpha,
        "lr": float(found.lr),
        "status": found.lr.status.name,
        "scores": {f"{r:g}": list(s) for r, s in found.scores.items()},
        "steps": found.steps,
        "steps_of_a_training": STEPS[env],
        "seconds": time.perf_counter() - began,
    }


def paired(a: list[float], b: list[float], *, seed: int = 0) -> dict[str, float]:
    """Mean of a / b - 1 over means, with a bootstrap over seeds."""
    rows = np.array([a, b])
    rng = np.random.default_rng(seed)
    drawn = rows[:, rng.integers(0, rows.shape[1], (10_000, rows.shape[1]))].mean(-1)
    low, high = np.quantile(drawn[0] / drawn[1] - 1, [0.025, 0.975])
    return {"mean": float(rows[0].mean() / rows[1].mean() - 1), "low": float(low), "high": float(high)}


def main() -> None:
    os.nice(5)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    result: dict[str, Any] = {"envs": {}}
    for env in sorted(STEPS, reverse=True):
        pair = suggest(env)
        print(env, pair, flush=True)
        grid = known()
        means = {
            (a, lr): float(np.mean([grid[key(env, a, lr, s)]["score"] for s in SEEDS])) for a in ALPHAS for lr in RATES
        }
        best = max(means, key=lambda k: means[k])
        rows = {"suggested": (pair["alpha"], pair["lr"]), "best of the grid": best, "defaults": DEFAULTS}
        run([(env, *cell, s) for cell in dict.fromkeys(rows.values()) for s in FRESH])
        runs = known()
        fresh = {name: [runs[key(env, *cell, s)]["score"] for s in FRESH] for name, cell in rows.items()}
        result["envs"][env] = {
            "suggested": pair,
            "cells": {name: list(cell) for name, cell in rows.items()},
            "scores": fresh,
            "against the best": paired(fresh["suggested"], fresh["best of the grid"]),
            "against the defaults": paired(fresh["suggested"], fresh["defaults"]),
            "grid": [[a, lr, m] for (a, lr), m in means.items()],
            "below the suggested pair": sum(m < means.get((pair["alpha"], pair["lr"]), np.nan) for m in means.values()),
        }
        print(env, result["envs"][env]["against the best"], result["envs"][env]["against the defaults"], flush=True)
    result["provenance"] = provenance() | {"command": "python benchmarks/rl/suggested.py", "cache": CACHE.name}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
