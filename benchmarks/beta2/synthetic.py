"""The bank of averages on series whose variance is known: is its choice the best forecaster, and does it refuse?

    python benchmarks/beta2/synthetic.py [--repetitions N]

*Drift*: noise whose log-variance is Ornstein-Uhlenbeck, with normal or heavier noise, one variance for each coordinate
or one for all, 300 tau long (10,000 steps at least). The choices are the bank's best, the local-level factor, the naive
``1 - 1 / tau`` with the memory that was measured, 0.999, 0.95, and one drawn from the bank. Their cost in nats above
the best of 40 factors is taken on another draw of the same law, and so is the best: nothing is scored where it was
chosen. *Coverage*: how often the best factor lies in the intervals. *Refusals*: pure trends, of which none may get a
number, and series shorter than fifty times their memory, of which a fortieth may: memories are known to an interval.

Exit status 1 if a choice of the bank costs more than 0.01 nats in the mean where tau is 50 or more, if a trend gets a
number, or more short series than a fortieth explains. Takes half an hour on one core.
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
from scipy import stats
from scipy.signal import lfilter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peer_suite.provenance import provenance
from dyntune.dynamics.ema_bank import BETAS, EMABank
from dyntune.dynamics.ema_reading import BankReading, read_bank

RESULT = Path(__file__).resolve().parent / "results" / "synthetic.json"
SCHEMA = 1
SIZE = 32  # coordinates
LENGTH, LEAST = 300, 10_000  # in tau, and in steps
FINE = 1 / (1 + np.exp(-np.linspace(math.log(3), math.log(9999), 40)))
LIMIT = 0.01  # nats
KNOWN = 50  # tau from which on the limit holds
LAWS = [
    {"tau": tau, "sigma": sigma, "kurtosis": kurtosis, "shared": shared}
    for tau in (20, 50, 100, 300, 1000)
    for sigma, kurtosis, shared in ((1.0, 3.0, False), (0.5, 3.0, False), (1.0, 6.0, False), (1.0, 3.0, True))
]


def drifting(
    rng: np.random.Generator, steps: int, *, tau: float, sigma: float, kurtosis: float, shared: bool
) -> np.ndarray:
    """Noise of shape (steps, SIZE) whose log-variance has correlation exp(-k / tau) and deviation `sigma`."""
    a = math.exp(-1 / tau)
    noise = sigma * rng.standard_normal((steps, 1 if shared else SIZE))
    noise[1:] *= math.sqrt(1 - a * a)
    logs = lfilter([1.0], [1.0, -a], noise, axis=0)
    if kurtosis == 3.0:
        z = rng.standard_normal((steps, SIZE))
    else:  # Student's t with 4 + 6 / (kurtosis - 3) degrees of freedom, scaled to variance 1
        nu = 4 + 6 / (kurtosis - 3)
        z = rng.standard_t(nu, (steps, SIZE)) * math.sqrt((nu - 2) / nu)
    return np.exp(logs / 2) * z


def read(gradients: np.ndarray, seed: int) -> BankReading:
    """What the bank says after all of them."""
    bank = EMABank(gradients.shape[1])
    for row in gradients:
        bank.update(row)
    return read_bank(bank, seed=seed)


def score(gradients: np.ndarray, beta: float) -> float:
    """Mean one-step-ahead score by filtering whole columns: no bank and no floor; the first tenth is left out."""
    x, steps = gradients**2, len(gradients)
    v = lfilter([1 - beta], [1, -beta], x, axis=0)[:-1] / (1 - beta ** np.arange(1, steps))[:, None]
    return float((np.log(v) + x[1:] / v)[steps // 10 :].mean())


def one(law: dict[str, Any], seed: int) -> dict[str, Any]:
    """One draw that is read, and another that the choices are scored on."""
    rng = np.random.default_rng([seed, int(law["tau"]), int(10 * law["sigma"]), int(law["kurtosis"]), law["shared"]])
    steps = max(LEAST, LENGTH * law["tau"])
    reading, fresh = read(drifting(rng, steps, **law), seed), drifting(rng, steps, **law)
    scores = [score(fresh, beta) for beta in FINE]
    best = float(FINE[int(np.argmin(scores))])
    choices: dict[str, float | None] = {
        "best of the bank": reading.best.value,
        "local level": reading.local_level.value,
        "naive 1 - 1 / tau": None if reading.memory.value is None else 1 - 1 / max(reading.memory.value, 1.01),
        "0.999": 0.999,
        "0.95": 0.95,
        "random": float(rng.choice(BETAS)),
    }
    identified = reading.best.value is not None
    return {
        "best": best,
        "identified": identified,
        "covered": identified and reading.best.low <= best <= reading.best.high,
        "covered_local": reading.local_level.value is not None
        and reading.local_level.low <= best <= reading.local_level.high,
        "cost": {name: None if beta is None else score(fresh, beta) - min(scores) for name, beta in choices.items()},
    }


def mean(values: list[float]) -> dict[str, Any]:
    """With its 95% interval, of Student's t."""
    found = np.array(values)
    if len(found) < 2:
        return {"mean": float(found.mean()) if len(found) else None, "interval": None, "count": len(found)}
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found))
    return {
        "mean": float(found.mean()),
        "interval": [float(found.mean() - half), float(found.mean() + half)],
        "worst": float(found.max()),
        "count": len(found),
    }


