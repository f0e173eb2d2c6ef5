"""Are certified eigenvalues right, and is the stated failure probability real? A thousand hard random spectra.

    python benchmarks/spectra.py

The distribution is that of the tests (`tests/curvature/hard_spectra.py`): five families with relative gaps down to
1e-4, n up to 5,000, scales from 1e-8 to 1e8, dense eigenvectors, float32. Three questions:

- claims: default arguments. How many are reported as converged, how many of those wrongly, at what price?
- several: k in 2..6 and every end, drawn at random.
- levels: failure probabilities of 0.1 and 0.01. How often is a converged value off by more than the tolerance, how
  often does a bracket miss the truth, at convergence and when the budget of 15 products has cut the solve short?

Rates come with exact (Clopper-Pearson) 95% intervals. Takes about two minutes on one core. Exit status 1 if a value
was falsely reported as converged at the default level, or a rate is significantly above its nominal one.
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
from peer_suite.provenance import provenance

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dyntune import eigenvalues
from tests.curvature.hard_spectra import FAMILIES, Spectrum, draw, error_and_tolerance
from tests.operators import FLOOR, wanted

RESULT = Path(__file__).resolve().parent / "results" / "spectra.json"
SCHEMA = 1
WHICH = ("largest", "smallest", "magnitude", "both")
LEVELS = (0.1, 0.01)
SHORT_BUDGET = 15


def share(count: int, total: int) -> dict[str, Any]:
    """A rate with its exact 95% interval."""
    from scipy.stats import beta

    low = float(beta.ppf(0.025, count, total - count + 1)) if count else 0.0
    high = float(beta.ppf(0.975, count + 1, total - count)) if count < total else 1.0
    return {"count": count, "of": total, "rate": count / total, "low": low, "high": high}


def judge(spectrum: Spectrum, k: int = 1, which: str = "largest", **options: Any) -> dict[str, Any]:
    """One solve beside the truth."""
    found = eigenvalues(spectrum.operator, k, which=which, **options)
    truth, values = wanted(spectrum.values, which, k), found.values.numpy()
    low, high = found.low.numpy(), found.high.numpy()
    if which == "magnitude":
        low, high = np.where(values >= 0, low, -high), np.where(values >= 0, high, -low)
        truth, values = np.abs(truth), np.abs(values)
    slack = FLOOR * spectrum.norm
    pairs = zip(values, truth, strict=True)
    errors = [error_and_tolerance(v, t, spectrum.norm, found.rtol) for v, t in pairs]
    return {
        "converged": found.converged,
        "wrong": found.converged and any(error > tolerance for error, tolerance in errors),
        "outside": not bool(((low - slack <= truth) & (truth <= high + slack)).all()),
        "products": found.num_products,
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    products = [run["products"] for run in runs]
    count = len(runs)
    return {
        "converged": share(sum(run["converged"] for run in runs), count),
        "falsely_converged": share(sum(run["wrong"] for run in runs), count),
        "bracket_misses": share(sum(run["outside"] for run in runs), count),
        "products": {
            "median": float(np.median(products)),
            "quantile_90": float(np.quantile(products, 0.9)),
            "most": max(products),
        },
    }


def claims(count: int) -> dict[str, Any]:
    """Default arguments: overall and per family."""
    runs = [judge(draw(index), seed=index) for index in range(count)]
    families = {name: _summary(runs[i :: len(FAMILIES)]) for i, name in enumerate(FAMILIES)}
    return _summary(runs) | {"families": families}


def several(count: int) -> dict[str, Any]:
    """More than one eigenvalue, at any end."""
    runs = []
    for index in range(count):
        rng = np.random.default_rng([30240, index])
        runs.append(judge(draw(index), int(rng.integers(2, 7)), str(rng.choice(WHICH)), seed=index))
    return _summary(runs)


def levels(count: int) -> list[dict[str, Any]]:
    """Measured beside nominal failure probability."""
    rows = []
    for level in LEVELS:
        runs = [judge(draw(index), seed=index, failure_probability=level) for index in range(count)]
        cut = [
            judge(draw(index), seed=index, failure_probability=level, max_products=SHORT_BUDGET)
            for index in range(count)
        ]
        rows.append(
            {
                "nominal": level,
                "falsely_converged": share(sum(run["wrong"] for run in runs), count),
                "bracket_misses": share(sum(run["outside"] for run in runs), count),
                "bracket_misses_of_short_solves": share(sum(run["outside"] for run in cut), count),
                "products": float(np.median([run["products"] for run in runs])),
            }
        )
    return rows


def main() -> int:
    """Measure, save, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="spectra at default arguments")
    parser.add_argument("--repeats", type=int, default=2000, help="spectra per failure probability")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "schema": SCHEMA,
        "provenance": provenance(),
        "claims": claims(arguments.count),
        "several": several(arguments.count),
        "levels": levels(arguments.repeats),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"saved {arguments.output.name}", file=sys.stderr)
    wrong = result["claims"]["falsely_converged"]["count"] + result["several"]["falsely_converged"]["count"]
    kinds = ("falsely_converged", "bracket_misses", "bracket_misses_of_short_solves")
    above = [row["nominal"] for row in result["levels"] for kind in kinds if row[kind]["low"] > row["nominal"]]
    return 1 if wrong or above else 0


if __name__ == "__main__":
    sys.exit(main())
