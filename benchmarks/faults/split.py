"""Which (generator, architecture) is for tuning and which for the test: fixed before any detector existed.

A cell is a generator with an architecture. It belongs to one half with all its severities and seeds, and the halves
share no pair of architecture and data set either (`workloads.py`). Within each cause the generators are numbered in
the order of the list, and cells alternate like a chessboard: a cause is in both halves, there with other architectures
or other generators, so that what was fitted to one half's runs does not recognise the other's. The board begins with
another colour from one cause to the next, which gives both halves about as many cells of each architecture. A new
generator goes to the end of its module's list, below those of its cause: no cell changes its half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.faults.fault import Fault
from benchmarks.faults.faults import FAMILIES
from benchmarks.faults.workloads import ARCHITECTURES, HALVES, Workload, workload_for
from dyntune.monitor.alerts import Cause


@dataclass(frozen=True)
class Cell:
    """A generator in an architecture, with the workload that it is put into."""

    family: str
    architecture: str
    half: str
    workload: Workload

    @property
    def name(self) -> str:
        return f"{self.family}/{self.architecture}"

    @property
    def fault(self) -> type[Fault]:
        return FAMILIES[self.family]


def number_within_cause(fault: type[Fault]) -> int:
    """How many generators of the same cause come before."""
    same = [family for family, other in FAMILIES.items() if other.cause == fault.cause]
    return same.index(fault.family)


def _half(fault: type[Fault], architecture: str) -> str:
    # By the place in the enum: one more cause before another would move cells from half to half, so the order is pinned
    # by tests/detect/test_alerts.py.
    colour = number_within_cause(fault) + ARCHITECTURES.index(architecture) + list(Cause).index(fault.cause)
    return HALVES[colour % 2]


def _kind(fault: type[Fault], architecture: str) -> str:
    """Optimizers alternate where the generator leaves it open: both kinds in both halves."""
    if fault.kind != "any":
        return fault.kind
    return ("adam", "sgd")[(list(FAMILIES).index(fault.family) + ARCHITECTURES.index(architecture) // 2) % 2]


def _cells() -> Iterator[Cell]:
    for family, fault in FAMILIES.items():
        for architecture in ARCHITECTURES:
            half = _half(fault, architecture)
            workload = fault.setting(workload_for(architecture, half, _kind(fault, architecture)))
            if fault.fits(workload):
                yield Cell(family, architecture, half, workload)


CELLS = {cell.name: cell for cell in _cells()}
