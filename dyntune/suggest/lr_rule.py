"""The rule behind :func:`dyntune.suggest_lr`: evidence in, recommendation out; no model in sight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

from dyntune.records import Estimate, Recommendation, Status
from dyntune.stability.thresholds import (
    DETERMINISTIC_SOURCE,
    STOCHASTIC_SOURCE,
    Recurrence,
    batch_threshold,
    threshold,
)
from dyntune.suggest.blend import BLEND, INTERVAL, LEVEL

__all__ = ["LREvidence", "lr_rule"]

# Relative standard error of the batch curvature above which it decides nothing: at 0.5 its 95% interval includes zero.
USELESS_STANDARD_ERROR = 0.5
# At most half of a rate that was seen to blow up; on the tune half of benchmarks/lr that bound acts on 12 of 247
# suggestions and costs nothing (cross-validated regret 0.063 with it, 0.064 without).
BLOW_UP_SHARE = 0.5
# Short runs and curvature that lie as far apart as the whole interval is wide are said to disagree.
DISAGREEMENT = 2.0 ** (INTERVAL[1] - INTERVAL[0])
UNIT = "learning rate"

RULE = (
    "blend, in octaves, of the rate that got furthest in short runs, the rate that blew up, the stochastic stability "
    "threshold and the one-step critical rate, fitted to brute-force sweeps; at most half the rate that blew up and "
    "the deterministic stability threshold"
)
SOURCES = (
    DETERMINISTIC_SOURCE,
    STOCHASTIC_SOURCE,
    "Kalra and Barkeshli, arXiv:2406.09405 and arXiv:2601.16979 (critical learning rate, warm-up)",
)


@dataclass(frozen=True, kw_only=True)
class LREvidence:
    """What was measured; learning rates are those of the first parameter group.

    Args:
        pick: The rate with the lowest loss among the short runs; None when none lowered it.
        spacing: Factor between neighbouring rates of the short runs, > 1.
        blow_up: Lowest rate seen to blow up; None if none did.
        batch_curvature: Mean over batches of ``d.Hd / d.g`` along ``d = P^-1 g``; None if not measured.
        batch_curvature_se: Its standard error; None for one batch.
        lambda_max: Largest eigenvalue of ``P^-1/2 H P^-1/2``; None if not measured.
        critical: One-step critical rate at the start.
        initial: Loss before training.
        reached: Loss that the pick reached, on the batches of `initial`.
        gain_se: Standard error of ``initial - reached``, batches paired.
        num_batches: Distinct batches seen.
        warmup: Warm-up steps of the runs.
        cost: Gradient-equivalents spent.
        num_steps: Length of the training to come, if known.
        beta2: Adam's beta2, for the warm-up.
        verified: Whether the pick was trained on for longer without blowing up.
        checks: What was verified, in words.
        series: Curves for the plot.
    """

    pick: float | None
    spacing: float
    blow_up: float | None
    batch_curvature: float | None
    batch_curvature_se: float | None
    lambda_max: Estimate | None
    critical: float
    initial: float
    reached: float
    gain_se: float = 0.0
    num_batches: int
    warmup: int
    cost: float
    num_steps: int | None = None
    beta2: float | None = None
    verified: bool = True
    checks: tuple[str, ...] = ()
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)


def lr_rule(evidence: LREvidence, *, optimizer: Recurrence) -> Recommendation:
    """Turn evidence into a learning rate.

    Args:
        evidence: See :class:`LREvidence`.
        optimizer: Momentum, weight decay and family.

    Returns:
        A recommendation; refused when no learning rate lowered the loss.

    Example:
        >>> e = LREvidence(
        ...     pick=0.1,
        ...     spacing=3.0,
        ...     blow_up=2.0,
        ...     batch_curvature=5.0,
        ...     batch_curvature_se=0.2,
        ...     lambda_max=None,
        ...     critical=1.0,
        ...     initial=2.3,
        ...     reached=1.0,
        ...     num_batches=16,
        ...     warmup=3,
        ...     cost=180.0,
        ... )
        >>> rec = lr_rule(e, optimizer=Recurrence("sgd", 0.0, 0.1))
        >>> round(rec.value, 2), rec.status.name
        (0.08, 'OK')
    """
    stochastic, deterministic = _stochastic(evidence, optimizer), _deterministic(evidence, optimizer)
    recommend = partial(_recommend, evidence, optimizer, stochastic, deterministic)
    if evidence.pick is None:
        return recommend(value=None, status=Status.REFUSED, reason=_refusal(evidence))
    status, reason = _judge(evidence, stochastic)
    measured = {
        "pick": evidence.pick,
        "blow_up": evidence.blow_up,
        "stochastic": None if stochastic is None else stochastic.value,
    }
    value = BLEND.value(measured, critical=evidence.critical, adaptive=optimizer.preconditioned)
    if evidence.blow_up is not None:
        value = min(value, BLOW_UP_SHARE * evidence.blow_up)
    if deterministic is not None:
        # lambda_max of one batch sees directions that the batches' own gradients hide until it is too late: an SGD run
        # on digits above it, and below all else, died after 100 steps (decision 0003).
        value = min(value, float(deterministic))
    return recommend(value=value, status=status, reason=reason)


def _refusal(evidence: LREvidence) -> str:
    if not math.isfinite(evidence.reached):
        return "every learning rate tried blew up, the lowest too. Check the loss and the data, or raise max_gradients."
    return (
        f"no learning rate tried lowered the loss ({evidence.initial:.4g} before, {evidence.reached:.4g} at best). Is "
        "the model already trained, or the batch too small? Give more batches or a larger max_gradients."
    )


def _stochastic(evidence: LREvidence, optimizer: Recurrence) -> Estimate | None:
    """Learning rate at which batch curvature meets its threshold; None where it says nothing."""
    mean, error = evidence.batch_curvature, evidence.batch_curvature_se
    if mean is None or not math.isfinite(mean) or mean <= 0:
        return None
    if error is not None and error > USELESS_STANDARD_ERROR * mean:
        return None
    limit = float(batch_threshold(optimizer))
    value = limit / mean
    # 1.96 standard errors: a 95% interval for a mean over batches.
    spread = 1.96 * error if error is not None else math.inf
    return Estimate(
        value=value,
        low=limit / (mean + spread) if math.isfinite(spread) else 0.0,
        high=limit / (mean - spread) if spread < mean else math.inf,
        level=0.95 if error is not None else None,
        unit=UNIT,
        method="2 / batch curvature (times 1 - momentum for SGD)",
        covers="sampling",
    )


def _deterministic(evidence: LREvidence, optimizer: Recurrence) -> Estimate | None:
    """Learning rate at which lambda_max meets the full-batch threshold."""
    found = evidence.lambda_max
    if found is None or found.value is None or found.value <= 0:
        return None
    limit = float(threshold(optimizer))
    return Estimate(
        value=limit / found.value,
        low=limit / found.high,
        high=limit / found.low if found.low > 0 else math.inf,
        level=found.level,
        unit=UNIT,
        method="full-batch threshold / lambda_max of one batch",
        covers="numerical",
        status=found.status,
        reason=found.reason,
    )


def _judge(evidence: LREvidence, stochastic: Estimate | None) -> tuple[Status, str]:
    if not evidence.verified:
        return Status.UNCERTAIN, (
            "higher rates blew up only after the short runs, and the budget did not last to try the value for longer: "
            "raise max_gradients"
        )
    if evidence.num_batches == 1:
        return Status.ONE_BATCH, Status.ONE_BATCH.value
    gain = evidence.initial - evidence.reached
    if gain < 2 * evidence.gain_se:
        return Status.UNCERTAIN, (
            f"the loss fell by {gain:.3g}, within the noise between batches (two standard errors "
            f"{2 * evidence.gain_se:.3g}): the short runs hardly tell learning rates apart. Give larger batches or a "
            "larger max_gradients"
        )
    if stochastic is None or stochastic.value is None:
        return Status.UNCERTAIN, (
            "batch curvature says nothing here (negative, or its standard error is over half of it), so the value "
            "rests on the short runs alone"
        )
    assert evidence.pick is not None
    ratio = stochastic.value / 2 / evidence.pick
    if not 1 / DISAGREEMENT <= ratio <= DISAGREEMENT:
        return Status.UNCERTAIN, (
            f"short runs and curvature disagree by a factor {max(ratio, 1 / ratio):.0f}: an instability may come that "
            "short runs cannot see yet, or curvature may fall during training"
        )
    return Status.OK, ""


def _max_stable(evidence: LREvidence, stochastic: Estimate | None, value: float) -> Estimate:
    """Geometric mean of what is known to fail and of what the stochastic threshold allows; not calibrated."""
    high = evidence.blow_up if evidence.blow_up is not None else math.inf
    allowed = stochastic.value if stochastic is not None and stochastic.value is not None else value
    low = min(max(allowed, value), high)
    middle = math.sqrt(low * high) if math.isfinite(high) else low
    return Estimate(
        value=middle,
        low=low,
        high=high,
        level=None,
        unit=UNIT,
        method="between the stochastic threshold and the lowest rate that blew up",
        covers="both",
        status=Status.UNCERTAIN,
        reason="not calibrated against the onset of instability yet",
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
    stochastic: Estimate | None,
    deterministic: Estimate | None,
    *,
    value: float | None,
    status: Status,
    reason: str,
) -> Recommendation:
    limit = None if value is None else _max_stable(evidence, stochastic, value)
    low, high = (0.0, math.inf) if value is None else (value * 2.0 ** INTERVAL[0], value * 2.0 ** INTERVAL[1])
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
            "best in short runs": evidence.pick,
            "stochastic threshold": stochastic,
            "deterministic threshold": deterministic,
            "lambda_max (preconditioned)" if optimizer.preconditioned else "lambda_max": evidence.lambda_max,
            "lowest rate that blew up": evidence.blow_up,
            "one-step critical rate at the start": evidence.critical,
            "loss before": evidence.initial,
            "loss reached": evidence.reached,
            "batches": str(evidence.num_batches),
        },
        checks=evidence.checks,
        cost=evidence.cost,
        max_stable=limit,
        warmup_steps=None if value is None else _warmup(evidence, optimizer),
        series=evidence.series,
    )
