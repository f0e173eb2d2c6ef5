"""Variance of the gradient on three real texts: what the formula says, what is predicted from 32 rows, and what it is.

    python benchmarks/mixture/text.py [--problem text|lengths]

At three points of a training of a tiny character model: 512 rows of each text are the population. Batches of 24 rows
are drawn from it by `MixtureSampler`, 600 for each design (equal shares, shares like the weights, the suggested shares
in whole rows) and kind of sampling, and their weighted gradients' squared distances from the population's gradient are
averaged. Beside it the formula with the population's moments, and `suggest_mixture` from 32 rows of each text with its
interval, for eight draws of rows. About two minutes.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.mixture.problems import Problem, loss_fn, problem, row_losses
from benchmarks.peer_suite.provenance import provenance
from dyntune.suggest.mixture import suggest_mixture
from dyntune.training.mixture_sampler import MixtureSampler

RESULTS = Path(__file__).resolve().parent / "results"
POPULATION, BATCH, BATCHES, DRAWS = 512, 24, 600, 8
POINTS = (0, 100, 400)
LR = 0.25


def flat_gradient(model: torch.nn.Module, loss: torch.Tensor) -> np.ndarray:
    """Of one loss, as one vector."""
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in parts]).double().numpy()


def population_moments(model: torch.nn.Module, rows: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means (k, n), variances and raw second moments (k,) of single rows' gradients."""
    means, variances, seconds = [], [], []
    for x, y in rows:
        total, squares = 0.0, 0.0
        for i in range(len(x)):
            g = flat_gradient(model, loss_fn(model, (x[i : i + 1], y[i : i + 1])))
            total, squares = total + g, squares + float(g @ g)
        mean = total / len(x)
        means.append(mean)
        seconds.append(squares / len(x))
        variances.append(squares / len(x) - float(mean @ mean))
    return np.array(means), np.array(variances), np.array(seconds)


def whole_rows(shares: np.ndarray) -> np.ndarray:
    """Shares in whole rows of a batch, one at least: the largest remainders get what is left over."""
    counts = np.maximum(np.floor(shares * BATCH), 1)
    for i in np.argsort(counts - shares * BATCH)[: int(BATCH - counts.sum())]:
        counts[i] += 1
    return counts / BATCH


def look(text: Problem, step: int, model: torch.nn.Module, seed: int) -> list[dict[str, Any]]:
    """One point of the training."""
    rows = [(x[:POPULATION], y[:POPULATION]) for x, y in text.train]
    together = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])
    w = np.array(text.weights)
    means, variances, seconds = population_moments(model, rows)
    target = w @ means
    records = []
    for sampling in ("stratified", "multinomial"):
        squares, offset = (variances, 0.0) if sampling == "stratified" else (seconds, float(target @ target))
        best = w * np.sqrt(squares)
        designs = {
            "uniform": np.full(3, 1 / 3),
            "proportional": whole_rows(w),
            "suggested": whole_rows(best / best.sum()),
        }
        measured: dict[str, np.ndarray] = {}
        formula: dict[str, float] = {}
        for name, shares in designs.items():
            sampler = MixtureSampler(
                [POPULATION] * 3, shares.tolist(), batch_size=BATCH, weights=w.tolist(), sampling=sampling, seed=seed
            )
            found = []
            for _ in range(BATCHES):
                indices = sampler.next_batch()
                loss = (
                    sampler.importance(indices) * row_losses(model, (together[0][indices], together[1][indices]))
                ).mean()
                error = flat_gradient(model, loss) - target
                found.append(float(error @ error))
            measured[name] = np.array(found)
            # Rows of one batch come without replacement: n of N leave 1 - (n - 1) / (N - 1) of the variance.
            finite = 1 - (shares * BATCH - 1) / (POPULATION - 1) if sampling == "stratified" else 1.0
            formula[name] = (float((w**2 * squares / shares * finite).sum()) - offset) / BATCH
        predicted = [
            suggest_mixture(
                dict(zip(text.names, rows, strict=True)),
                text.weights,
                [0.0] * 3,
                model=model,
                loss_fn=loss_fn,
                sampling=sampling,
                seed=draw,
            )
            for draw in range(DRAWS)
        ]
        for other in ("uniform", "proportional"):
            rng = np.random.default_rng(0)
            top, bottom = measured["suggested"], measured[other]
            boot = [rng.choice(top, BATCHES).mean() / rng.choice(bottom, BATCHES).mean() for _ in range(2000)]
            ratio, error = float(top.mean() / bottom.mean()), float(np.std(boot))
            shown = [getattr(p, f"to_{other}") for p in predicted]
            exact = []
            for p in predicted:
                shares, against = np.array(p.proportions), designs[other] if other == "uniform" else w
                exact.append(
                    (float((w**2 * squares / shares).sum()) - offset)
                    / (float((w**2 * squares / against).sum()) - offset)
                )
            records.append(
                {
                    "step": step,
                    "sampling": sampling,
                    "relative_to": other,
                    "noise_by_source": np.sqrt(squares).round(4).tolist(),
                    "shares": designs["suggested"].tolist(),
                    "formula": formula["suggested"] / formula[other],
                    "measured": ratio,
                    "standard_error": error,
                    "z": (ratio - formula["suggested"] / formula[other]) / error,
                    "predicted_from_32_rows": [s.value for s in shown],
                    "intervals_that_hold_the_truth": sum(t in s for t, s in zip(exact, shown, strict=True)),
                    "intervals": DRAWS,
                }
            )
            print(
                {k: records[-1][k] for k in ("step", "sampling", "relative_to", "formula", "measured", "z")}, flush=True
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--problem", default="text", choices=["text", "lengths"])
    text = problem(parser.parse_args().problem)
    torch.set_num_threads(1)
    model = text.new_model(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    sampler = MixtureSampler(
        [len(x) for x, _ in text.train], text.weights, batch_size=16, weights=text.weights, seed=100
    )
    x, y = torch.cat([x for x, _ in text.train]), torch.cat([y for _, y in text.train])
    records = []
    for step in range(max(POINTS) + 1):
        if step in POINTS:
            records += look(text, step, model, seed=step)
        indices = sampler.next_batch()
        optimizer.zero_grad()
        (sampler.importance(indices) * row_losses(model, (x[indices], y[indices]))).mean().backward()
        optimizer.step()
    about = provenance() | {"data": text.digest(), "population": POPULATION, "batch": BATCH, "batches": BATCHES}
    (RESULTS / f"variance-{text.name}.json").write_text(
        json.dumps({"about": about, "records": records}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
