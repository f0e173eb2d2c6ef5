"""One learning rate from several that each err in their own way: fitted blends of their logarithms.

Short runs tell which rate makes progress soonest, the one-step critical rate how large a step the first gradient bears;
both follow the best learning rate as problem and optimizer change, with an offset and an error of their own, and a
third part pulls towards what is usual. All blends are linear in octaves,

    log2 value = c + c_a [adaptive] + c_m log2(1 - momentum) [not adaptive] + sum_f w_f log2 f,   sum_f w_f = 1,

over the rates f, so that rates in other units give the same answer in those units: a loss multiplied by a number
divides an SGD rate by exactly that number. Their numbers are ridge regressions on real training:
`benchmarks/lr/fit.py`, from brute-force sweeps of the tune half of the scenarios there; `tests/suggest/test_blend.py`
compares them with a fresh fit. Intervals are what cross-validation over families left of log2(truth / value): they
speak of workloads like those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["LEVEL", "ONSET", "ONSET_INTERVAL", "ONSET_LEVEL", "VALUE", "VALUE_INTERVAL", "Blend", "usual", "vertex"]

# 0.0039: the round number next to 0.0032, the best constant for optimizers that divide by the size of the gradient on
# the five workloads of the first experiment. Its offset is fitted, too; what counts is that it is the same for all.
USUAL_ADAPTIVE = 2.0**-8


@dataclass(frozen=True)
class Blend:
    """The numbers of a blend, in octaves.

    Args:
        constant: c.
        adaptive: c_a, for optimizers that divide by the size of the gradient.
        momentum: c_m, for the others.
        base: The rate that takes what the weights leave to one.
        weights: Of the other rates, by name: octaves per octave that the rate lies above `base`.
    """

    constant: float
    adaptive: float
    momentum: float
    base: str
    weights: Mapping[str, float]

    def value(self, rates: Mapping[str, float], *, adaptive: bool, momentum: float) -> float:
        """The learning rate.

        Args:
            rates: Learning rates by name, > 0; at least `base` and those in `weights`.
            adaptive: Whether the optimizer divides by the size of the gradient.
            momentum: Heavy-ball momentum, in [0, 1).

        Example:
            >>> even = Blend(0.0, 0.0, 0.0, "critical", {"vertex": 0.5})
            >>> even.value({"vertex": 0.01, "critical": 1.0}, adaptive=False, momentum=0.0)
            0.1
        """
        base = rates[self.base]
        octaves = self.constant + (self.adaptive if adaptive else self.momentum * math.log2(1 - momentum))
        octaves += sum(weight * math.log2(rates[name] / base) for name, weight in self.weights.items())
        return float(base * 2.0**octaves)


def vertex(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Minimum of the parabola in log(rate) through the lowest loss and its neighbours.

    Args:
        rates: Ascending, a constant factor apart.
        losses: As many; not finite where the rate failed.

    Returns:
        The minimum; the rate of the lowest loss itself where that is the first or the last that did not fail.

    Example:
        >>> round(vertex([0.01, 0.1, 1.0], [2.0, 1.0, 2.0]), 3)
        0.1
    """
    known = [(rate, loss) for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    place = min(range(len(known)), key=lambda i: known[i][1])
    rate, loss = known[place]
    if not 0 < place < len(known) - 1:
        return rate
    before, after = known[place - 1], known[place + 1]
    bend = before[1] - 2 * loss + after[1]
    if bend <= 0:  # all three are equal
        return rate
    return float(rate * (after[0] / rate) ** (0.5 * (before[1] - after[1]) / bend))


def usual(initial: float, *, adaptive: bool, critical: float, typical_ratio: float = 1.0) -> float:
    """A rate of the size that is usual, to lean on: one for all adaptive optimizers, for SGD 1 / loss.

    SGD's rate has the unit parameter^2 / loss. A loss that is not positive says nothing of its own scale: there the
    critical rate stands in.

    Args:
        initial: Loss before training.
        adaptive: Whether the optimizer divides by the size of the gradient.
        critical: One-step critical rate.
        typical_ratio: Of a parameter's rate to that which is asked for: what is usual is so for parameters.
    """
    if adaptive:
        return USUAL_ADAPTIVE / typical_ratio
    return 1 / initial / typical_ratio if initial > 0 else critical


# benchmarks/lr/fit.py --print
VALUE = Blend(
    constant=-0.9908,
    adaptive=-0.1380,
    momentum=0.3596,
    base="usual",
    weights={"vertex": 0.5883, "critical": 0.2273},
)
ONSET = Blend(
    constant=-1.6780,
    adaptive=0.9271,
    momentum=0.1592,
    base="critical",
    weights={"blow_up": 0.7253},
)
# Quantiles of log2(truth / value); nominally 90%, in cross-validation over families of the tune half.
VALUE_INTERVAL = (-1.969, 2.107)
ONSET_INTERVAL = (-3.124, 4.707)
# What the intervals covered on the test half, `benchmarks/lr/ours.py`: 61 and 60 of 70 (exact 95% intervals 0.77 to
# 0.94 and 0.75 to 0.93).
LEVEL = 0.87
ONSET_LEVEL = 0.86
