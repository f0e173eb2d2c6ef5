"""What the monitor's signals cost, relative to one training step of a model of ten million parameters in the same run.

    python benchmarks/signals.py

A step is forward, backward and Adam's update on a batch. Each signal is timed alone on the gradients of that model;
ratios are of medians over interleaved repetitions, with the quartiles of the ratio within repetitions beside them. A
plain sum of every gradient, the least that any statistic of all of them can cost, stands next to them: bytes are those
of the gradients in float32 (plus what else is read, once), over the time. The accuracy of the sketch is measured as
well: the standard deviation of the cosine of two vectors of a million entries, over seeds, beside
(1 - c^2) / sqrt(width).

Takes about two minutes on one core. Exit status 1 if the sketch is more than 10% less accurate than it says.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_suite.provenance import provenance
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dyntune.dynamics.autocorrelation import GradientAutocorrelation
from dyntune.dynamics.momentum import moment_products
from dyntune.dynamics.tensors import second_moments, tensor_sums
from dyntune.numerics.sketch import CountSketch, cosine_error

RESULT = Path(__file__).resolve().parent / "results" / "signals.json"
SCHEMA = 1
WIDTH = 8192
SIZE = 1_000_000
COSINE = 0.3
BATCHES = (16, 128)


def network() -> nn.Module:
    """10.5 million parameters: ten layers of 1024, with their biases, and norms between them."""
    layers: list[nn.Module] = []
    for _ in range(10):
        layers += [nn.Linear(1024, 1024), nn.LayerNorm(1024), nn.GELU()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    return nn.Sequential(*layers)


def clock() -> float:
    """CPU seconds of this process: other programs on the machine do not count."""
    return time.process_time()


def cost(batch: int, repetitions: int) -> dict[str, Any]:
    """Seconds of a step and of every signal, interleaved."""
    model = network()
    named = dict(model.named_parameters())
    parameters, names = list(named.values()), list(named)
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, batch, 1024, generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    step()
    gradients = [p.grad for p in parameters if p.grad is not None]
    sketch, recorder = CountSketch(WIDTH), GradientAutocorrelation(lags=8)
    count = iter(range(10**9))
    sketched = sketch(gradients, names)
    previous = [p.detach().clone() for p in parameters]
    signals: dict[str, Callable[[], object]] = {
        "sum of the gradients": lambda: [g.sum() for g in gradients],
        "norms of the gradients": lambda: torch._foreach_norm(gradients),
        "sketch": lambda: sketch(gradients, names),
        "autocorrelation of a sketch, 8 lags": lambda: recorder.update(sketched, step=next(count)),
        "cosine with the moment": lambda: moment_products(
            gradients, [optimizer.state[p]["exp_avg"] for p in parameters]
        ),
        "tensors: gradient": lambda: tensor_sums(gradients).statistics(),
        "tensors: gradient and moments": lambda: tensor_sums(
            gradients, moments=second_moments(optimizer, parameters, before_step=False)
        ).statistics(),
        "tensors: gradient and moments, eps left out": lambda: tensor_sums(
            gradients, moments=second_moments(optimizer, parameters, before_step=False), below_eps=False
        ).statistics(),
        "tensors: all, with the change": lambda: tensor_sums(
            gradients,
            moments=second_moments(optimizer, parameters, before_step=False),
            parameters=parameters,
            previous=previous,
        ).statistics(),
    }
    times: dict[str, list[float]] = {name: [] for name in ("step", *signals)}
    for repetition in range(repetitions + 2):
        for name, run in (("step", step), *signals.items()):
            began = clock()
            run()
            if repetition >= 2:  # the first ones fill caches
                times[name].append(clock() - began)
        gradients[:] = [p.grad for p in parameters if p.grad is not None]
    numel = sum(p.numel() for p in parameters)
    reads = {
        "tensors: gradient and moments": 2,
        "tensors: gradient and moments, eps left out": 2,
        "tensors: all, with the change": 4,
        "cosine with the moment": 2,
    }
    found: dict[str, Any] = {}
    for name in signals:
        ratios = np.array(times[name]) / np.array(times["step"])
        seconds = float(np.median(times[name]))
        found[name] = {
            "seconds": seconds,
            "of_a_step": seconds / float(np.median(times["step"])),
            "of_a_step_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
            "of_a_sum": seconds / float(np.median(times["sum of the gradients"])),
            "gigabytes_per_second": 4 * numel * reads.get(name, 1) / seconds / 1e9
            if not name.startswith("autocorrelation")
            else None,
        }
    return {
        "parameters": numel,
        "tensors": len(parameters),
        "rows": batch,
        "step_seconds": float(np.median(times["step"])),
        "signals": found,
    }


def accuracy(draws: int) -> dict[str, Any]:
    """Deviation of the cosine over seeds."""
    rng = np.random.default_rng(0)
    side = 1000
    pairs = {
        "normal": rng.standard_normal((2, SIZE)),
        "Student t(2.5)": rng.standard_t(2.5, (2, SIZE)),
        "rank one, positive inputs": np.stack(
            [np.outer(rng.standard_normal(side), np.abs(rng.standard_normal(side))).ravel() for _ in range(2)]
        ),
    }
    found = {}
    for name, (a, b) in pairs.items():
        a = a / np.linalg.norm(a)
        b = b - a * (a @ b)
        b = COSINE * a + np.sqrt(1 - COSINE**2) * b / np.linalg.norm(b)
        x, y = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
        cosines = []
        for seed in range(draws):
            sketch = CountSketch(WIDTH, seed=seed)
            s, t = sketch([x], ["w"]), sketch([y], ["w"])
            cosines.append(float(s @ t / (s.norm() * t.norm())))
        found[name] = {
            "mean": float(np.mean(cosines)),
            "deviation": float(np.std(cosines, ddof=1)),
            "standard_error_of_deviation": float(np.std(cosines, ddof=1) / np.sqrt(2 * draws)),
            "predicted": cosine_error(COSINE, WIDTH),
        }
    return {"entries": SIZE, "width": WIDTH, "cosine": COSINE, "draws": draws, "kinds": found}


def main() -> int:
    """Measure, save, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20, help="of every timing")
    parser.add_argument("--draws", type=int, default=400, help="seeds per kind of vector")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "schema": SCHEMA,
        "provenance": provenance(),
        "cost": [cost(batch, arguments.repetitions) for batch in BATCHES],
        "accuracy": accuracy(arguments.draws),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for case in result["cost"]:
        print(f"{case['rows']} rows, a step of {1e3 * case['step_seconds']:.0f} ms", file=sys.stderr)
        for name, found in case["signals"].items():
            print(f"  {name}: {found['of_a_step']:.4f} of a step, {found['of_a_sum']:.2f} sums", file=sys.stderr)
    kinds = result["accuracy"]["kinds"]
    for name, found in kinds.items():
        print(f"{name}: {found['deviation']:.4f}, predicted {found['predicted']:.4f}", file=sys.stderr)
    return int(
        any(k["deviation"] - 3 * k["standard_error_of_deviation"] > 1.1 * k["predicted"] for k in kinds.values())
    )


if __name__ == "__main__":
    sys.exit(main())
