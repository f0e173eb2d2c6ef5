"""What dyntune has to achieve, decided from the saved records alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from peer_suite.products import DYNTUNE as DYNTUNE_PRODUCT
from peer_suite.products import RAW_RETAINED
from peer_suite.records import cpu_seconds, of_solver
from peer_suite.solvers import DYNTUNE, EIGSH_DEFAULT, PYHESSIAN_OWN_STOP
from peer_suite.spread import Interval, exact_interval, geometric_mean_ratio, paired_ratio, summary

MAX_PRODUCT_RATIO = 1.1
MIN_SPEEDUP_EIGSH = 5.0
MIN_SPEEDUP_PYHESSIAN = 1.5
MAX_TIME_RATIO_TUNED = 1.2


@dataclass(frozen=True)
class Requirement:
    """`met` judges the measured value, `certain` also the unfavourable end of its interval.

    Only `binding` ones decide the exit status; the others are there to be read.
    """

    text: str
    problem: str
    value: float
    low: float
    high: float
    bound: float
    at_least: bool
    binding: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def certain(self) -> bool:
        return self.low >= self.bound if self.at_least else self.high <= self.bound

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met, "certain": self.certain}


def _at_most(text: str, problem: str, ratio: Interval, bound: float, *, binding: bool = True) -> Requirement:
    value, low, high = ratio.value, ratio.low, ratio.high
    return Requirement(text, problem, value, low, high, bound, at_least=False, binding=binding)


def _at_least(text: str, problem: str, ratio: Interval, bound: float) -> Requirement:
    return Requirement(text, problem, ratio.value, ratio.low, ratio.high, bound, at_least=True)


def _product_cost(name: str, record: dict[str, Any]) -> Requirement:
    times = record["product_cpu_ms"]
    ratio = paired_ratio(times[DYNTUNE_PRODUCT], times[RAW_RETAINED])
    return _at_most("product / raw retained double backward", name, ratio, MAX_PRODUCT_RATIO)


def _speedup_over_eigsh(name: str, record: dict[str, Any]) -> Requirement:
    runs = record["runs"]
    ratio = paired_ratio(cpu_seconds(runs, EIGSH_DEFAULT), cpu_seconds(runs, DYNTUNE))
    return _at_least("speed-up over eigsh(tol=1e-2)", name, ratio, MIN_SPEEDUP_EIGSH)


def _against_tuned(name: str, record: dict[str, Any]) -> list[Requirement]:
    """Against every hand-tuned peer; only the fastest one, by median, binds."""
    runs = record["runs"]
    tuned = {run["solver"] for run in runs if run["tuned"]}
    by_time = sorted(tuned, key=lambda solver: summary(cpu_seconds(runs, solver)).median)
    return [
        _at_most(
            f"time / {solver}",
            name,
            paired_ratio(cpu_seconds(runs, DYNTUNE), cpu_seconds(runs, solver)),
            MAX_TIME_RATIO_TUNED,
            binding=rank == 0,
        )
        for rank, solver in enumerate(by_time)
    ]


def _speedup_over_pyhessian(problems: dict[str, Any]) -> Requirement:
    pairs = [
        (cpu_seconds(record["runs"], PYHESSIAN_OWN_STOP), cpu_seconds(record["runs"], DYNTUNE))
        for record in problems.values()
    ]
    text = "speed-up over PyHessian's own stop, geometric mean"
    return _at_least(text, "all", geometric_mean_ratio(pairs), MIN_SPEEDUP_PYHESSIAN)


def _no_wrong_answer(problems: dict[str, Any]) -> Requirement:
    runs = [run for record in problems.values() for run in of_solver(record["runs"], DYNTUNE)]
    wrong = sum(run["wrong"] for run in runs)
    low, high = exact_interval(wrong, len(runs))
    text = f"rate of wrong answers ({wrong} of {len(runs)})"
    return Requirement(text, "all", wrong / len(runs), low, high, bound=0.0, at_least=False)


def requirements(problems: dict[str, Any]) -> list[Requirement]:
    """All of them, in the order of the report."""
    found = [_product_cost(name, record) for name, record in problems.items()]
    found += [_speedup_over_eigsh(name, record) for name, record in problems.items()]
    found.append(_speedup_over_pyhessian(problems))
    for name, record in problems.items():
        found += _against_tuned(name, record)
    return [*found, _no_wrong_answer(problems)]
