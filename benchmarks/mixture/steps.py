"""Steps to a target loss: suggested shares beside equal shares and shares like the weights, on real mixtures.

    python benchmarks/mixture/steps.py --seconds 200      # goes on where it was; again until it says "complete"
    python benchmarks/mixture/steps.py --again text       # seeds 10 to 29, everything else as it was: does it hold?

All three train with stratified batches and importance weights, so that the objective is the same; SGD without momentum
at a constant rate. The suggested shares are measured anew every 50 steps from 8 rows of each source (averaged over the
last looks): those rows count in "rows", not in "steps". Chosen on seeds 100 to 102: the target (the best over rates of
the mean held-out loss that shares like the weights reach at two thirds of the run), and for each method its own rate,
the one with the fewest mean steps to the target, out of powers of two. Reported on seeds 0 to 9. The held-out loss is
the mean of the last three looks; a run that does not get to the target counts as its whole length, and as a failure. As
three seeds may choose a rate that fails on others, the methods are also compared at one rate, that of the suggested
shares.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.mixture.problems import Problem, loss_fn, problem, row_losses
from benchmarks.peer_suite.provenance import provenance
from dyntune.suggest.mixture import suggest_mixture
from dyntune.training.mixture_sampler import MixtureSampler

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "mixture-steps.jsonl"
RESULT = HERE / "results" / "steps.json"
VERSION = 1
PROBLEMS = ("digits", "lengths", "text")
METHODS = ("uniform", "proportional", "suggested")
RATES = {"digits": range(-5, 1), "text": range(-4, 2), "lengths": range(-4, 2)}  # powers of two
TUNING, SEEDS, AGAIN = (100, 101, 102), tuple(range(10)), tuple(range(10, 30))
LOOK, ROWS = 50, 8


def train(p: Problem, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Held-out losses of one run, and what the shares were."""
    model, k = p.new_model(seed), len(p.names)
    shares = [1 / k] * k if method == "uniform" else list(p.weights)
    sizes = [len(x) for x, _ in p.train]
    sampler = MixtureSampler(sizes, shares, batch_size=p.batch, weights=p.weights, seed=seed)
    x, y = torch.cat([x for x, _ in p.train]), torch.cat([y for _, y in p.train])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found, losses, seen, measured = None, [p.held_out_loss(model)], [], 0
    rng = np.random.default_rng(seed)
    for step in range(1, p.steps + 1):
        if method == "suggested" and step % LOOK == 1:
            picks = [rng.permutation(n)[:ROWS] for n in sizes]
            rows = {n: (a[i], b[i]) for n, (a, b), i in zip(p.names, p.train, picks, strict=True)}
            found = suggest_mixture(
                rows, p.weights, model=model, loss_fn=loss_fn, num_gradients=ROWS, previous=found, seed=step
            )
            measured += int(found.cost)
            if found.proportions is not None:
                sampler.update(found)
                seen.append([round(s, 4) for s in found.proportions])
        indices = sampler.next_batch()
        optimizer.zero_grad()
        (sampler.importance(indices) * row_losses(model, (x[indices], y[indices]))).mean().backward()
        optimizer.step()
        if step % p.every == 0:
            losses.append(p.held_out_loss(model))
            if not math.isfinite(losses[-1]) or losses[-1] > 10 * losses[0]:
                break
    return {"losses": [round(v, 5) if math.isfinite(v) else None for v in losses], "shares": seen, "measured": measured}


def smoothed(run: dict[str, Any]) -> np.ndarray:
    """Mean of the last three looks."""
    losses = np.array([math.inf if v is None else v for v in run["losses"]])
    return np.array([losses[max(0, i - 2) : i + 1].mean() for i in range(len(losses))])


def steps_to(p: Problem, run: dict[str, Any], target: float) -> float | None:
    """Steps until the smoothed loss is at the target; None where it never is."""
    reached = np.nonzero(smoothed(run) <= target)[0]
    return float(reached[0] * p.every) if len(reached) else None


