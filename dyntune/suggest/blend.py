"""One learning rate from several that each err in their own way: a fitted blend of their logarithms.

Short runs, the one-step critical rate, the rate that blew up and the stochastic threshold all follow the best learning
rate as problem and optimizer change, each with an offset and an error of its own. The blend is linear in octaves,

    log2 lr = log2 critical + c0 + c1 [adaptive] + sum_f  w_f (log2 f - log2 critical)   (m_f where f is missing),

so a loss multiplied by a number divides an SGD rate by exactly that number. Its numbers are a ridge regression on real
training: `benchmarks/lr/fit.py`, from brute-force sweeps of the tune half of the scenarios there, towards the rate of
least expected regret when the rate is off by half an octave; `tests/suggest/test_blend.py` compares them with a fresh
fit. The interval is what cross-validation over families left of log2(best / value): it speaks of workloads like those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BLEND", "INTERVAL", "LEVEL", "Blend", "Weight"]


@dataclass(frozen=True)
class Weight:
    """What one measurement contributes.

    Args:
        present: Octaves per octave that it lies above the critical rate.
        missing: Octaves where there is none.
    """

    present: float
    missing: float


@dataclass(frozen=True)
class Blend:
    """The numbers of the blend, in octaves.

    Args:
        constant: c0.
        adaptive: c1, for optimizers that divide by the size of the gradient.
        weights: By measurement.
    """

    constant: float
    adaptive: float
    weights: Mapping[str, Weight]

    def value(self, measured: Mapping[str, float | None], *, critical: float, adaptive: bool) -> float:
        """The learning rate.

        Args:
            measured: Learning rates by the names in `weights`, > 0; None where a measurement says nothing.
            critical: One-step critical rate, > 0.
            adaptive: Whether the optimizer divides by the size of the gradient.

        Example:
            >>> even = Blend(0.0, 0.0, {"pick": Weight(0.5, 0.0)})
            >>> even.value({"pick": 0.01}, critical=1.0, adaptive=False)
            0.1
        """
        octaves = self.constant + self.adaptive * adaptive
        for name, weight in self.weights.items():
            rate = measured[name]
            octaves += weight.missing if rate is None else weight.present * math.log2(rate / critical)
        return float(critical * 2.0**octaves)


# benchmarks/lr/fit.py --print
BLEND = Blend(
    constant=-1.9923,
    adaptive=0.1573,
    weights={
        "pick": Weight(0.3912, 0.0000),
        "blow_up": Weight(0.0705, 1.0259),
        "stochastic": Weight(0.2922, -1.3297),
    },
)
# What the range covered on the test half: 56 of 70 (exact 95% interval 0.69 to 0.89), `benchmarks/lr/ours.py`.
LEVEL = 0.8
# Quantiles of log2(best / value); nominally 90%, in cross-validation over families of the tune half.
INTERVAL = (-2.817, 2.571)
