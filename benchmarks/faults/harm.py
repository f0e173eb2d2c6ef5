"""How much a fault harms: the share of its healthy twin's progress that is lost.

    harm = (loss with the fault - loss of the twin) / (loss before training - loss of the twin at the end)

on fixed clean rows, half of them held out, under the workload's own loss. The twin has the same seed, hence the same
initial weights, rows and dropout. A fault that stays is judged by the losses at the end of the run; one that passes by
the mean of the losses from its onset on. 0: no harm; 0.5: halfway back; 1: nothing was learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from benchmarks.faults.split import Cell
from benchmarks.faults.training import Training

LEVELS = ("mild", "medium", "severe")
# Bands of harm: measurable; clearly worse; halfway back or more. Below 0.02 seeds differ by as much (`Measured.noise`).
BANDS = {"mild": (0.02, 0.1), "medium": (0.1, 0.5), "severe": (0.5, math.inf)}
LARGEST = 2.0  # what a run counts that diverged, and the most that any counts: means stay means
EVERY = 50  # steps between evaluations of a fault that passes


@dataclass(frozen=True)
class Curve:
    """Clean losses of one run: before it, at the evaluations from the onset on, at the end."""

    start: float
    after: tuple[float, ...]
    end: float


def onset_of(cell: Cell, seed: int, steps: int) -> int:
    """Where a fault begins: 0, or in the middle of training, spread evenly by the seed (golden ratio)."""
    if not cell.fault.mid_run:
        return 0
    return round(steps * (0.35 + 0.2 * (seed * 0.6180339887 % 1.0)))


def train(training: Training, *, onset: int, passes: bool) -> Curve:
    """Train to the end, with evaluations on the way where they count."""
    start, after = training.evaluate(), []
    if passes:
        for until in range(onset + EVERY, training.steps, EVERY):
            training.loop(until=until)
            after.append(training.evaluate())
    training.loop()
    return Curve(start, tuple(after), training.evaluate())


def harm(cell: Cell, faulty: Curve, twin: Curve) -> float:
    """See the head of this file."""
    scale = twin.start - twin.end
    lost = faulty.end - twin.end
    if cell.fault.judged == "lost":
        lost = fmean(a - b for a, b in zip(faulty.after, twin.after, strict=True))
    value = lost / scale
    return min(value, LARGEST) if math.isfinite(value) else LARGEST


def level_of(value: float) -> str | None:
    """The band that a harm lies in."""
    return next((level for level, (low, high) in BANDS.items() if low <= value < high), None)
