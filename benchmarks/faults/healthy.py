"""Trainings in which nothing is wrong, among them those that look like it: the negatives of the benchmark.

Split like the faults: a cell is a kind with an architecture, cells alternate between the halves like a chessboard, and
the halves share no pair of architecture and data set. The test half alone has more than 1,000,000 steps: with at most
4 false alarms in a million steps the 95% upper limit of the rate is 9.2 per million, below 1 in 100,000.

A training is healthy if its loss fell and stayed there: the median of the last tenth of its training losses is finite
and below 0.9 of the loss before training (`is_healthy`). That was fixed before any detector; whatever fails it is left
out, and reported as left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.faults.conducts import BatchRamp, Conduct, Curriculum, LabelNoise, Rectified, SparseEmbedding, Subset
from benchmarks.faults.training import Training
from benchmarks.faults.workloads import ARCHITECTURES, HALVES, WORKLOADS, Workload

STEPS = 8000
SEEDS = {"tune": 2, "test": 4}
FELL = 0.9
Recipe = tuple[Workload, list[Conduct]]


def _option(workload: Workload, name: str, value: object) -> Workload:
    """With an option of the model."""
    return workload.changed(model=(*(item for item in workload.scenario.model if item[0] != name), (name, value)))


def _with(workload: Workload, *, drops: Sequence[float] = (), restarts: int = 0) -> Workload:
    return replace(workload, drops=tuple(drops), restarts=restarts)


def _few_rows(workload: Workload, seed: int, batch: int) -> Workload:
    rows = (1, 2, 4)[seed % 3]
    share = rows / batch
    lr = workload.lr * (math.sqrt(share) if workload.scenario.optimizer in ("adamw", "rmsprop") else share)
    return workload.changed(batch=rows, lr=lr)


def _rectified(w: Workload, _seed: int) -> Recipe | None:
    if w.architecture == "gru":
        return None
    return w.changed(width=w.scenario.width * (1 if w.architecture == "transformer" else 2)), [Rectified()]


def _dropped(w: Workload, _seed: int) -> Recipe | None:
    return None if w.architecture == "gru" else (_option(w, "dropout", 0.5 if w.architecture == "mlp" else 0.3), [])


def _edge(w: Workload, _seed: int) -> Recipe | None:
    """Full batches: the sharpness rises until 2/lr (38/lr for Adam) and stays there by itself."""
    return w.changed(clip=None, warmup=0, schedule="constant"), [Subset(64, full_batch=True)]


def _decayed(w: Workload, _seed: int) -> Recipe:
    return w.changed(weight_decay=0.3 if w.is_adam else 3e-3), []


KINDS: dict[str, Callable[[Workload, int], Recipe | None]] = {
    "plain": lambda w, _: (w, []),
    "constant": lambda w, _: (w.changed(schedule="constant"), []),
    "warmup": lambda w, _: (w.changed(warmup=800, schedule="cosine"), []),
    "cosine": lambda w, _: (w.changed(schedule="cosine"), []),
    "step-decay": lambda w, _: (_with(w.changed(schedule="constant"), drops=(0.3, 0.6, 0.85)), []),
    "restarts": lambda w, _: (_with(w, restarts=4), []),
    "sparse-embedding": lambda w, _: (w, [SparseEmbedding()]) if w.is_text else None,
    "curriculum": lambda w, _: (w, [Curriculum()]),
    "sparse-relu": _rectified,
    "edge": lambda w, s: None if w.is_adam else _edge(w, s),
    "edge-adam": lambda w, s: _edge(w, s) if w.is_adam else None,
    "batch-ramp": lambda w, _: (w, [BatchRamp()]),
    "label-noise": lambda w, _: (w, [LabelNoise(0.2)]),
    "small-batch": lambda w, s: (_few_rows(w, s, w.scenario.batch), []),
    "dropout": _dropped,
    "weight-decay": _decayed,
    "fitted": lambda w, _: (w.changed(schedule="constant"), [Subset(128)]),
    "clipped": lambda w, _: (w.changed(clip=0.3), []),
    "bold": lambda w, _: (w.changed(lr=1.7 * w.lr), []),
    "timid": lambda w, _: (w.changed(lr=w.lr / 3), []),
}


@dataclass(frozen=True)
class Healthy:
    """One healthy run."""

    kind: str
    architecture: str
    half: str
    base: str  # name of the workload
    seed: int
    steps: int = STEPS

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.architecture}/{self.seed}"

    def recipe(self) -> Recipe:
        recipe = KINDS[self.kind](WORKLOADS[self.base].changed(steps=self.steps), self.seed)
        assert recipe is not None
        return recipe

    def training(self) -> Training:
        workload, conducts = self.recipe()
        return Training(workload, self.seed, conducts)


def half_of(kind: str, architecture: str) -> str:
    return HALVES[(list(KINDS).index(kind) + ARCHITECTURES.index(architecture)) % 2]


def _runs() -> Iterator[Healthy]:
    for kind, recipe in KINDS.items():
        for architecture in ARCHITECTURES:
            half = half_of(kind, architecture)
            bases = [w for w in WORKLOADS.values() if (w.architecture, w.half) == (architecture, half)]
            bases = [w for w in bases if recipe(w, 0) is not None]
            for seed in range(SEEDS[half] if bases else 0):
                yield Healthy(kind, architecture, half, bases[seed % len(bases)].name, seed)


HEALTHY = {run.name: run for run in _runs()}


def is_healthy(losses: Sequence[float], start: float) -> bool:
    """See the head of this file.

    Args:
        losses: Training losses of all steps.
        start: The loss before training.
    """
    last = median(losses[-max(1, len(losses) // 10) :])
    return math.isfinite(last) and all(map(math.isfinite, losses)) and last < FELL * start
