"""What the first steps of a run did to it: :class:`FirstSteps`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dyntune.detect.watch import Seen

__all__ = ["FirstSteps"]

EARLY = 128  # steps: a warm-up, where there is one, is still under way
THROWN = 1.5  # times the first loss
FELL = 3.0  # times the present learning rate, that it was in the first steps


@dataclass(frozen=True)
class FirstSteps:
    """Learning rate and loss of the first 128 steps, against the latest ones.

    Args:
        begun: The first step; -1 before there is one.
        start: The first loss.
        level: Median of the latest block.
        highest_loss: Of the first steps.
        highest_lr: Of the first steps.
        lr: The latest.
    """

    begun: int = -1
    start: float = math.nan
    level: float = math.nan
    highest_loss: float = -math.inf
    highest_lr: float = 0.0
    lr: float = 0.0

    def after(self, seen: Seen) -> FirstSteps:
        """With one more block."""
        block = seen.block
        begun = self.begun if self.begun >= 0 else int(block.steps[0])
        losses, rates = block.losses, block.rates
        start, level, lr = self.start, self.level, self.lr
        highest_loss, highest_lr = self.highest_loss, self.highest_lr
        early = int(block.steps[0]) - begun < EARLY
        if losses.size:
            start = float(losses[0]) if math.isnan(start) else start
            level = block.level
            highest_loss = max(highest_loss, float(losses.max())) if early else highest_loss
        if rates.size:
            lr = float(rates[-1])
            highest_lr = max(highest_lr, float(rates.max())) if early else highest_lr
        return FirstSteps(begun, start, level, highest_loss, highest_lr, lr)

    @property
    def threw(self) -> bool:
        """Whether they threw the loss up."""
        return self.highest_loss > THROWN * abs(self.start)

    @property
    def fell(self) -> bool:
        """Whether the learning rate was much higher in them than it is now."""
        return self.highest_lr > FELL * self.lr > 0.0

    @property
    def share(self) -> float:
        """The latest loss by the first one; NaN before there is one, or where it is not positive."""
        return self.level / self.start if self.start > 0.0 else math.nan
