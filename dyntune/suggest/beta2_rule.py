r"""The rule behind :func:`dyntune.suggest_beta2`: numbers in, recommendation out; no model in sight.

What a running average of squared gradients remembers should be of about the present weights. One step of Adam moves a
weight by up to the learning rate, and so the memory of ``1 / (1 - beta2)`` steps by up to ``lr / (1 - beta2)``: a path,
which is given in sizes of the weights (their root mean square). Of the values in :data:`PATH` tried, some 12 to 40 such
sizes trained best, for learning rates and lengths of training that differ a hundredfold and tenfold
(``benchmarks/beta2``). Other bounds move the value. The running average that predicts squared gradients best is one of
them and not the proposal: on a small network 0.98 to 0.99 predicted best, at most 0.1 nats better than 0.9999, and the
loss ended lowest at 0.9999.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dyntune.errors import InvalidArgumentError
from dyntune.records import Estimate, Recommendation, Status, short_number

__all__ = [
    "HALF_LIFE",
    "PATH",
    "TOLERANCE",
    "USUAL",
    "Beta2Evidence",
    "batch_transfer",
    "beta2_rule",
    "half_life",
    "half_life_beta2",
    "horizon",
    "momentum_floor",
    "path_beta2",
    "refresh_beta2",
    "spike_limit",
]

# Sizes of the weights that they may move by within the memory. On the tune half of benchmarks/beta2 (48 cells: 16
# workloads at three learning rates, four seeds) the mean regret is flat from 12 to 40, 0.52 to 0.61% of what there is
# to be learnt, 0.9% at 8 and at 150, and 0.9% for 0.999. Half and twice of it are what is given as the range.
PATH, EITHER_SIDE = 20.0, 2.0
# Learning rates over sizes of the weights at which it was judged.
JUDGED = (0.0026, 1.2)
# Half-life of the second moment in tokens: Marek et al. (2025), arXiv:2507.07101, for every batch size in their small
# language models; (0.95 at 512 rows of 1024 tokens, 0.9999 at one), their pair for large ones, is 7.1 million.
HALF_LIFE = 10e6
# Refreshes of a running average in a training: Fernandez-Hernandez et al. (2026), arXiv:2605.10119, for beta1 = beta2.
REFRESHES = 1000.0
# A running average whose memory 1 / (1 - beta2) is longer than a third of the training is no running average: after
# 3 / (1 - beta2) steps its bias correction still differs from 1 by exp(-3) = 5%.
MEMORIES = 3.0
# Excess in nats that training did not mind: 0.9999 scored up to 0.10 worse than the best and trained best (a network of
# 7000 parameters, batches of 8 and 128).
TOLERANCE = 0.1
# What people use: 0.95 for language models in large batches, 0.9999 in batches of one row (Marek et al., above).
USUAL = (0.95, 0.9999)
# Learning rates that one coordinate may move in one step before it is worth a word: as far as sign descent moves.
AMPLIFICATION = 1.0
PATH_NAME, LENGTH_NAME = "path of the weights", "a third of the training"
# beta1 < sqrt(beta2) is strict: a hundredth of 1 - beta1^2 inside of it.
INSIDE = 0.99

RULE = (
    "a known value carried over to another batch size; else the shorter memory of 1 - lr / (20 RMS of the weights) and "
    "the half-life in tokens; moved into beta1^2 .. 1 - 3 / steps and into what predicts squared gradients within 0.1 "
    "nats of the best, where that is identified"
)
SOURCES = (
    "benchmarks/beta2 (the path of 20 weight sizes)",
    "Marek et al. (2025), arXiv:2507.07101 (half-life in tokens; beta2^(B'/B))",
    "Zhang et al. (2022), arXiv:2208.09632, and Reddi et al. (2018), arXiv:1904.09237 (beta1 < sqrt(beta2))",
    "Fernandez-Hernandez et al. (2026), arXiv:2605.10119 (1 - 1000 / steps where beta1 = beta2)",
    "Patton (2011), J. Econometrics 160 (the score); tolerance: a small network, see beta2_rule.py",
)


def half_life_beta2(tokens_per_step: float, *, tokens: float = HALF_LIFE) -> float:
    """The beta2 whose average forgets half of a gradient in so many tokens: ``0.5^(tokens_per_step / tokens)``.

    Raises:
        InvalidArgumentError: Numbers that are not positive and finite.

    Source: Marek et al. (2025), arXiv:2507.07101.

    Example:
        >>> round(half_life_beta2(1024, tokens=7.08e6), 4), round(half_life_beta2(512 * 1024, tokens=7.08e6), 2)
        (0.9999, 0.95)
    """
    _positive("tokens_per_step", tokens_per_step)
    _positive("tokens", tokens)
    return float(0.5 ** (tokens_per_step / tokens))


def path_beta2(lr: float, weight_rms: float, *, path: float = PATH) -> float:
    """The beta2 within whose memory a weight moves by at most `path` times its size: ``1 - lr / (path * weight_rms)``.

    Args:
        lr: Learning rate, at its highest: Adam's step is at most about that.
        weight_rms: Root mean square of the weights.
        path: In sizes of the weights.

    Returns:
        In [0, 1): 0 where a single step goes farther.

    Raises:
        InvalidArgumentError: Numbers that are not positive and finite.

    Source: ``lr / (1 - beta2)`` with Kingma and Ba (2015), arXiv:1412.6980, section 2.1 (the step is at most about lr);
        `path` from ``benchmarks/beta2``.

    Example:
        >>> round(path_beta2(1e-3, 0.05), 4), round(path_beta2(2e-2, 0.1), 4)
        (0.999, 0.99)
    """
    _positive("lr", lr)
    _positive("weight_rms", weight_rms)
    _positive("path", path)
    return max(0.0, 1 - lr / (path * weight_rms))


def half_life(beta2: float) -> float:
    """Steps after which half of a gradient is forgotten: ``ln 0.5 / ln beta2``.

    Example:
        >>> round(half_life(0.999))
        693
    """
    _factor("beta2", beta2)
    return math.log(0.5) / math.log(beta2)


def batch_transfer(beta2: float, *, ratio: float) -> float:
    """The same half-life in samples at `ratio` times the batch: ``beta2^ratio``.

    To first order in 1 - beta2 also the square-root rule's (Malladi et al. 2022, arXiv:2205.10287).

    Raises:
        InvalidArgumentError: A factor outside (0, 1) or a ratio that is not positive.

    Source: Marek et al. (2025), arXiv:2507.07101.

    Example:
        >>> round(batch_transfer(0.95, ratio=1 / 512), 4)
        0.9999
    """
    _factor("beta2", beta2)
    _positive("ratio", ratio)
    return float(beta2**ratio)


def refresh_beta2(num_steps: float) -> float | None:
    """``1 - 1000 / num_steps``, for tied beta1 = beta2; None for trainings of 1000 steps or fewer.

    Example:
        >>> refresh_beta2(20_000), refresh_beta2(500)
        (0.95, None)
    """
    _positive("num_steps", num_steps)
    return 1 - REFRESHES / num_steps if num_steps > REFRESHES else None


def horizon(num_steps: float) -> float | None:
    """The longest memory that a training of `num_steps` has: ``1 - 3 / num_steps``; None for 3 steps or fewer.

    Example:
        >>> horizon(3000)
        0.999
    """
    _positive("num_steps", num_steps)
    return 1 - MEMORIES / num_steps if num_steps > MEMORIES else None


def momentum_floor(beta1: float) -> float:
    """The lowest beta2 with ``beta1 < sqrt(beta2)``, a hundredth of 1 - beta1^2 inside.

    Raises:
        InvalidArgumentError: A beta1 outside [0, 1).

    Source: Reddi et al. (2018), arXiv:1904.09237; Zhang et al. (2022), arXiv:2208.09632.

    Example:
        >>> round(momentum_floor(0.9), 4)
        0.8119
    """
    if not 0 <= beta1 < 1:
        raise InvalidArgumentError(f"beta1={beta1}: a momentum factor lies in [0, 1).")
    return 1 - INSIDE * (1 - beta1**2)


def spike_limit(beta1: float, *, amplification: float = AMPLIFICATION) -> float:
    """The beta2 above which a coordinate that wakes up may move further than `amplification` learning rates at once.

    It moves up to ``(1 - beta1) / sqrt(1 - beta2)``; the limit is ``1 - ((1 - beta1) / amplification)^2``.

    Source: Kingma and Ba (2015), arXiv:1412.6980, section 2.1.

    Example:
        >>> round(spike_limit(0.9), 4)
        0.99
    """
    _positive("amplification", amplification)
    return 1 - ((1 - beta1) / amplification) ** 2


@dataclass(frozen=True, kw_only=True)
class Beta2Evidence:
    """What is known and what was measured, of one parameter group.

    Args:
        present: The factor that the optimizer has.
        beta1: Its momentum factor; None for RMSprop, whose step has no running average of gradients.
        knob: What the optimizer calls the factor.
        optimizer: What kind it is; ``"Adam"`` and ``"AdamW"`` are those that the path was judged with.
        lr: Its learning rate, at its highest; None if unknown.
        weight_rms: Root mean square of the group's weights, vectors left out; None if unknown.
        num_steps: Length of the training to come; None if unknown.
        tokens_per_step: Tokens of one optimizer step; None for data without tokens. A row or an image is no token: the
            half-life was found on text, and what a sample of other data weighs in it is not known.
        tokens: Half-life in tokens.
        known: A factor that is known to be good, and this training's batch size over the one it is known at.
        best: The factor that predicts squared gradients best; None if nothing was measured.
        local_level: The same by the local-level gain.
        admitted: Range of factors not shown to predict worse than the best by more than :data:`TOLERANCE`.
        sure: Range of factors shown not to.
        scored: Steps that these are from.
        hit_rate: Share of steps in which rare coordinates have a gradient; None without such.
        measured: More that was measured and moves nothing, by name.
        checks: What was verified, in words.
        cost: Gradient-equivalents spent.
        series: Curves for the plot.
    """

    present: float
    beta1: float | None
    knob: str = "beta2"
    optimizer: str = ""
    lr: float | None = None
    weight_rms: float | None = None
    num_steps: int | None = None
    tokens_per_step: float | None = None
    tokens: float = HALF_LIFE
    known: tuple[float, float] | None = None
    best: Estimate | None = None
    local_level: Estimate | None = None
    admitted: tuple[float, float] | None = None
    sure: tuple[float, float] | None = None
    scored: int = 0
    hit_rate: float | None = None
    measured: Mapping[str, Estimate] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    cost: float = 0.0
    series: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """Whether the optimizer has beta1 = beta2."""
        return self.beta1 is not None and self.beta1 == self.present

    @property
    def step_size(self) -> float | None:
        """Learning rate over size of the weights; None where it is not known, or zero."""
        return self.lr / self.weight_rms if self.lr and self.weight_rms else None

    @property
    def unjudged(self) -> str:
        """Why the path was not judged for such a training, in words; empty where it was."""
        if self.optimizer not in ("Adam", "AdamW"):
            return f"the rule was judged with Adam and AdamW, not with {self.optimizer or 'this optimizer'}"
        if self.beta1 != 0.9:
            return f"the rule was judged at beta1 = 0.9, not at {self.beta1}"
        if self.step_size is not None and not JUDGED[0] <= self.step_size <= JUDGED[1]:
            return (
                f"a learning rate of {short_number(self.step_size)} sizes of the weights is outside what the rule was "
                f"judged at, {JUDGED[0]:g} to {JUDGED[1]:g}"
            )
        return ""

    @property
    def identified(self) -> bool:
        """Whether the measured steps bound the factor."""
        return self.best is not None and self.best.value is not None and self.admitted is not None

    @property
    def insensitive(self) -> bool:
        """Whether all usual factors were shown to predict about as well.

        Steps say nothing of a memory longer than a third of them.
        """
        if self.sure is None or self.scored <= MEMORIES:
            return False
        longest = USUAL[1] if self.num_steps is None else min(USUAL[1], horizon(self.num_steps) or 0.0)
        return self.sure[0] <= USUAL[0] and min(self.sure[1], 1 - MEMORIES / self.scored) >= longest


def beta2_rule(evidence: Beta2Evidence) -> Recommendation:
    """Turn evidence into a beta2.

    Args:
        evidence: See :class:`Beta2Evidence`.

    Returns:
        A recommendation. Its range is half to twice the path where that decided, within which the mean regret changed
        by a tenth of a percent of what there is to be learnt; otherwise what nothing excludes of the usual factors,
        0.95 to 0.9999, and of the value. ``evidence["active bound"]`` names what decided; ``"insensitive"`` where
        nothing had to. OK where the path decided, or the length of training below it, as it was judged: Adam or AdamW,
        beta1 = 0.9, learning rates as in benchmarks/beta2; UNCERTAIN otherwise. Refused when the training is so short
        that no factor is below ``1 - 3 / steps`` and above ``beta1^2``.

    Raises:
        InvalidArgumentError: A number outside its range.

    Example:
        >>> rec = beta2_rule(Beta2Evidence(present=0.999, beta1=0.9, optimizer="Adam", lr=0.01, weight_rms=0.1))
        >>> round(rec.value, 4), rec.evidence["active bound"]
        (0.995, 'path of the weights')
    """
    _factor("present", evidence.present)
    proposals = _proposals(evidence)
    name, value = next(iter(proposals.items()))
    low, high = 0.0, 1.0
    if evidence.beta1 is not None and not evidence.tied:
        low = momentum_floor(evidence.beta1)
    if evidence.num_steps is not None:
        high = horizon(evidence.num_steps) or 0.0
    if low >= high:
        return _recommend(evidence, proposals, None, (low, high), "none", _too_short(evidence, low))
    notes = []
    if evidence.identified and evidence.admitted is not None:
        inner = min(max(evidence.admitted[0], low), high), max(min(evidence.admitted[1], high), low)
        if evidence.admitted[0] > high or evidence.admitted[1] < low:
            notes.append("what predicts squared gradients best lies outside the bounds; the bounds hold")
        name, value = _moved(name, value, inner, "prediction of squared gradients")
        floor, ceiling = inner
    else:
        floor, ceiling = low, high
    ends = "beta1 < sqrt(beta2)", LENGTH_NAME
    if not low <= value <= high:
        name, value = (ends[0], low) if value < low else (ends[1], high)
    if evidence.insensitive and name in proposals:
        name = "insensitive"
    first, last = _range(evidence) if PATH_NAME in (next(iter(proposals)), name) else USUAL
    usual = min(max(floor, min(first, value)), value), max(min(ceiling, max(last, value)), value)
    return _recommend(evidence, proposals, value, usual, name, _reason(evidence, name), notes)


def _proposals(evidence: Beta2Evidence) -> dict[str, float]:
    """Values known beforehand, the one to use first."""
    found: dict[str, float] = {}
    if evidence.known is not None:
        found["known value at this batch size"] = batch_transfer(evidence.known[0], ratio=evidence.known[1])
    shortest: dict[str, float] = {}
    if evidence.tokens_per_step is not None:
        shortest["half-life in tokens"] = half_life_beta2(evidence.tokens_per_step, tokens=evidence.tokens)
    if evidence.lr and evidence.weight_rms and not evidence.tied:  # of beta1 = beta2 nothing was trained
        shortest[PATH_NAME] = path_beta2(evidence.lr, evidence.weight_rms)
    found |= dict(sorted(shortest.items(), key=lambda item: item[1]))
    if evidence.tied and evidence.num_steps is not None:
        tied = refresh_beta2(evidence.num_steps)
        if tied is not None:
            found["1000 refreshes"] = tied
    found["present value"] = evidence.present
    return found


def _range(evidence: Beta2Evidence) -> tuple[float, float]:
    """Half to twice the path."""
    if not (evidence.lr and evidence.weight_rms):
        return USUAL
    paths = PATH / EITHER_SIDE, PATH * EITHER_SIDE
    return path_beta2(evidence.lr, evidence.weight_rms, path=paths[0]), path_beta2(
        evidence.lr, evidence.weight_rms, path=paths[1]
    )


def _moved(name: str, value: float, bounds: tuple[float, float], bound: str) -> tuple[str, float]:
    moved = min(max(value, bounds[0]), bounds[1])
    return (name, value) if moved == value else (bound, moved)


def _too_short(evidence: Beta2Evidence, low: float) -> str:
    return (
        f"a training of {evidence.num_steps} steps has no memory longer than a third of it, and beta1={evidence.beta1} "
        f"asks for {evidence.knob} above {short_number(low, 4)}: lower beta1, or train longer"
    )


def _reason(evidence: Beta2Evidence, name: str) -> str:
    if name == "insensitive":
        said = "all usual values predict squared gradients about as well: the measurement adds nothing to the value"
    elif name == "present value":
        said = "nothing known beforehand or measured speaks for another value, so that the present one is kept"
    elif name == PATH_NAME:
        said = f"weights may move by {PATH:g} times their size within the memory"
    elif name == LENGTH_NAME:
        said = "a memory longer than a third of the training is no running average"
    elif evidence.identified:
        said = f"decided by: {name}"
    else:
        said = f"decided by: {name}; the measured steps do not identify a bound"
    unsure = _unsure(evidence, name)
    return f"{said}. {unsure[0].upper()}{unsure[1:]}" if unsure else said


def _unsure(evidence: Beta2Evidence, name: str) -> str:
    """Why the status is not OK; empty where it is."""
    cut = name == LENGTH_NAME and PATH_NAME in _proposals(evidence) and evidence.known is None
    if name == PATH_NAME or cut:
        return evidence.unjudged
    return f"what decided ({name}) has not been judged against brute force"


def _checks(evidence: Beta2Evidence, value: float | None) -> list[str]:
    found = list(evidence.checks)
    if value is None:
        return found
    if evidence.beta1 is not None and value > spike_limit(evidence.beta1):
        step = (1 - evidence.beta1) / math.sqrt(1 - value)
        found.append(f"a coordinate that wakes up may move {step:.2g} learning rates in one step")
    if evidence.tied:
        found.append("beta1 equals beta2 now: the value is for both")
    if evidence.hit_rate is not None and (1 - value) > evidence.hit_rate:
        found.append(
            f"rare coordinates have a gradient in {100 * evidence.hit_rate:.2g}% of steps, less often than a memory of "
            f"{1 / (1 - value):.3g} steps holds: their second moment is gone when the next one comes"
        )
    return found


def _recommend(
    evidence: Beta2Evidence,
    proposals: Mapping[str, float],
    value: float | None,
    bounds: tuple[float, float],
    name: str,
    reason: str,
    notes: list[str] | None = None,
) -> Recommendation:
    steps = None if value is None else half_life(value)
    tokens = evidence.tokens_per_step
    measured: dict[str, Estimate | float | str | None] = {"active bound": name, **proposals}
    if evidence.beta1 is not None:
        measured["lowest for beta1"] = momentum_floor(evidence.beta1)
    if evidence.num_steps is not None:
        measured["highest for the length of training"] = horizon(evidence.num_steps)
    if evidence.admitted is not None:
        low, high = (short_number(end, 4) for end in evidence.admitted)
        measured["predicts within 0.1 nats of the best"] = f"{low} .. {high}"
    if evidence.best is not None:
        measured["predicts squared gradients best"] = evidence.best
    if evidence.local_level is not None and evidence.local_level.value is not None:
        measured["local-level gain"] = evidence.local_level
    if evidence.step_size is not None:
        measured["learning rate over RMS of the weights"] = evidence.step_size
    measured |= evidence.measured
    measured["half-life in steps"] = steps
    if tokens is not None and steps is not None:
        measured["half-life, in tokens"] = steps * tokens
        measured["tokens per step"] = float(tokens)
    return Recommendation(
        knob=evidence.knob,
        value=value,
        low=0.0 if value is None else bounds[0],
        high=1.0 if value is None else bounds[1],
        level=None,
        status=Status.REFUSED if value is None else Status.UNCERTAIN if _unsure(evidence, name) else Status.OK,
        rule=RULE,
        sources=SOURCES,
        evidence=measured,
        checks=(*_checks(evidence, value), *(notes or ())),
        cost=evidence.cost,
        reason=reason,
        series=evidence.series,
    )


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InvalidArgumentError(f"{name}={value}: a positive, finite number is needed.")


def _factor(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InvalidArgumentError(f"{name}={value}: the factor of a running average lies between 0 and 1.")
