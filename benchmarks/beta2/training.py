"""One run at a learning rate and a beta2: the losses of :mod:`benchmarks.lr.judge`, and its spikes."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import torch

from benchmarks.beta2.workloads import Workload
from benchmarks.lr import judge

VERSION = 1  # of the training and its evaluation: a change makes recorded runs stale
WINDOW, SIGMAS = 128, 6.0  # of a spike: robust standard deviations above the median of the losses before it
MAD_TO_SD = 1.4826


@dataclass(frozen=True)
class Run(judge.Run):
    """One run.

    Args:
        spikes: Steps whose loss is more than six robust standard deviations above the median of the 128 before.
    """

    spikes: int = 0


def train(workload: Workload, lr: float, seed: int) -> Run:
    """Train from `seed`; seeds are paired, since the same one gives the same weights and batches at every beta2."""
    losses: list[float] = []
    model = workload.new_model(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = judge.train(
            workload,
            lr,
            seed,
            model=model,
            optimizer=workload.new_optimizer(model, lr, fused=True),
            batches=workload.batches(model, seed),
            watch=losses.append,
        )
    return Run(*astuple(found), spikes=count_spikes(np.array(losses)))


def count_spikes(losses: np.ndarray) -> int:
    """Steps that stand out of the 128 before them; losses of shape (steps,)."""
    if losses.size <= WINDOW:
        return 0
    before = np.lib.stride_tricks.sliding_window_view(losses, WINDOW)[:-1]
    middle = np.median(before, axis=1)
    scale = MAD_TO_SD * np.median(np.abs(before - middle[:, None]), axis=1)
    return int(np.count_nonzero(losses[WINDOW:] > middle + SIGMAS * scale))
