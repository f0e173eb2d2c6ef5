"""PPO's area under the learning curve over entropy coefficients and learning rates: the truth for a suggested pair.

stable-baselines3's PPO with its defaults otherwise, on gymnasium's CartPole and Acrobot. Every cell is run with three
seeds; the grid's best, the defaults and what is suggested run again on ten fresh ones (see ``suggested.py``). A score
is the mean over training steps of the return of the last episode that had ended, scaled to 0 for the environment's
worst return and 1 for its best.

Resumable: one JSON line for each run in ``--cache``, which the committed results feed where it is missing.

    python benchmarks/rl/brute_force.py --env CartPole-v1 && python benchmarks/rl/brute_force.py --pack
"""

from __future__ import annotations

import argparse
import gc
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

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "brute_force.json"
CACHE = HERE.parent / ".cache" / "rl-brute-force.jsonl"
# Steps are whole rollouts of 2,048: CartPole is solved within the first, Acrobot within the second by good cells.
STEPS = {"CartPole-v1": 15 * 2048, "Acrobot-v1": 20 * 2048}
RANGE = {"CartPole-v1": (0.0, 500.0), "Acrobot-v1": (-500.0, 0.0)}
ALPHAS = (0.0, 0.001, 0.01, 0.1, 1.0)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # stable-baselines3's default is 3e-4 with alpha = 0
SEEDS = (0, 1, 2)
FRESH = tuple(range(100, 110))
KEPT = ("key", "env", "alpha", "lr", "seed", "score", "last", "episodes", "failed", "updates", "seconds")


def key(env: str, alpha: float, lr: float, seed: int) -> str:
    return f"{env}/{alpha:g}/{lr:g}/{seed}"


def known(cache: Path = CACHE) -> dict[str, dict[str, Any]]:
    """Runs that are there, of the committed results and of the cache."""
    found: dict[str, dict[str, Any]] = {}
    if RESULTS.exists():
        found |= {r["key"]: r for r in json.loads(RESULTS.read_text())["runs"]}
    if cache.exists():
        found |= {r["key"]: r for r in map(json.loads, cache.read_text().splitlines())}
    return found


def score(env: str, ends: list[int], returns: list[float], steps: int) -> float:
    """Mean over steps of the last ended episode's return, in [0, 1]; the first one's counts from the beginning."""
    low, high = RANGE[env]
    if not ends:
        return 0.0
    times = np.diff(np.concatenate([[0], np.asarray(ends[1:]), [steps]]))
    return float(np.average((np.asarray(returns) - low) / (high - low), weights=times))


def train(env: str, alpha: float, lr: float, seed: int, *, steps: int | None = None) -> dict[str, Any]:
    """One training; a run whose weights become NaN scores what it had, and the worst return from there on."""
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.monitor import Monitor

    class Record(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, float]] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            values = self.logger.name_to_value
            if "train/approx_kl" in values:
                self.rows.append({k[6:]: float(f"{v:.4g}") for k, v in values.items() if k.startswith("train/")})

    steps = STEPS[env] if steps is None else steps
    watched = Monitor(gymnasium.make(env))
    began, failed, record = time.perf_counter(), "", Record()
    model = PPO("MlpPolicy", watched, learning_rate=lr, ent_coef=alpha, seed=seed, device="cpu")
    try:
        model.learn(steps, callback=record)
    except ValueError as error:  # the distribution's own check of its parameters
        failed = str(error).splitlines()[0][:80]
    returns = list(watched.get_episode_rewards())
    ends = np.cumsum(watched.get_episode_lengths()).tolist()
    if failed:
        ends, returns = [*ends, watched.get_total_steps()], [*returns, RANGE[env][0]]
    kept = [{k: r[k] for k in ("approx_kl", "clip_fraction", "entropy_loss")} for r in record.rows]
    return {
        "key": key(env, alpha, lr, seed),
        "env": env,
        "alpha": alpha,
        "lr": lr,
        "seed": seed,
        "score": score(env, ends, returns, steps),
        "last": score(env, *_late(ends, returns, steps), steps // 5),
        "episodes": len(ends),
        "failed": failed,
        "updates": kept[::3],
        "seconds": time.perf_counter() - began,
    }


def _late(ends: list[int], returns: list[float], steps: int) -> tuple[list[int], list[float]]:
    """Episodes of the last fifth."""
    first = steps - steps // 5
    rows = [(e - first, r) for e, r in zip(ends, returns, strict=True) if e > first]
    return [r[0] for r in rows], [r[1] for r in rows]


def run(jobs: list[tuple[str, float, float, int]], cache: Path = CACHE) -> None:
    """Train what is missing, one after the other, each written as it ends."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    done = known(cache)
    for number, job in enumerate(jobs, 1):
        if key(*job) in done:
            continue
        found = train(*job)
        with cache.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"[{number}/{len(jobs)}] {found['key']}: {found['score']:.3f}, {found['seconds']:.0f} s", flush=True)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", choices=sorted(STEPS))
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--pack", action="store_true", help="write what is there into results/")
    options = parser.parse_args()
    os.nice(options.nice)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if not options.pack:
        for env in [options.env] if options.env else sorted(STEPS, reverse=True):
            run([(env, a, lr, seed) for seed in SEEDS for a in ALPHAS for lr in RATES], options.cache)
        return
    found = sorted(known(options.cache).values(), key=lambda r: str(r["key"]))
    about = provenance() | {"command": "python benchmarks/rl/brute_force.py --pack"}
    lines = ",\n".join(json.dumps({k: r[k] for k in KEPT}) for r in found)
    RESULTS.write_text(f'{{"provenance": {json.dumps(about)},\n"runs": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
