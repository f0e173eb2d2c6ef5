"""The counter-example of Reddi et al.: does Adam at the suggested beta2 go where it should?

    python benchmarks/beta2/reddi.py

Slopes of C with probability 1.1 / (C + 1) and of -1 otherwise push a weight in [-1, 1]: the mean slope is 0.1, and the
best place is -1. With a short memory the steep slopes are divided by their own size, and Adam goes to 1 (Reddi et al.
2018, arXiv:1904.09237, section 3 and figure 1; here with Adam's usual beta1 = 0.9, and in the stochastic form of their
theorem 3). Every C is trained at three learning rates, at eight values of beta2 and at the suggested one, for 60,000
steps, with 20 seeds; a weight's *distance* is that of its mean over the last tenth from -1, as a share of the interval:
0 is the best place, 1 the worst, a half is nowhere.

Takes a minute and a half on one core. Exit status 1 if the suggested value is farther off than the best fixed one by
more than a tenth where the rare slopes come at least three times within the suggested memory.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dyntune
from benchmarks.peer_suite.provenance import provenance

RESULT = Path(__file__).resolve().parent / "results" / "reddi.json"
SCHEMA = 1
STEEP = (4, 10, 100, 1000)
RATES = (1e-3, 1e-2, 1e-1)
FIXED = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)
SEEDS, STEPS, TAIL = 20, 60_000, 0.1
SURPLUS = 0.1  # mean slope
BETA1 = 0.9


def chance(steep: float) -> float:
    """Of a steep slope: the mean of all is `SURPLUS`."""
    return (1 + SURPLUS) / (steep + 1)


class Slope(nn.Module):
    """A weight, as a matrix of one entry, that the given slope pushes."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), start))

    def forward(self, slope: torch.Tensor) -> torch.Tensor:
        return slope.mean() * self.weight


def suggested(steep: float, lr: float) -> dyntune.Recommendation:
    """What `suggest_beta2` says from the other end of the interval, where the size of the weight is 1."""
    rng = np.random.default_rng([0, int(steep)])
    slopes = np.where(rng.random(400) < chance(steep), steep, -1.0)
    model = Slope(1.0)
    return dyntune.suggest_beta2(
        model,
        [torch.tensor([[s]], dtype=torch.float32) for s in slopes],
        lambda m, batch: m(batch[0]).mean(),
        optimizer=torch.optim.Adam(model.parameters(), lr=lr),
        num_steps=STEPS,
        max_gradients=200,
    )


def distances(steep: float, lr: float, betas: tuple[float, ...]) -> dict[float, list[float]]:
    """From the best place at the end, by beta2, seed by seed; the same slopes for every beta2."""
    rng = np.random.default_rng([1, int(steep)])
    weights = {b: nn.Parameter(torch.zeros(SEEDS)) for b in betas}
    optimizers = [torch.optim.Adam([w], lr=lr, betas=(BETA1, b)) for b, w in weights.items()]
    sums = dict.fromkeys(betas, torch.zeros(SEEDS))
    tail = math.ceil(TAIL * STEPS)
    for step in range(STEPS):
        slope = torch.tensor(np.where(rng.random(SEEDS) < chance(steep), steep, -1.0), dtype=torch.float32)
        for weight, optimizer in zip(weights.values(), optimizers, strict=True):
            weight.grad = slope.clone()
            optimizer.step()
            weight.data.clamp_(-1.0, 1.0)
        if step >= STEPS - tail:
            sums = {b: sums[b] + weights[b].detach() for b in betas}
    return {b: ((total / tail + 1) / 2).tolist() for b, total in sums.items()}


def cell(steep: float, lr: float) -> dict[str, Any]:
    """One C at one rate."""
    rec = suggested(steep, lr)
    ours = float(rec)
    found = distances(steep, lr, (*FIXED, ours))
    return {
        "steep": steep,
        "lr": lr,
        "suggested": ours,
        "bound": rec.evidence["active bound"],
        "within_memory": chance(steep) / (1 - ours),
        "fixed": {
            str(b): [float(np.mean(found[b])), float(np.std(found[b], ddof=1) / math.sqrt(SEEDS))] for b in FIXED
        },
        "ours": [float(np.mean(found[ours])), float(np.std(found[ours], ddof=1) / math.sqrt(SEEDS))],
    }


def main() -> int:
    """Train, save, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    cells = []
    for steep, lr in itertools.product(STEEP, RATES):
        cells.append(cell(steep, lr))
        print(json.dumps(cells[-1]), file=sys.stderr, flush=True)
    result = {"schema": SCHEMA, "provenance": provenance(), "steps": STEPS, "seeds": SEEDS, "cells": cells}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    off = [c for c in cells if c["within_memory"] >= 3 and c["ours"][0] > min(m for m, _ in c["fixed"].values()) + 0.1]
    return int(bool(off))


if __name__ == "__main__":
    sys.exit(main())
