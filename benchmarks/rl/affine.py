"""One joint space for all entropy coefficients: products and accuracy beside solving at every coefficient.

    python benchmarks/rl/affine.py

Both ends of A + alpha B at 41 coefficients from 1e-4 to 1, on random pairs (n = 200: with a few outlying eigenvalues as
losses have them, and without any gap) and on policies for CartPole, before and after some updates, whose truth is the
dense Hessian in double precision. A joint product is one of A and one of B and counts as two; the others solve for the
sum, which a program can differentiate as one loss: one product each. Beside it:

- independent: `dyntune.eigenvalues` at every coefficient, certified, both ends within 0.5%; also with the smallest
  asked for to 2% only, in a solve of its own;
- warm: the same as the first, each begun with the vectors of the coefficient before;
- oracle: plain Lanczos that stops as soon as the *truth* is met, to 0.5% and 2%, which nobody can do; from random
  starts, and from the vectors of the coefficient before.

Writes results/affine.json. Exit status 1 if a value is off by more than 0.5% (largest) or 2% (smallest), a bracket
misses the truth, or more than an eighth of the products of independent solves was needed.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dyntune
from benchmarks.peer_suite.provenance import provenance
from dyntune.numerics.affine import AffineFamily, OperatorPair, affine_spectrum
from dyntune.numerics.operator import CallableOperator, DenseOperator
from dyntune.rl import PolicyObjective
from tests.numerics.test_affine import bulk, symmetric

RESULT = Path(__file__).resolve().parent / "results" / "affine.json"
ALPHAS = [float(x) for x in np.geomspace(1e-4, 1, 41)]
LARGEST, SMALLEST = 5e-3, 2e-2  # accuracies asked for
MATRICES, POLICIES = 10, 3  # seeds
ROWS, UPDATES, RATE, DISCOUNT = 1024, 30, 3e-3, 0.99
ROUNDING = 1e-5  # of the larger end: products in float32 against a dense Hessian in float64


@dataclass
class Problem:
    """A pair, measured through `family`, known through `a` and `b`."""

    name: str
    seed: int
    family: AffineFamily
    a: torch.Tensor
    b: torch.Tensor
    slack: float


def matrices() -> Iterator[Problem]:
    for seed in range(MATRICES):
        for name, make in (("outliers", symmetric), ("bulk", bulk)):
            a, b = make(200, seed), 2 * make(200, 100 + seed)
            yield Problem(name, seed, OperatorPair(DenseOperator(a), DenseOperator(b)), a, b, 1e-9)


def evaluate(policy: Any, x: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = Categorical(logits=policy(x))
    return found.log_prob(actions), found.entropy()


def rollout(policy: nn.Module, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Observations, actions and discounted returns to go of CartPole."""
    generator = torch.Generator().manual_seed(seed)
    env = gymnasium.make("CartPole-v1")
    state, _ = env.reset(seed=seed)
    states, actions, ends = [], [], []
    while len(states) < ROWS:
        x = torch.as_tensor(state, dtype=torch.float32)
        with torch.no_grad():
            action = int(torch.multinomial(torch.softmax(policy(x), -1), 1, generator=generator))
        state, _, terminated, truncated, _ = env.step(action)
        states.append(x)
        actions.append(action)
        ends.append(terminated or truncated)
        if ends[-1]:
            state, _ = env.reset()
    to_go, total = [0.0] * ROWS, 0.0
    for t in reversed(range(ROWS)):
        total = 1.0 + (0.0 if ends[t] else DISCOUNT * total)
        to_go[t] = total
    return torch.stack(states), torch.tensor(actions), torch.tensor(to_go)


def dense(family: AffineFamily) -> tuple[torch.Tensor, torch.Tensor]:
    """Both matrices, column by column."""
    columns: list[list[torch.Tensor]] = [[], []]
    with family.session() as product:
        for e in torch.eye(family.space.numel, dtype=family.space.dtype):
            for kept, found in zip(columns, product(family.space.unflatten(e)), strict=True):
                kept.append(torch.cat([t.reshape(-1) for t in found]))
    a, b = (torch.stack(c, 1) for c in columns)
    return (a + a.T) / 2, (b + b.T) / 2


def policies() -> Iterator[Problem]:
    for seed in range(POLICIES):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            policy = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
        optimizer = torch.optim.Adam(policy.parameters(), lr=RATE)
        for update in range(UPDATES + 1):
            data = rollout(policy, 1000 * seed + update)
            objective = PolicyObjective.of_batch(policy, evaluate, *data)
            if update in (0, UPDATES):
                wide = copy.deepcopy(policy).double()
                x, actions, returns = data
                exact = PolicyObjective.of_batch(wide, evaluate, x.double(), actions, returns.double())
                a, b = dense(exact.family())
                name = "policy, untrained" if update == 0 else f"policy, {UPDATES} updates"
                yield Problem(name, seed, objective.family(), a, b, ROUNDING)
            optimizer.zero_grad()
            loss, entropy = objective.losses()
            (loss - 0.01 * entropy).backward()
            optimizer.step()