class Runs:
    """What is there, and what is made before the time is up."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds
        CACHE.parent.mkdir(exist_ok=True)
        lines = CACHE.read_text().splitlines() if CACHE.exists() else []
        self.found = {json.dumps(line["key"]): line["run"] for line in map(json.loads, lines)}

    def of(self, name: str, method: str, power: int, seed: int) -> dict[str, Any]:
        key = [VERSION, problem(name).digest(), name, method, power, seed]
        if json.dumps(key) not in self.found:
            if time.monotonic() > self.until:
                print("time is up: run again")
                sys.exit(3)
            run = train(problem(name), method, 2.0**power, seed)
            with CACHE.open("a") as file:
                file.write(json.dumps({"key": key, "run": run}) + "\n")
            self.found[json.dumps(key)] = run
        return self.found[json.dumps(key)]


def interval(ratios: np.ndarray) -> dict[str, Any]:
    """Geometric mean over seeds, with a paired bootstrap over them."""
    rng = np.random.default_rng(0)
    logs = np.log(ratios)
    boot = np.exp(rng.choice(logs, (10_000, len(logs))).mean(1))
    low, high = (float(v) for v in np.quantile(boot, (0.025, 0.975)))
    return {"geometric_mean": float(np.exp(logs.mean())), "low": low, "high": high, "level": 0.95}


def judge(name: str, runs: Runs, seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    p, powers = problem(name), RATES[name]
    tuned = {m: {r: [runs.of(name, m, r, s) for s in TUNING] for r in powers} for m in METHODS}
    at = 2 * p.steps // 3 // p.every

    def reached(each: list[dict[str, Any]]) -> float:
        return float(np.mean([smoothed(run)[at] if len(smoothed(run)) > at else math.inf for run in each]))

    target = min(reached(each) for each in tuned["proportional"].values())
    rate = {}
    for m in METHODS:
        means = {r: np.mean([steps_to(p, run, target) or p.steps for run in tuned[m][r]]) for r in powers}
        rate[m] = min(means, key=lambda r: means[r])
    final = {m: [runs.of(name, m, rate[m], s) for s in seeds] for m in METHODS}
    steps = {m: [steps_to(p, run, target) for run in final[m]] for m in METHODS}
    whole = {m: np.array([v or p.steps for v in steps[m]]) for m in METHODS}
    looks = np.ceil(whole["suggested"] / LOOK) * ROWS * len(p.names)
    rows = {m: whole[m] * p.batch + (looks if m == "suggested" else 0.0) for m in METHODS}
    same = {m: [steps_to(p, runs.of(name, m, rate["suggested"], s), target) for s in seeds] for m in METHODS}
    equal = {m: np.array([v or p.steps for v in same[m]]) for m in METHODS}
    last = [run["shares"][-1] for run in final["suggested"] if run["shares"]]
    return {
        "problem": name,
        "data": p.digest(),
        "weights": p.weights,
        "target": target,
        "rates": {m: 2.0**r for m, r in rate.items()},
        "rate_at_an_end_of_the_grid": [m for m, r in rate.items() if r in (powers[0], powers[-1])],
        "steps": steps,
        "mean_steps": {m: float(v.mean()) for m, v in whole.items()},
        "failures": {m: sum(v is None for v in steps[m]) for m in METHODS},
        "steps_ratio": {m: interval(whole["suggested"] / whole[m]) for m in ("uniform", "proportional")},
        "rows_ratio": {m: interval(rows["suggested"] / rows[m]) for m in ("uniform", "proportional")},
        "at_the_rate_of_suggested": {
            m: {"failures": sum(v is None for v in same[m])} | interval(equal["suggested"] / equal[m])
            for m in ("uniform", "proportional")
        },
        "last_shares": np.mean(last, axis=0).round(3).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=math.inf)
    torch.set_num_threads(1)
    parser.add_argument("--again", choices=PROBLEMS)
    given = parser.parse_args()
    runs = Runs(given.seconds)
    if given.again:
        record = judge(given.again, runs, AGAIN)
        print(json.dumps({k: v for k, v in record.items() if k != "steps"}), flush=True)
        path = RESULT.with_name(f"steps-again-{given.again}.json")
        path.write_text(json.dumps({"about": provenance(), "seeds": AGAIN, "problems": [record]}, indent=1) + "\n")
        return
    records = []
    for name in PROBLEMS:
        records.append(judge(name, runs))
        print(json.dumps({k: v for k, v in records[-1].items() if k != "steps"}), flush=True)
    RESULT.write_text(json.dumps({"about": provenance(), "problems": records}, indent=1) + "\n")
    print("complete")


if __name__ == "__main__":
    main()
