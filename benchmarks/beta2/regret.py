"""What a choice of beta2 costs: regret, its noise floor, paired intervals; defined here and nowhere else.

A cell is a workload at a learning rate. Its regret is ``(L - Lbest) / (L0 - Lbest)``: L the final loss at the choice,
L0 the one before training, Lbest that at the best value. The best of some seeds is luck on the same seeds, so the
seeds are halved, the best is taken on one half and everything is scored on the other, and the two ways are averaged: a
choice may have a negative regret, and the *noise floor* is what the best of one half costs on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.lr.metrics import clipped

DRAWS, LEVEL = 10_000, 0.95


@dataclass(frozen=True)
class Cell:
    """A workload at a learning rate.

    Args:
        workload: Its name.
        lr: ``"a third"``, ``"the best"`` or ``"three times"``.
        betas: Values that were trained, ascending. Shape (b,).
        losses: Final ones, clipped at the initial one. Shape (b, seeds).
        initial: Before training. Shape (seeds,).
        failed: Whether a run was stopped. Shape (b, seeds).
        spikes: Shape (b, seeds).
    """

    workload: str
    lr: str
    betas: np.ndarray
    losses: np.ndarray
    initial: np.ndarray
    failed: np.ndarray
    spikes: np.ndarray

    @property
    def family(self) -> str:
        """Data set and architecture: cells of one are not independent."""
        return self.workload.split(":")[0]

    def nearest(self, beta2: float) -> int:
        """The trained value nearest in log(1 - beta2); what is larger than all of them is merged with the largest."""
        return int(np.argmin(np.abs(np.log1p(-self.betas) - np.log1p(-min(beta2, 1 - 1e-12)))))

    def best(self, seeds: Sequence[int] | None = None) -> int:
        """The lowest mean loss on these seeds."""
        losses = self.losses if seeds is None else self.losses[:, seeds]
        return int(losses.mean(axis=1).argmin())

    def regret(self) -> np.ndarray:
        """Of each value, in shares of what there is to be learnt. Shape (b,)."""
        return np.mean([found for _, found in self._halves()], axis=0)

    def floor(self) -> float:
        """What choosing by half of the seeds costs on the other half, which the best value there does not."""
        return float(np.mean([found[best] - found.min() for best, found in self._halves()]))

    def error(self) -> np.ndarray:
        """Standard error of each regret, by the paired differences to the best. Shape (b,)."""
        room = self.initial.mean() - self.losses[self.best()].mean()
        apart = self.losses - self.losses[self.best()]
        return apart.std(axis=1, ddof=1) / np.sqrt(apart.shape[1]) / room

    def _halves(self) -> list[tuple[int, np.ndarray]]:
        """The best by one half, and regrets on the other."""
        n = self.losses.shape[1]
        halves = np.arange(0, n, 2), np.arange(1, n, 2)
        found = []
        for chosen, scored in (halves, halves[::-1]):
            best = self.best(chosen)
            losses = self.losses[:, scored].mean(axis=1)
            found.append((best, (losses - losses[best]) / (self.initial[scored].mean() - losses[best])))
        return found


def cells(rows: Mapping[str, Any], *, which: str = "train", seeds: int = 4) -> list[Cell]:
    """Those of a sweep's workloads that have at least so many seeds at every value.

    Args:
        rows: ``workloads`` of results/sweeps.json.
        which: ``"train"`` or ``"val"``.
        seeds: At least.
    """
    at, start = {"train": (1, 0), "val": (2, 5)}[which]
    found = []
    for name, row in rows.items():
        for lr in next(iter(row["runs"].values()), {}):
            by_beta = [rates[lr] for rates in row["runs"].values()]
            common = sorted(set.intersection(*(set(runs) for runs in by_beta)), key=int)
            common = common[: len(common) // 2 * 2]
            if len(common) < seeds:
                continue
            runs = [[by[seed] for seed in common] for by in by_beta]
            initial = np.array([run[start] for run in runs[0]])
            losses = [
                [clipped(np.inf if run[at] is None else run[at], first) for run, first in zip(of, initial, strict=True)]
                for of in runs
            ]
            found.append(
                Cell(
                    workload=name,
                    lr=lr,
                    betas=np.array([float(beta) for beta in row["runs"]]),
                    losses=np.array(losses),
                    initial=initial,
                    failed=np.array([[run[4] != 0 for run in of] for of in runs]),
                    spikes=np.array([[run[6] for run in of] for of in runs]),
                )
            )
    return found


def interval(values: np.ndarray, groups: Sequence[str], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean, and its interval by drawing whole groups again.

    Args:
        values: One per cell. Shape (n,).
        groups: Families of the cells.
        seed: Of the draws.
    """
    names = sorted(set(groups))
    sums = np.array([values[[g == name for g in groups]].sum() for name in names])
    counts = np.array([sum(g == name for g in groups) for name in names])
    drawn = np.random.default_rng(seed).integers(len(names), size=(DRAWS, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(values.mean()), float(low), float(high)
