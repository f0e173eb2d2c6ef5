"""From numbers to places on an axis: its range, linear or logarithmic, and round numbers to write beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dyntune.monitor.rows import Array

__all__ = ["Axis", "axis_of", "round_numbers"]

# Beyond this ratio of largest to smallest a linear axis shows the small values as zero.
LOG_RATIO = 50.0
# Drawn as if they were this large: the range of two that are farther apart is not a number any more.
LARGEST = 1e300
SMALLEST = 1e-300


@dataclass(frozen=True)
class Axis:
    """A range of values.

    Args:
        low: Its lower end.
        high: Its upper end, larger.
        log: Whether places go by the logarithm.
    """

    low: float
    high: float
    log: bool = False

    def place(self, values: Array) -> Array:
        """Where values lie: 0 at the lower end, 1 at the upper one, not beyond; NaN stays NaN. Shape as `values`."""
        low, high = self._scaled(np.array([self.low, self.high]))
        places: Array = np.clip((self._scaled(values) - low) / (high - low), 0.0, 1.0)
        return places

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers within the range, ascending."""
        if not self.log:
            return [v for v in round_numbers(self.low, self.high, most) if self.low <= v <= self.high]
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        if last - first < 1:  # less than two powers of ten: as for a linear axis
            return [v for v in round_numbers(self.low, self.high, most) if self.low <= v <= self.high and v > 0]
        stride = max(1, math.ceil((last - first + 1) / most))
        return [10.0**k for k in range(first, last + 1, stride) if -300 <= k <= 300]

    def _scaled(self, values: Array) -> Array:
        cut = np.clip(values, -LARGEST, LARGEST)
        if not self.log:
            return cut
        return np.log10(np.maximum(cut, SMALLEST))


def axis_of(
    *values: Array, include: tuple[float, ...] = (), from_zero: bool = False, log_ratio: float = LOG_RATIO
) -> Axis:
    """A range that holds all finite values: logarithmic where they are positive and far apart.

    Args:
        *values: Shape (n,) each.
        include: More numbers to hold.
        from_zero: Begin a linear range at zero where no value is negative.
        log_ratio: How far apart that is: the largest over the smallest.

    Example:
        >>> import numpy as np
        >>> axis_of(np.array([1.0, 1e6])).log, axis_of(np.array([0.0, 1e6])).log
        (True, False)
    """
    both = np.concatenate([*values, np.array(include)]) if values or include else np.empty(0)
    known = np.clip(both[np.isfinite(both)], -LARGEST, LARGEST)
    if not known.size:
        return Axis(0.0, 1.0)
    low, high = float(known.min()), float(known.max())
    floor = max(low, SMALLEST)
    if low > 0 and high / floor > log_ratio:
        return Axis(floor / 1.2, high * 1.2, log=True)
    if low == high:
        half = 0.5 * abs(low) or 0.5
        return Axis(0.0 if from_zero and low >= 0 else low - half, high + half)
    room = 0.06 * (high - low)
    if low >= 0 and (from_zero or low < 0.3 * high):
        return Axis(0.0, high + room)
    return Axis(low - room, high + room)


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten around a range, about `most` of them.

    Example:
        >>> round_numbers(0.0, 10.0, 5)
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    if not high - low > 1e-290:  # next to the smallest numbers there are, powers of ten are not round
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    stride = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9)
    return [k * stride for k in range(first, last + 1)]
