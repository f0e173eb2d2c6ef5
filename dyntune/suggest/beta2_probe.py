"""A paired probe of a few beta2: which are compared, how long, and what their last losses say; numbers alone.

The trainings themselves are those of :mod:`dyntune.suggest.beta2_trial`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.student import LEVEL, student_interval
from dyntune.pilot.twin import FORWARD_COST
from dyntune.records import Estimate, short_number
from dyntune.suggest.beta2_rule import MEMORIES, horizon
from dyntune.suggest.sweep_training import EVALUATED, TAIL_POINTS

__all__ = [
    "SEEDS",
    "Arm",
    "Plan",
    "Verdict",
    "candidates",
    "check_probe",
    "judge_probe",
    "least_probe",
    "longest_probe",
    "named",
    "plan_probe",
]

# Orders of the batches. Student's factor is 2.8 for five, 4.3 for three: halving the steps to have ten would gain less
# than it costs, since memories are told apart up to a third of the steps only.
SEEDS = 5
# The neighbours of a value remember ten times as long and a tenth as long: what people write as 0.9, 0.99, 0.999.
DECADE = 10.0
# Memories closer than a factor two are one candidate: so close are the usual values 0.9 and 0.95, or 0.99 and 0.995.
CLOSE = 2.0
ROUNDING = 1e-9  # 1 - 0.995 is half of 1 - 0.99 up to this
SHORTEST = 0.5  # a neighbour is no average of fewer steps than two
FEWEST_STEPS = 10  # as of a sweep: a tail of a twentieth and a warm-up of a tenth are then different steps


@dataclass(frozen=True)
class Arm:
    """One of the factors that are trained with.

    Args:
        factor: What is trained with.
        stands_for: The candidates that the probe cannot tell from it; the arm's own, or those merged into it.
    """

    factor: float
    stands_for: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """What a probe trains.

    Args:
        arms: The proposed value's first. One alone: there is nothing to compare.
        steps: Optimizer steps of each training.
        needed: The probe that would tell two of the candidates apart; None where there is one candidate only.
    """

    arms: tuple[Arm, ...]
    steps: int
    needed: int | None = None

    @property
    def merged(self) -> str:
        """Which candidates are one to the probe, in words; empty where each has an arm of its own."""
        said = []
        for arm in self.arms:
            others = [b for b in arm.stands_for if b != arm.factor]
            if others:
                names = " and ".join(named(b) for b in others)
                said.append(f"{names} merged with {named(arm.factor)}")
        limit = f"{self.steps} steps do not tell memories apart that are longer than a third of them"
        return f"{'; '.join(said)}: {limit}, or closer than a factor {CLOSE:.0f}" if said else ""


@dataclass(frozen=True)
class Verdict:
    """What a probe says.

    Args:
        value: The factor to use; None: the one that was proposed.
        differences: By arm, the mean difference of its last losses to the proposed value's, with an interval that holds
            for all arms at once; empty where none could be made.
        said: In words.
    """

    value: float | None
    differences: Mapping[float, Estimate]
    said: str


def candidates(value: float, *, present: float, low: float, high: float) -> tuple[float, ...]:
    """The proposed factor, the present one, and those of a tenth and ten times the memory; within ``[low, high]``.

    A neighbour outside is moved to the end of the range, one of fewer steps than two to those. Those within a factor
    two in memory of one before are left out.

    Args:
        value: Proposed.
        present: What the optimizer has; left out where the range excludes it.
        low: Lowest factor admitted.
        high: Highest factor admitted.

    Example:
        >>> candidates(0.999, present=0.9, low=0.95, high=0.9997)
        (0.999, 0.99, 0.9997)
    """
    shorter, longer = 1 - DECADE * (1 - value), 1 - (1 - value) / DECADE
    wanted = [present] if low <= present <= high else []
    wanted += [max(low, SHORTEST, round(shorter, 12)), min(high, round(longer, 12))]
    found = [value]
    for factor in wanted:
        if not any(_close(factor, other) for other in found):
            found.append(factor)
    return tuple(found)


def plan_probe(factors: Sequence[float], *, probe: int, accumulate: int = 1) -> Plan:
    """How long trainings may be, and which of the candidates they tell apart.

    The fewer arms, the longer their trainings: candidates with a memory longer than a third of the steps share one, so
    that the number of arms is the smallest at which this comes out even.

    Args:
        factors: Candidates, the proposed one first.
        probe: Budget in gradient-equivalents, at least :func:`least_probe`.
        accumulate: Batches per step.

    Example:
        >>> plan = plan_probe((0.999, 0.99, 0.9), probe=2000)
        >>> plan.steps, [arm.stands_for for arm in plan.arms]
        (185, [(0.999, 0.99), (0.9,)])
    """
    if len(factors) == 1:
        return Plan((Arm(factors[0], (factors[0],)),), 0)
    for count in range(2, len(factors) + 1):
        steps = _steps(probe, count, accumulate)
        found = _merged(factors, steps)
        if len(found) <= count:
            break
    return Plan(found, steps, _needed(factors, accumulate))


def least_probe(accumulate: int) -> int:
    """The smallest budget that two arms can be trained with: ten steps each, five times."""
    return _cost(FEWEST_STEPS, 2, accumulate)


def longest_probe(probe: int | None) -> int:
    """The most batches that one training of a probe may see; 0 without a probe."""
    return 0 if probe is None else probe // (2 * SEEDS)


def check_probe(probe: int, accumulate: int) -> None:
    """Refuse a budget that buys no comparison.

    Raises:
        InvalidArgumentError: Below :func:`least_probe`.
    """
    if probe < least_probe(accumulate):
        raise InvalidArgumentError(
            f"probe={probe} buys no {FEWEST_STEPS} steps for two values and {SEEDS} orders of the batches "
            f"(accumulate={accumulate}): give at least {least_probe(accumulate)}, or None for no probe."
        )


def judge_probe(losses: Mapping[float, Sequence[float]], *, proposed: float, initial: float) -> Verdict:
    """Compare last losses, seed by seed.

    Args:
        losses: By factor trained with, the last loss of each seed; infinite where the training was stopped. Clipped at
            `initial`: a training cannot do worse than none.
        proposed: Which of the factors is, or stands for, the proposed value.
        initial: Loss before training.

    Returns:
        The verdict. Another value than the proposed one is given where the interval of its difference, at 95% for all
        the comparisons at once (Bonferroni), lies below zero; of several such, the one with the lowest mean.

    Example:
        >>> losses = {0.999: [1.0, 1.2, 1.1], 0.9: [0.8, 1.02, 0.9]}
        >>> found = judge_probe(losses, proposed=0.999, initial=2.0)
        >>> found.value, round(found.differences[0.9].high, 2)
        (0.9, -0.16)
    """
    ends = {factor: [min(loss, initial) for loss in found] for factor, found in losses.items()}
    if all(len(set(found)) == 1 for found in ends.values()):
        return Verdict(
            None,
            {},
            f"the probe does not tell them apart: its {len(ends[proposed])} orders of the batches end at the same "
            "losses, so that there is no noise to compare differences with",
        )
    others = [factor for factor in ends if factor != proposed]
    level = 1 - (1 - LEVEL) / len(others)
    differences = {}
    for factor in others:
        paired = [a - b for a, b in zip(ends[factor], ends[proposed], strict=True)]
        mean, low, high = student_interval(paired, level)
        differences[factor] = Estimate(
            value=mean,
            low=low,
            high=high,
            level=level,
            unit="loss",
            method=f"paired trainings over {len(paired)} orders of the batches, Student's t",
            covers="sampling",
        )
    better = [factor for factor in others if differences[factor].high < 0]
    if better:
        best = min(better, key=lambda factor: float(differences[factor]))
        return Verdict(best, differences, f"in the probe {named(best)} ended lower than {named(proposed)}")
    worse = [factor for factor in others if differences[factor].low > 0]
    if len(worse) == len(others):
        return Verdict(None, differences, f"in the probe {named(proposed)} ended lowest")
    alike = " and ".join(named(factor) for factor in others if factor not in worse)
    return Verdict(None, differences, f"the probe does not tell them apart: {named(proposed)} and {alike}")


def _memory(factor: float) -> float:
    return 1 / (1 - factor)


def _close(one: float, other: float) -> bool:
    shorter, longer = sorted((_memory(one), _memory(other)))
    return longer < CLOSE * shorter * (1 - ROUNDING)


def _merged(factors: Sequence[float], steps: int) -> tuple[Arm, ...]:
    """The arms that so many steps tell apart, the first factor's in front."""
    longest = horizon(steps) or 0.0
    found: dict[float, list[float]] = {}
    late = [factor for factor in factors if factor > longest]
    for factor in factors:
        if factor in late:
            continue
        near = next((other for other in found if _close(factor, other)), factor)
        found.setdefault(near, []).append(factor)
    if late:
        top = max(found, default=longest)
        found.setdefault(top if _close(top, longest) else longest, []).extend(late)
    arms = [Arm(factor, tuple(stands)) for factor, stands in found.items()]
    return tuple(sorted(arms, key=lambda arm: factors[0] not in arm.stands_for))


def _cost(steps: int, arms: int, accumulate: int) -> int:
    """At most what `arms` trainings per seed cost: their gradients, their ends, and one look at every batch before."""
    gradients = steps * accumulate
    ends = FORWARD_COST * TAIL_POINTS * EVALUATED
    return math.ceil(FORWARD_COST * gradients + arms * SEEDS * (gradients + ends))


def _steps(probe: int, arms: int, accumulate: int) -> int:
    """How many steps a budget has, by the same account."""
    ends = FORWARD_COST * TAIL_POINTS * EVALUATED
    return math.floor((probe - arms * SEEDS * ends) / (accumulate * (FORWARD_COST + arms * SEEDS)))


def _needed(factors: Sequence[float], accumulate: int) -> int:
    """The budget that tells the shortest memory apart from all others: a factor two below a third of the steps."""
    shortest = min(_memory(factor) for factor in factors)
    return _cost(math.ceil(MEMORIES * CLOSE * shortest), 2, accumulate)


def named(factor: float) -> str:
    """With as many digits as tell it from 1."""
    return short_number(factor, max(3, 1 + math.ceil(-math.log10(1 - factor))))
