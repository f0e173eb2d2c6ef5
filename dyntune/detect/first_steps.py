"""What the first steps of a run did to it: :class:`FirstSteps`."""

from __future__ import annotations

import math

import numpy as np

from dyntune.monitor.rows import Rows

__all__ = ["FirstSteps"]

EARLY = 128  # steps: a warm-up, where there is one, is still under way
THROWN = 1.5  # times the first loss
FELL = 3.0  # times the present learning rate, that it was in the first steps


class FirstSteps:
    """Learning rate and loss of the first 128 steps, against what came after.

    Attributes:
        start: The first loss; NaN before there is one.
        last: The last one.
    """

    def __init__(self) -> None:
        self.start = self.last = math.nan
        self._highest_loss = -math.inf
        self._highest_lr = self._lr = 0.0

    def take(self, rows: Rows) -> None:
        """More rows."""
        names = rows.names
        early = len(rows) > 0 and int(rows.steps.min()) < EARLY
        if "train/loss" in names:
            losses = rows.column("train/loss")
            losses = losses[np.isfinite(losses)]
            if losses.size:
                self.start = float(losses[0]) if math.isnan(self.start) else self.start
                self.last = float(np.median(losses))
                if early:
                    self._highest_loss = max(self._highest_loss, float(losses.max()))
        if "train/lr" in names:
            rates = rows.column("train/lr")
            rates = rates[np.isfinite(rates)]
            if rates.size:
                self._lr = float(rates[-1])
                if early:
                    self._highest_lr = max(self._highest_lr, float(rates.max()))

    @property
    def threw(self) -> bool:
        """Whether they threw the loss up."""
        return self._highest_loss > THROWN * abs(self.start)

    @property
    def fell(self) -> bool:
        """Whether the learning rate was much higher in them than it is now."""
        return self._highest_lr > FELL * self._lr > 0.0

    @property
    def share(self) -> float:
        """The latest loss by the first one; NaN before there is one."""
        return self.last / self.start if self.start > 0.0 else math.nan
