"""What EntropyCallback costs a training: CPU time of PPO on CartPole with it over without, interleaved pairs.

Ten rollouts of 2,048 steps with stable-baselines3's defaults, one thread; the order alternates within pairs. The ratio
is that of the process's CPU time, which waiting for a busy machine does not lengthen.

    python benchmarks/rl/overhead.py
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peer_suite.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.json"
PAIRS, ROLLOUTS = 8, 10


def seconds(watched: bool, seed: int) -> tuple[float, int]:
    """CPU time of a training, and how many readings there were."""
    from stable_baselines3 import PPO

    from dyntune.integrations.stable_baselines3 import EntropyCallback

    callback = EntropyCallback()
    model = PPO("MlpPolicy", "CartPole-v1", seed=seed, device="cpu")
    began = time.process_time()
    model.learn(2048 * ROLLOUTS, callback=callback if watched else None)
    return time.process_time() - began, len(callback.readings)


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    seconds(True, 0)  # imports and first-time allocations
    rows = []
    for pair in range(PAIRS):
        order = (True, False) if pair % 2 else (False, True)
        found = {watched: seconds(watched, pair) for watched in order}
        rows.append({"with": found[True][0], "without": found[False][0], "readings": found[True][1]})
        print(rows[-1], flush=True)
    ratio = np.array([r["with"] / r["without"] - 1 for r in rows])
    drawn = ratio[np.random.default_rng(0).integers(0, PAIRS, (10_000, PAIRS))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    result = {"pairs": rows, "overhead": {"mean": float(ratio.mean()), "low": float(low), "high": float(high)}}
    result["provenance"] = provenance() | {"command": "python benchmarks/rl/overhead.py"}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(result["overhead"])


if __name__ == "__main__":
    main()
