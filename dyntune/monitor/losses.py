"""The loss at the start of a run and now: :class:`Losses`."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

__all__ = ["Losses"]

# Whose median is "the start", and as many that are "now": one spike is neither.
COUNT = 10
# Steps that say how high the loss usually is. One that is above all of them, and as far above as the highest is above
# their median, is worth a look at once.
USUAL = 64


class Losses:
    """Remembers the first losses and the latest ones.

    Example:
        >>> losses = Losses()
        >>> losses.take([2.0, 1.0, 1.5])
        >>> losses.above_start
        False
    """

    def __init__(self) -> None:
        self.start: list[float] = []
        self._recent: deque[float] = deque(maxlen=COUNT)
        self._usual: deque[float] = deque(maxlen=USUAL)
        self.calm = math.inf  # a loss up to here waits for its turn

    def take(self, losses: Iterable[float]) -> None:
        """More of them, in order."""
        for loss in losses:
            if len(self.start) < COUNT:
                self.start.append(loss)
            self._recent.append(loss)
            self._usual.append(loss)
        if len(self._usual) == USUAL:
            finite = [loss for loss in self._usual if math.isfinite(loss)]
            self.calm = 2 * max(finite) - statistics.median(finite) if finite else math.inf

    @property
    def above_start(self) -> bool | None:
        """Whether training is worse now than it was; None before there is a loss."""
        if not self.start or not self._recent:
            return None
        return statistics.median(self._recent) > statistics.median(self.start)