def share(hits: int, of: int) -> dict[str, Any]:
    """With its 95% interval, of Wilson."""
    found = stats.binomtest(hits, of).proportion_ci(method="wilson") if of else None
    return {"hits": hits, "of": of, "interval": None if found is None else [float(found.low), float(found.high)]}


def drift(law: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """Costs and coverage at one law."""
    runs = [one(law, seed) for seed in range(repetitions)]
    told = [run for run in runs if run["identified"]]
    costs = {
        name: mean([run["cost"][name] for run in told if run["cost"][name] is not None]) for name in runs[0]["cost"]
    }
    return law | {
        "best": float(np.median([run["best"] for run in runs])),
        "identified": share(len(told), len(runs)),
        "coverage": share(sum(run["covered"] for run in told), len(told)),
        "coverage_local": share(
            sum(run["covered_local"] for run in told), sum(run["cost"]["local level"] is not None for run in told)
        ),
        "cost": costs,
    }


def refusals(repetitions: int) -> dict[str, Any]:
    """Numbers given where none may be."""
    found: dict[str, Any] = {}
    for fall in (0.5, 4.0, 30.0):
        slopes = np.exp(-fall / 2 * np.linspace(0, 1, LEAST))[:, None]
        given = [
            read(slopes * np.random.default_rng([seed, 1]).standard_normal((LEAST, SIZE)), seed)
            for seed in range(repetitions)
        ]
        found[f"trend: variance falls by exp({fall:g})"] = share(
            sum(r.best.value is not None for r in given), len(given)
        )
    for shared, part in itertools.product((False, True), (10, 25, 45)):
        given = []
        for tau in (100, 300, 1000):
            law: dict[str, Any] = {"tau": tau, "sigma": 1.0, "kurtosis": 3.0, "shared": shared}
            # Integrated over both sides, exp(-k / tau) has a memory of 2 tau: the length is in those.
            given += [
                read(drifting(np.random.default_rng([seed, 2]), 2 * part * tau, **law), seed)
                for seed in range(repetitions)
            ]
        name = f"{part} times its memory, {'one variance for all' if shared else 'a variance for each'}"
        found[name] = share(sum(r.best.value is not None for r in given), len(given))
    return found


def too_many(name: str, found: dict[str, Any]) -> bool:
    """Whether more numbers were given than may be."""
    allowed = 0.0 if name.startswith("trend") else 0.025
    return bool(stats.binomtest(found["hits"], found["of"], allowed, alternative="greater").pvalue < 0.01)


def main() -> int:
    """Draw, read, save, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    laws = []
    for law in LAWS:
        laws.append(drift(law, options.repetitions))
        said = {name: None if c["mean"] is None else round(c["mean"], 4) for name, c in laws[-1]["cost"].items()}
        print(law, laws[-1]["identified"]["hits"], said, file=sys.stderr, flush=True)
    refused = refusals(options.repetitions)
    print(json.dumps({name: found["hits"] for name, found in refused.items()}), file=sys.stderr)
    result = {"schema": SCHEMA, "provenance": provenance(), "drift": laws, "numbers_where_none_may_be": refused}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    dear = [
        law
        for law in laws
        for name in ("best of the bank", "local level")
        if law["tau"] >= KNOWN and law["cost"][name]["mean"] is not None and law["cost"][name]["mean"] > LIMIT
    ]
    return int(bool(dear) or any(too_many(*item) for item in refused.items()))


if __name__ == "__main__":
    sys.exit(main())
