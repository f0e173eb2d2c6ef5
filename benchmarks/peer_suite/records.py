"""What one run leaves in the JSON file, and how the columns of the report are read out of it."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass
from typing import Any

from peer_suite.plain import Reference
from peer_suite.solvers import RTOL, Answer, Settings, Solver, Trial


@dataclass(frozen=True)
class Run:
    """One answer with its price. `wrong`: off by more than `RTOL`, or an exception, whatever was claimed."""

    solver: str
    library: str
    tuned: bool
    seed: int
    cpu_seconds: float
    wrong: bool
    value: float | None = None
    relative_error: float | None = None
    num_products: int | None = None
    setup_products: int | None = None
    claimed: bool | None = None
    settings: Settings | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def timed_run(solver: Solver, trial: Trial, truth: Reference) -> Run:
    """CPU time of the process from the library's constructor to its answer."""
    gc.collect()  # earlier runs left cycles behind; their clean-up is not this solver's cost
    answer: Answer | None = None
    error: str | None = None
    start = time.process_time()
    try:
        answer = solver.solve(trial)
    except Exception as failure:
        error = type(failure).__name__
    elapsed = round(time.process_time() - start, 6)
    if answer is None:
        return Run(solver.name, solver.library, solver.tuned, trial.seed, elapsed, wrong=True, error=error)
    off = truth.relative_error(answer.value)
    return Run(
        solver.name,
        solver.library,
        solver.tuned,
        trial.seed,
        elapsed,
        wrong=not abs(off) <= RTOL,  # NaN is wrong
        value=answer.value,
        relative_error=off,
        num_products=answer.num_products,
        setup_products=answer.setup_products,
        claimed=answer.claimed,
        settings=trial.settings or None,
    )


def of_solver(runs: list[dict[str, Any]], solver: str) -> list[dict[str, Any]]:
    """The runs of one solver, by seed, so that two columns can be paired."""
    return sorted((run for run in runs if run["solver"] == solver), key=lambda run: run["seed"])


def cpu_seconds(runs: list[dict[str, Any]], solver: str) -> list[float]:
    return [run["cpu_seconds"] for run in of_solver(runs, solver)]
