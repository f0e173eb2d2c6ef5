"""FrozenLake with exact gradients: which learning rates converge at each entropy weight, and what was predicted.

    python benchmarks/rl/frozen_lake.py

The soft return of gymnasium's own transition table, its maximum by soft value iteration, and the edge 2 / lambda_max of
minus the Hessian there. Gradient ascent, exact, at every rate of an absolute grid (powers of 1.15), from beside the
maximum and from the uniform policy; it has converged when the norm of the gradient has reached 1e-6. The observed edge
lies between the highest rate that converges and the next one. Writes results/frozen_lake.json.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import json
import math
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peer_suite.provenance import provenance
from dyntune.rl import TabularMDP

RESULT = Path(__file__).resolve().parent / "results" / "frozen_lake.json"
GAMMAS = (0.9, 0.99)
TAUS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.0)
STEP = 1.15  # of the grid of learning rates
AROUND = 12  # rates either side of the prediction; the grid itself is absolute
CONVERGED = 1e-6
MOST = 30_000  # steps
BESIDE = 1e-3  # entries of the push away from the maximum
LOW_ENOUGH = 0.3  # |log2 ratio| that is asked for
CHECKED = 50  # steps between two looks at what has converged


def gradient(mdp: TabularMDP, logits: np.ndarray, tau: float) -> np.ndarray:
    """Of the soft return for many tables of logits at once. Shape (n, S, A), as `logits`."""
    p, r, rho = (x.numpy() for x in (mdp.transitions, mdp.rewards, mdp.start))
    shifted = logits - logits.max(-1, keepdims=True)
    log_pi = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    pi = np.exp(log_pi)
    moved = np.eye(mdp.states) - mdp.gamma * np.einsum("nsa,sat->nst", pi, p)
    reward = r - tau * log_pi
    v = np.linalg.solve(moved, (pi * reward).sum(-1)[..., None])[..., 0]
    visits = np.linalg.solve(moved.swapaxes(-1, -2), np.broadcast_to(rho, v.shape)[..., None])[..., 0]
    advantage = reward + mdp.gamma * np.einsum("sat,nt->nsa", p, v) - v[..., None]
    return np.asarray(visits[..., None] * pi * advantage)


def ascended(mdp: TabularMDP, start: np.ndarray, rates: np.ndarray, tau: float) -> np.ndarray:
    """Which of the rates converge from a start. Shape (rates,)."""
    x = np.repeat(start[None], len(rates), axis=0)
    done = np.zeros(len(rates), dtype=bool)
    with np.errstate(all="ignore"):
        for step in range(MOST):
            g = gradient(mdp, x, tau)
            x = x + rates[:, None, None] * g
            if step % CHECKED == 0:
                done |= np.sqrt((g**2).sum((1, 2))) < CONVERGED
                x = np.where(np.isfinite(x), x, 0.0)  # a run that overflowed begins again, and fails again
                if done.all():
                    break
    return done


def cell(gamma: float, tau: float) -> dict[str, Any]:
    """One discount and entropy weight."""
    mdp = TabularMDP.from_table(gymnasium.make("FrozenLake-v1").unwrapped.P, gamma=gamma)  # type: ignore[attr-defined]
    optimum = mdp.soft_optimum(tau)
    size = optimum.numel()
    hessian = torch.autograd.functional.hessian(lambda x: mdp.value(x, tau), optimum).reshape(size, size)
    predicted = 2 / float(torch.linalg.eigvalsh(-hessian)[-1])
    middle = round(math.log(predicted, STEP))
    rates = STEP ** np.arange(middle - AROUND, middle + AROUND + 1, dtype=float)
    push = np.random.default_rng(0).standard_normal(tuple(optimum.shape)) * BESIDE
    found: dict[str, Any] = {"gamma": gamma, "tau": tau, "predicted": predicted}
    found["ceiling"] = 2 / mdp.smoothness_bound(tau)
    for name, start in (("beside", optimum.numpy() + push), ("uniform", np.zeros(tuple(optimum.shape)))):
        good = ascended(mdp, start, rates, tau)
        highest = int(np.flatnonzero(good)[-1]) if good.any() else None
        edge = None if highest is None or highest == len(rates) - 1 else float(rates[highest] * math.sqrt(STEP))
        found[name] = {
            "observed": edge,
            "log2_ratio": None if edge is None else math.log2(edge / predicted),
            "holes": int((~good[: highest or 0]).sum()),
        }
    return found


def main() -> None:
    cells = []
    for gamma in GAMMAS:
        for tau in TAUS:
            cells.append(cell(gamma, tau))
            print(json.dumps(cells[-1]), flush=True)
    summary = {}
    for name in ("beside", "uniform"):
        ratios = [c[name]["log2_ratio"] for c in cells]
        within = sum(x is not None and abs(x) <= LOW_ENOUGH for x in ratios)
        known = [abs(x) for x in ratios if x is not None]
        summary[name] = {"within": within, "of": len(cells), "worst": max(known, default=None), "known": len(known)}
    print(json.dumps(summary, indent=1))
    result = {"schema": 1, "about": "edges of gradient ascent on the soft return, predicted and observed"}
    result |= {"step": STEP, "summary": summary, "cells": cells}
    result["provenance"] = provenance() | {"command": "python benchmarks/rl/frozen_lake.py"}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
