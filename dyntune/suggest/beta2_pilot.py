"""The pilot of a beta2: some coordinates of every parameter group, followed through training."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dyntune.dynamics.ema_bank import BURN_IN, EMABank
from dyntune.errors import NonFiniteError
from dyntune.numerics.random import stream_seed
from dyntune.pilot.twin import CostMeter, Twin

__all__ = ["Followed", "follow"]

# Coordinates followed in each parameter group: every tensor has the same share of them, or all of its own. 1000 squares
# a step say more than the few hundred steps that there are.
COORDINATES = 1024
# Steps of which the gradients themselves are kept, for their autocorrelation up to lag 64: eight megabytes of a group.
RECENT = 1024


@dataclass(frozen=True)
class Sample:
    """Which coordinates of a parameter group are followed."""

    tensors: Sequence[torch.Tensor]
    places: Sequence[torch.Tensor]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], *, key: tuple[int, ...]) -> Sample:
        share = -(-COORDINATES // max(1, len(tensors)))
        rng = np.random.default_rng(stream_seed(*key))
        places = [
            torch.from_numpy(np.sort(rng.choice(t.numel(), min(share, t.numel()), replace=False))).to(t.device)
            for t in tensors
        ]
        return cls(tensors, places)

    @property
    def size(self) -> int:
        return sum(len(p) for p in self.places)

    def gradient(self) -> torch.Tensor:
        """Their present gradient, in double precision on the CPU."""
        parts = [
            torch.zeros(len(place)) if t.grad is None else t.grad.reshape(-1)[place].to("cpu", torch.float64)
            for t, place in zip(self.tensors, self.places, strict=True)
        ]
        return torch.cat([part.double() for part in parts])


@dataclass(frozen=True)
class Followed:
    """What is kept of a group's coordinates.

    Args:
        bank: Their running averages.
        recent: Their latest gradients, a row a step.
    """

    bank: EMABank
    recent: deque[npt.NDArray[np.float64]]

    @classmethod
    def of(cls, sample: Sample) -> Followed:
        """Nothing yet."""
        return cls(EMABank(sample.size, tensors=[len(p) for p in sample.places]), deque(maxlen=RECENT))

    def update(self, gradient: npt.NDArray[np.float64]) -> None:
        """Of one more step; raises for NaN or infinite ones."""
        self.bank.update(gradient)
        if self.bank.steps > BURN_IN:
            self.recent.append(gradient)

    def gradients(self) -> npt.NDArray[np.float64]:
        """The latest, shape (steps, coordinates)."""
        return np.array(self.recent).reshape(len(self.recent), -1 if self.recent else 0)


def follow(
    twin: Twin, meter: CostMeter, rate: float, *, seed: int, tell: Any
) -> tuple[list[Followed | None], str | None]:
    """Train and follow; what there is of each group (None for an empty one) and why it ended early, if it did.

    Args:
        twin: What is trained.
        meter: Whose budget is spent.
        rate: Learning rate of the first group.
        seed: Of the sampled coordinates.
        tell: Called with what was spent, after every step.
    """
    samples = [
        Sample.of([p for p in group["params"] if p.numel()], key=(seed, i))
        for i, group in enumerate(twin.optimizer.param_groups)
    ]
    followed = [Followed.of(sample) if sample.size else None for sample in samples]
    while meter.left >= twin.training.accumulate:
        loss = twin.step(rate)
        if not math.isfinite(loss):
            return followed, f"the loss was {loss} at step {twin.steps} of the pilot, at learning rate {rate:.3g}"
        for sample, group in zip(samples, followed, strict=True):
            if group is None:
                continue
            try:
                group.update(sample.gradient().numpy())
            except NonFiniteError as error:
                return followed, f"the pilot ended at learning rate {rate:.3g}: {error}"
        if tell is not None:
            tell(meter.spent)
    return followed, None
