"""The rule behind :func:`dyntune.suggest_lr`: evidence in, recommendation out; no model in sight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dyntune.pilot.probe import NOISE
from dyntune.records import Estimate, Recommendation, Status
from dyntune.stability.thresholds import Recurrence
from dyntune.suggest.blend import (
    LEVEL,
    ONSET,
    ONSET_INTERVAL,
    ONSET_LEVEL,
    VALUE,
    VALUE_INTERVAL,
    Blend,
    usual,
    vertex,
)

__all__ = ["LREvidence", "lr_rule"]

# At most half of a rate that was seen to blow up.
BLOW_UP_SHARE = 0.5
UNIT = "learning rate"

RULE = (
    "blend, in octaves, of the rate that got furthest in short runs, the one-step critical rate and a usual rate, "
    "fitted to brute-force sweeps; at most what short runs survived, and half the lowest rate that blew up"
)
SOURCES = (
    "weights and intervals: brute-force sweeps of 50 workloads, benchmarks/lr",
    "Kalra and Barkeshli, arXiv:2406.09405 and arXiv:2601.16979 (critical learning rate, warm-up)",
    "Ma and Yarats, arXiv:1910.04209 (untuned warm-up of Adam)",
)


@dataclass(frozen=True, kw_only=True)
class LREvidence:
    """What was measured; learning rates are those of the first parameter group.

    Args:
        rates: Learning rates of the short runs, ascending, a constant factor apart.
        losses: The loss that each of them reached; ``inf`` where it blew up.
        blow_up: Lowest rate seen to blow up; None if none did.
        tried: Highest rate tried.
        critical: One-step critical rate at the start.
        initial: Loss before training, on the batches of `losses`.
        gain_se: Standard error of what the best run gained on those batches, paired.
        typical_ratio: Geometric mean over parameters of their rate relative to the first group's.
        num_batches: Distinct batches seen.
        warmup: Warm-up steps of the runs.
        cost: Gradient-equivalents spent.
        num_steps: Length of the training to come, if known.
        beta2: Adam's beta2, for the warm-up.
        verified: Whether the best rate was trained on for longer without blowing up.
        checks: What was verified, in words.
        series: Curves for the plot.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    blow_up: float | None
    tried: float
    critical: float
    initial: float
    gain_se: float = 0.0
    typical_ratio: float = 1.0
    num_batches: int
    warmup: int
    cost: float
    num_steps: int | None = None
    beta2: float | None = None
    verified: bool = True
    checks: tuple[str, ...] = ()
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def usual(self, optimizer: Recurrence) -> float:
        """A rate of the size that is usual."""
        ratio, adaptive = self.typical_ratio, optimizer.preconditioned
        return usual(self.initial, adaptive=adaptive, critical=self.critical, typical_ratio=ratio)

    @property
    def reached(self) -> float:
        """The lowest loss; inf where every rate blew up."""
        return min(self.losses)

    @property
    def survived(self) -> float:
        """The highest rate of a short run that did not blow up; 0 where all did."""
        return max((r for r, loss in zip(self.rates, self.losses, strict=True) if math.isfinite(loss)), default=0.0)

    @property
    def best(self) -> float | None:
        """The rate of the lowest loss; None where none is lower than before.

        Also where the loss rose within the noise of batches: to answer nevertheless was tried on the test half of
        benchmarks/lr, and both answers made training fail (docs: results, learning rates).
        """
        return self.rates[self.losses.index(self.reached)] if self.reached < self.initial else None


def lr_rule(evidence: LREvidence, *, optimizer: Recurrence) -> Recommendation:
    """Turn evidence into a learning rate.

    Args:
        evidence: See :class:`LREvidence`.
        optimizer: Momentum, weight decay and family.

    Returns:
        A recommendation; refused when no learning rate lowered the loss.

    Example:
        >>> e = LREvidence(
        ...     rates=(0.01, 0.1, 1.0),
        ...     losses=(2.1, 1.0, 1.9),
        ...     blow_up=4.0,
        ...     tried=4.0,
        ...     critical=8.0,
        ...     initial=2.3,
        ...     num_batches=16,
        ...     warmup=3,
        ...     cost=180.0,
        ... )
        >>> rec = lr_rule(e, optimizer=Recurrence("sgd", 0.0, 0.1))
        >>> rec.status.name, 0.01 < rec.value < 1.0
        ('OK', True)
    """
    if evidence.best is None:
        return _recommend(
            evidence, optimizer, value=None, lowest=None, status=Status.REFUSED, reason=_refusal(evidence)
        )
    lowest = vertex(evidence.rates, evidence.losses)
    value = _blended(VALUE, evidence, optimizer)
    if evidence.blow_up is not None:
        value = min(value, BLOW_UP_SHARE * evidence.blow_up)
    # The usual and the critical rate know nothing of this run's end: on a quadratic that starts in its flat directions
    # they led above the edge. Acts on 13 of 248 suggestions of the tune half and costs 0.0007 of regret there.
    value = min(value, evidence.survived)
    status, reason = _judge(evidence)
    return _recommend(evidence, optimizer, value=value, lowest=lowest, status=status, reason=reason)


