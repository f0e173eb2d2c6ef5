"""Every run of the benchmark: faults, their healthy twins, and healthy runs, each with the truth about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.conducts import Conduct
from benchmarks.faults.fault import Fault
from benchmarks.faults.harm import LEVELS, onset_of
from benchmarks.faults.healthy import HEALTHY, Healthy
from benchmarks.faults.split import CELLS, Cell
from benchmarks.faults.training import Training
from benchmarks.faults.workloads import HALVES, Workload

SEVERITIES = Path(__file__).resolve().parent / "results" / "severities.json"
SEEDS = 5
KINDS = ("faults", "twins", "healthy")


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def twin_name(workload: Workload, seed: int) -> str:
    """The healthy run with the same workload and seed; several faults may share it."""
    return f"{workload.name}/{_digest(workload)[:6]}/{seed}"


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        kind: ``"faults"``, ``"twins"`` or ``"healthy"``.
        name: Unique within its kind.
        half: ``"tune"`` or ``"test"``.
        architecture: Of the workload.
        workload: What is trained; of a healthy run, before its recipe.
        seed: Of the run.
        cell: Of a fault.
        severity: Of a fault.
        strength: Of a fault, in its generator's unit.
        healthy: Of a healthy run, its recipe.
    """

    kind: str
    name: str
    half: str
    architecture: str
    workload: Workload
    seed: int
    cell: Cell | None = None
    severity: str | None = None
    strength: float | None = None
    healthy: Healthy | None = field(default=None, repr=False)

    @property
    def digest(self) -> str:
        """Changes when the definition does."""
        return _digest(self.kind, self.name, self.workload, self.seed, self.strength, self.healthy)

    def training(self, *, steps: int | None = None) -> Training:
        """A fresh one; `steps`: of that length, its onset moved along."""
        if self.healthy is not None:
            return self.healthy.training() if steps is None else _shorter(self.healthy, steps).training()
        workload = self.workload if steps is None else self.workload.changed(steps=steps)
        if self.cell is None or self.strength is None:
            return Training(workload, self.seed)
        onset = onset_of(self.cell, self.seed, workload.steps)
        return Training(workload, self.seed, [self.cell.fault(self.strength, onset=onset, seed=self.seed)])

    def truth(self, training: Training) -> dict[str, Any]:
        """What is known about the run; plain JSON."""
        fault = next((change for change in training.changes if isinstance(change, Fault)), None)
        conducts = [change for change in training.changes if isinstance(change, Conduct)]
        about: dict[str, Any] = {"case": self.name, "kind": self.kind, "half": self.half, "seed": self.seed}
        about |= {"architecture": self.architecture, "workload": self.workload.name, "planned": training.steps}
        about["events"] = {name: steps for conduct in conducts for name, steps in conduct.events.items()}
        if fault is None:
            return about | {"family": None, "cause": None, "where": [], "onset": None, "severity": None, "twin": None}
        about |= {"family": fault.family, "cause": fault.cause.value, "where": fault.where, "onset": fault.onset}
        about |= {"severity": self.severity, "strength": self.strength, "unit": fault.unit, "judged": fault.judged}
        return about | {"twin": twin_name(self.workload, self.seed)}


def _shorter(healthy: Healthy, steps: int) -> Healthy:
    return Healthy(healthy.kind, healthy.architecture, healthy.half, healthy.base, healthy.seed, steps)


def severities() -> dict[str, dict[str, float]]:
    """Strength by cell and level, as `calibrate.py` found them."""
    if not SEVERITIES.exists():
        return {}
    rows = json.loads(SEVERITIES.read_text())
    return {name: {level: x["strength"] for level, x in row["levels"].items()} for name, row in rows.items()}


def _faults() -> Iterator[Case]:
    chosen = severities()
    for seed in range(SEEDS):
        for name, cell in CELLS.items():
            for level in LEVELS:
                if (strength := chosen.get(name, {}).get(level)) is not None:
                    title = f"{name}/{level}/{seed}"
                    about = (cell.half, cell.architecture, cell.workload, seed, cell)
                    yield Case("faults", title, *about, level, strength)


def _twins() -> Iterator[Case]:
    found: dict[str, Case] = {}
    for case in _faults():
        name = twin_name(case.workload, case.seed)
        found[name] = Case("twins", name, case.half, case.architecture, case.workload, case.seed)
    yield from found.values()


def _healthy() -> Iterator[Case]:
    for name, run in HEALTHY.items():
        yield Case("healthy", name, run.half, run.architecture, run.recipe()[0], run.seed, healthy=run)


def cases(kind: str, *, half: str | None = None) -> list[Case]:
    """All runs of a kind, seed by seed, so that the first of them are of all cells."""
    if kind not in KINDS or half not in (None, *HALVES):
        raise ValueError(f"kind={kind!r}, half={half!r}: choose from {KINDS} and {HALVES}")
    every = {"faults": _faults, "twins": _twins, "healthy": _healthy}[kind]()
    return sorted((case for case in every if half in (None, case.half)), key=lambda case: case.seed)