def lanczos_until(matrix: torch.Tensor, truth: np.ndarray, start: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Products of plain Lanczos until both ends are as near as asked, and the sum of their Ritz vectors."""
    basis, image = [start / start.norm()], []
    while True:
        image.append(matrix @ basis[-1])
        v, av = torch.stack(basis), torch.stack(image)
        projected = v @ av.T
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        near_top = abs(float(values[-1]) - truth[-1]) <= LARGEST * abs(truth[-1])
        near_bottom = abs(float(values[0]) - truth[0]) <= SMALLEST * abs(truth[0])
        rest = image[-1]
        for _ in range(2):
            rest = rest - v.T @ (v @ rest)
        if (near_top and near_bottom) or len(basis) == len(matrix) or float(rest.norm()) < 1e-12:
            return len(basis), v.T @ (vectors[:, -1] + vectors[:, 0])
        basis.append(rest / rest.norm())


def measured(problem: Problem) -> dict[str, Any]:
    """One pair by all methods."""
    a, b, n = problem.a, problem.b, len(problem.a)
    found = affine_spectrum(problem.family, alphas=(0.0, 1.0), seed=problem.seed)
    counts = dict.fromkeys(("independent", "independent, smallest to 2%", "warm", "oracle", "oracle, warm"), 0)
    errors: dict[str, list[float]] = {"largest": [], "smallest": []}
    widths: list[float] = []
    misses = 0
    generator = torch.Generator().manual_seed(problem.seed)
    before: Any = None
    carried: torch.Tensor | None = None
    for alpha in ALPHAS:
        matrix = a + alpha * b
        truth = torch.linalg.eigvalsh(matrix).numpy()
        scale = float(np.abs(truth).max())
        for end, exact in (("largest", truth[-1]), ("smallest", truth[0])):
            got = found.at(alpha, end)  # type: ignore[arg-type]
            errors[end].append(float(abs(got.value - exact) / abs(exact)))
            widths.append((got.high - got.low) / scale)
            misses += int(not got.low - problem.slack * scale <= exact <= got.high + problem.slack * scale)
        operator = CallableOperator(lambda v, m=matrix: m @ v, n, dtype=matrix.dtype)  # type: ignore[misc]
        options: dict[str, Any] = {"rtol": LARGEST, "seed": problem.seed}
        both = dyntune.eigenvalues(operator, which="both", **options)
        top = dyntune.eigenvalues(operator, **options)
        bottom = dyntune.eigenvalues(operator, which="smallest", rtol=SMALLEST, seed=problem.seed)
        before = dyntune.eigenvalues(operator, which="both", start=before, **options)
        start = torch.randn(n, generator=generator, dtype=matrix.dtype)
        cold, _ = lanczos_until(matrix, truth, start)
        known, carried = lanczos_until(matrix, truth, start if carried is None else carried)
        for name, spent in (
            ("independent", both.num_products),
            ("independent, smallest to 2%", top.num_products + bottom.num_products),
            ("warm", before.num_products),
            ("oracle", cold),
            ("oracle, warm", known),
        ):
            counts[name] += spent
    joint = 2 * found.num_products
    return {
        "problem": problem.name,
        "seed": problem.seed,
        "n": n,
        "joint": joint,
        "products": counts,
        "share": {name: joint / spent for name, spent in counts.items()},
        "worst_error": {end: max(e) for end, e in errors.items()},
        "within": {
            "largest": sum(bool(e <= LARGEST) for e in errors["largest"]),
            "smallest": sum(bool(e <= SMALLEST) for e in errors["smallest"]),
        },
        "asked": len(ALPHAS),
        "bracket_misses": misses,
        "median_width": float(np.median(widths)),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and the worst of each, by problem."""
    rows = {}
    for name in dict.fromkeys(run["problem"] for run in runs):
        chosen = [run for run in runs if run["problem"] == name]
        rows[name] = {
            "runs": len(chosen),
            "n": chosen[0]["n"],
            "joint": float(np.median([run["joint"] for run in chosen])),
            "products": {k: float(np.median([run["products"][k] for run in chosen])) for k in chosen[0]["products"]},
            "worst_share": {k: max(run["share"][k] for run in chosen) for k in chosen[0]["share"]},
            "worst_error": {end: max(run["worst_error"][end] for run in chosen) for end in ("largest", "smallest")},
            "within": {end: sum(run["within"][end] for run in chosen) for end in ("largest", "smallest")},
            "asked": sum(run["asked"] for run in chosen),
            "bracket_misses": sum(run["bracket_misses"] for run in chosen),
            "median_width": float(np.median([run["median_width"] for run in chosen])),
        }
    return rows


def main() -> int:
    torch.set_num_threads(1)
    runs = []
    for make in (matrices, policies):
        for problem in make():
            runs.append(measured(problem))
            print(json.dumps(runs[-1]), flush=True)
    rows = summary(runs)
    result = {"schema": 1, "about": "one joint space for 41 coefficients, beside a solve at each"}
    result |= {"alphas": ALPHAS, "accuracy": {"largest": LARGEST, "smallest": SMALLEST}, "summary": rows, "runs": runs}
    result["provenance"] = provenance() | {"command": "python benchmarks/rl/affine.py"}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    wrong = sum(row["bracket_misses"] + 2 * row["asked"] - sum(row["within"].values()) for row in rows.values())
    dear = max(row["worst_share"]["independent"] for row in rows.values()) > 1 / 8
    return 1 if wrong or dear else 0


if __name__ == "__main__":
    sys.exit(main())