def _blended(blend: Blend, evidence: LREvidence, optimizer: Recurrence) -> float:
    adaptive = optimizer.preconditioned
    rates = {
        "vertex": vertex(evidence.rates, evidence.losses),
        "critical": evidence.critical,
        "blow_up": evidence.tried if evidence.blow_up is None else evidence.blow_up,
        "usual": evidence.usual(optimizer),
    }
    return blend.value(rates, adaptive=adaptive, momentum=0.0 if adaptive else optimizer.momentum)


def _refusal(evidence: LREvidence) -> str:
    if not math.isfinite(evidence.reached):
        return "every learning rate tried blew up, the lowest too. Check the loss and the data, or raise max_gradients."
    return (
        f"no learning rate tried lowered the loss ({evidence.initial:.4g} before, {evidence.reached:.4g} at best). Is "
        "the model already trained, or the batch too small? Give more batches or a larger max_gradients."
    )


def _judge(evidence: LREvidence) -> tuple[Status, str]:
    if not evidence.verified:
        return Status.UNCERTAIN, (
            "the best rate of the short runs blew up when it was trained on, and the value was not tried for longer: "
            "raise max_gradients"
        )
    if evidence.num_batches == 1:
        return Status.ONE_BATCH, Status.ONE_BATCH.value
    gain = evidence.initial - evidence.reached
    if gain < NOISE * evidence.gain_se:
        return Status.UNCERTAIN, (
            f"the loss fell by {gain:.3g}, within the noise between batches (two standard errors: "
            f"{NOISE * evidence.gain_se:.3g}): the short runs hardly tell learning rates apart. Give larger batches or "
            "a larger max_gradients"
        )
    if evidence.best == evidence.rates[0]:
        return Status.UNCERTAIN, (
            f"the lowest rate tried, {evidence.rates[0]:.3g}, got furthest: short runs and blow-up disagree, and the "
            "best rate may lie lower still"
        )
    return Status.OK, ""


def _max_stable(evidence: LREvidence, optimizer: Recurrence, value: float) -> Estimate:
    """Where training begins to fail; not below the value, which is expected to train."""
    middle = _blended(ONSET, evidence, optimizer)
    low, high = (middle * 2.0**octaves for octaves in ONSET_INTERVAL)
    middle = max(middle, value)
    return Estimate(
        value=middle,
        low=min(low, middle),
        high=max(high, middle),
        level=ONSET_LEVEL,
        unit=UNIT,
        method="blend of the lowest rate that blew up and the one-step critical rate",
        covers="both",
    )


def _warmup(evidence: LREvidence, optimizer: Recurrence) -> int:
    """At least what the runs behind the value used; for Adam and a known length the untuned linear warm-up.

    Ma and Yarats (2019), arXiv:1910.04209: 2 / (1 - beta2) steps, here at most a tenth of the training.
    """
    if optimizer.family != "adam" or evidence.num_steps is None or evidence.beta2 is None:
        return evidence.warmup
    return max(evidence.warmup, min(round(2 / (1 - evidence.beta2)), evidence.num_steps // 10))


def _recommend(
    evidence: LREvidence,
    optimizer: Recurrence,
    *,
    value: float | None,
    lowest: float | None,
    status: Status,
    reason: str,
) -> Recommendation:
    low, high = (0.0, math.inf) if value is None else (value * 2.0**octaves for octaves in VALUE_INTERVAL)
    if evidence.blow_up is not None and value is not None:
        high = min(high, evidence.blow_up)
    return Recommendation(
        knob="learning rate",
        value=value,
        low=low,
        high=high,
        level=None if value is None else LEVEL,
        status=status,
        reason=reason,
        rule=RULE,
        sources=SOURCES,
        evidence={
            "best in short runs": lowest,
            "best rate tried in short runs": evidence.best,
            "one-step critical rate at the start": evidence.critical,
            "lowest rate that blew up": evidence.blow_up,
            "highest rate that short runs survived": evidence.survived,
            "highest rate tried": evidence.tried,
            "usual rate": evidence.usual(optimizer),
            "loss before": evidence.initial,
            "loss reached": evidence.reached,
            "batches": str(evidence.num_batches),
        },
        checks=evidence.checks,
        cost=evidence.cost,
        max_stable=None if value is None else _max_stable(evidence, optimizer, value),
        warmup_steps=None if value is None else _warmup(evidence, optimizer),
        series=evidence.series,
    )
