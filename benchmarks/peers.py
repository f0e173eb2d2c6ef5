"""dyntune against PyHessian, hessian-eigenthings and curvlinops with SciPy's eigsh: the price of lambda_max.

    make bench

or `python benchmarks/peers.py` in the environment that requirements-peers.txt describes.

One thread, CPU time of the process, every method in every round, in an order shuffled anew each round. Ratios
are taken within rounds. Answers are judged by a float64 reference; a miss of more than 1 % or an exception is
a failure, and failures stay in the averages. "Tuned" peers were given the cheapest setting that is right for
the very start vector they use, which only someone who knows the answer can choose.

Exit status: 0; 1 if dyntune misses a requirement; 2 if dyntune cannot be imported. Results are saved first.
"""

from __future__ import annotations

import os

# One thread, also for libraries that start their own pools on import. Two threads on shared cores measure the
# scheduler: OpenMP spin-waits made outliers of 10 to 100 times.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from peer_suite.plain import Reference, reference
from peer_suite.problems import PROBLEMS, Problem
from peer_suite.products import PRODUCTS, time_products
from peer_suite.provenance import provenance
from peer_suite.records import Run, timed_run
from peer_suite.solvers import SOLVERS, Solver, Trial
from peer_suite.verdicts import requirements

RESULT = Path(__file__).resolve().parent / "results" / "peers.json"
SCHEMA = 1
WARM_UP_SEED = 1_000_000


def _has_dyntune() -> bool:
    try:
        from dyntune import hessian, hessian_eigenvalues  # noqa: F401
    except ImportError as failure:
        _say(f"dyntune does not import ({failure.msg}): the peers run without it, nothing is judged.")
        return False
    return True


def _one_run(solver: Solver, problem: Problem, truth: Reference, seed: int) -> Run:
    trial = Trial(problem, problem.fresh_model(), seed)
    if solver.tune is not None:
        settings = solver.tune(trial, truth)
        trial = Trial(problem, problem.fresh_model(), seed, settings)
    return timed_run(solver, trial, truth)


def _solver_runs(problem: Problem, truth: Reference, solvers: list[Solver], repeats: int) -> list[Run]:
    """One round per seed; a round before the first is thrown away, it pays for lazy imports."""
    order, runs = random.Random(0), []
    for solver in solvers:
        _one_run(solver, problem, truth, WARM_UP_SEED)
    for seed in range(repeats):
        runs += [_one_run(solver, problem, truth, seed) for solver in order.sample(solvers, len(solvers))]
        _say(f"  round {seed + 1} of {repeats}")
    return runs


def _measure(problem: Problem, with_dyntune: bool, repeats: int, product_rounds: int) -> dict[str, Any]:
    _say(f"{problem.name}: {problem.description}")
    truth = reference(problem)
    _say(f"  lambda_max {truth.lambda_max:.6g}, residual {truth.residual:.1e}, float64")
    products = [product for product in PRODUCTS if with_dyntune or product.library != "dyntune"]
    solvers = [solver for solver in SOLVERS if with_dyntune or solver.library != "dyntune"]
    return {
        "description": problem.description,
        "num_parameters": problem.num_parameters,
        "reference": truth.to_dict(),
        "product_cpu_ms": time_products(problem, products, product_rounds),
        "runs": [run.to_dict() for run in _solver_runs(problem, truth, solvers, repeats)],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="rounds of solvers on the MLP problems")
    parser.add_argument("--transformer-repeats", type=int, default=7, help="the same on the transformer")
    parser.add_argument("--product-rounds", type=int, default=40, help="rounds of single products, MLP")
    parser.add_argument("--transformer-product-rounds", type=int, default=15, help="the same, transformer")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


def _judge(result: dict[str, Any]) -> int:
    """Add the verdicts to `result`; the exit status."""
    found = requirements(result["problems"])
    result["requirements"] = [requirement.to_dict() for requirement in found]
    missed = [item for item in result["requirements"] if item["binding"] and not item["met"]]
    for item in missed:
        _say(f"NOT MET: {item['problem']}: {item['text']} is {item['value']:.3g}, bound {item['bound']:g}")
    return 1 if missed else 0


def main() -> int:
    """Measure, judge, save."""
    arguments = _arguments()
    torch.set_num_threads(1)
    with_dyntune = _has_dyntune()
    result: dict[str, Any] = {"schema": SCHEMA, "provenance": provenance(), "problems": {}}
    for name in arguments.problems:
        large = name == "transformer"
        repeats = arguments.transformer_repeats if large else arguments.repeats
        rounds = arguments.transformer_product_rounds if large else arguments.product_rounds
        result["problems"][name] = _measure(PROBLEMS[name](), with_dyntune, repeats, rounds)
    status = _judge(result) if with_dyntune else 2
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    _say(f"saved {arguments.output.name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
