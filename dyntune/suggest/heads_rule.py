r"""The rule behind :func:`dyntune.suggest_heads`: numbers of every head count in, a table, a verdict and a choice out.

How far a head count moves the learning rate at which training begins to fail is asked of logarithms paired by seed:
with :math:`y_{h,s} = \log_2` of what the pilot of head count h and seed s found, and
:math:`d_{h,s} = y_{h,s} - \bar y_s`,

* *different*: the 95% interval of some head count's mean d excludes zero, all counts at once (Bonferroni);
* *equivalent*: every 90% interval of d lies within the margin, a factor 1.25 either way (two one-sided tests at 5%);
* *undecided*: neither.

Pilots read a rate off a ramp, and agree to half an octave at best. Where curvature was measured after the common low
warm-up, before the edge, the same test of :math:`\log_2 1 / \lambda` (of the preconditioned eigenvalue under Adam) may
say *equivalent* where pilots say nothing; it never says *different*, since training fails far above that edge.

A critical learning rate of its own for every head count would mostly be noise, so each is moved towards the mean of all
by the share of the spread between counts that noise explains (James and Stein's estimator, positive part, of
logarithms); of two or three counts, all the way.

The choice never goes by stability alone: among counts with wide enough heads it is by the loss after the same short
training, and among those that end within a hundredth of what the best gains, and are not shown to be worse, by time per
step.

Sources: Schuirmann (1987), J. Pharmacokin. Biopharm. 15 (two one-sided tests); Efron and Morris (1975), JASA 70
(shrinking); Amsel et al. (2025), ICLR (narrow heads cost accuracy).
"""

from __future__ import annotations

import html
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np

from dyntune.dynamics.attention import COLLAPSED
from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.numerics.student import LEVEL, student_interval
from dyntune.records import Estimate, Status, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "HeadChoice",
    "HeadCourse",
    "HeadEvidence",
    "Heads",
    "Verdict",
    "geometric",
    "heads_rule",
    "paired_effects",
    "seeds_loss",
]

_Choice = TypeVar("_Choice", bound=Hashable)
Verdict: TypeAlias = Literal["different", "equivalent", "undecided"]

MARGIN = 1.25  # a step of two in a usual grid of learning rates would be 2; nobody tunes to a quarter
EQUIVALENCE = 0.90  # two one-sided tests at 5%
# Narrower heads were never trained in benchmarks/heads. On its models of width 64, 16 heads of 4 ended lowest after 150
# steps; heads narrower than 32 are chosen with a warning, since in longer trainings they cost accuracy (Amsel et al.).
MIN_HEAD_DIM, NARROW = 4, 32
# Standard deviation, in octaves, of a rate read off a ramp of half octaves (dyntune.pilot.probe at the default budget):
# seeds that fall on the same step agree no better than that.
RESOLUTION = 0.5 / math.sqrt(12)
# The same of an eigenvalue that is asked for to 5% (dyntune.suggest.heads_measure): uniform over that.
SOLVED = math.log2(1.05) / math.sqrt(12)
ALIKE = 0.01  # of what the best count gains in the short training: a loss so much higher is as good where seeds agree
# exp(-30) is 1e-13: a key that is 30 ahead of the others has all the mass in float32, and the softmax no gradient.
HOT_LOGIT = 30.0
FASTER = 0.05  # differences in time per step below this are noise of a short measurement


@dataclass(frozen=True, kw_only=True)
class HeadCourse:
    """Attention along the short training of one seed; heads of all modules side by side.

    Args:
        steps: How many had been made at each look.
        max_logit: Largest logit. Shape (looks, heads of all modules).
        relative_entropy: Entropy over its largest possible value, in [0, 1]; of the same shape.
    """

    steps: tuple[int, ...]
    max_logit: tuple[tuple[float, ...], ...]
    relative_entropy: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN and infinity become None."""
        return {
            "steps": list(self.steps),
            "max_logit": [[_finite(x) for x in row] for row in self.max_logit],
            "relative_entropy": [[_finite(x) for x in row] for row in self.relative_entropy],
        }


@dataclass(frozen=True, kw_only=True)
class HeadEvidence:
    """What was measured of one head count, seed by seed in the same order for all.

    Args:
        heads: How many.
        head_dim: Width of one; None where it could not be read off the model.
        parameters: Of the model.
        lr: Suggested learning rates.
        max_stable: Rates at which training is expected to fail; NaN where none was found.
        start: Loss before training.
        loss: After the short training at the suggested rate; infinite where that failed.
        step_seconds: Time of one of its steps, the median.
        measured: More, by name, seed by seed; two of them raise flags, nothing else follows from it.
        flops: Of one step's forward and backward pass.
        saved_bytes: That the backward pass needs.
        by_head: By name and attention module, one number for each head: means over seeds.
        course: Attention along the short training of the first seed.
        curvature: Largest eigenvalue before the edge, in the optimizer's scale, seed by seed; empty if not measured.
    """

    heads: int
    head_dim: int | None
    parameters: int
    lr: tuple[float, ...]
    max_stable: tuple[float, ...]
    start: tuple[float, ...]
    loss: tuple[float, ...]
    step_seconds: tuple[float, ...]
    measured: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    flops: int | None = None
    saved_bytes: int | None = None
    by_head: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    course: HeadCourse | None = None
    curvature: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HeadChoice:
    """A row of the table.

    Args:
        heads: How many.
        head_dim: Width of one; None if unknown.
        parameters: Of the model.
        lr: Suggested learning rate, the geometric mean over seeds with Student's interval.
        critical_lr: Where training is expected to fail, moved towards the mean of all counts; its interval is that of
            this count's own seeds around it.
        own_critical_lr: The same of this count's seeds alone.
        loss: After the short training at the suggested rate.
        step_seconds: Time of a step.
        measured: More, by name: means over seeds.
        admitted: Whether its heads are wide enough to be chosen.
        flags: What speaks against it before any training has failed, in words; it moves no choice.
        flops: Of one step's forward and backward pass: matrix products, convolutions and attention.
        saved_bytes: Of activations that one step holds for its backward pass.
        by_head: By name and attention module, one number for each head: means over seeds.
        course: Attention along the short training of the first seed.
    """

    heads: int
    head_dim: int | None
    parameters: int
    lr: Estimate
    critical_lr: Estimate
    own_critical_lr: Estimate
    loss: Estimate
    step_seconds: float
    measured: Mapping[str, float]
    admitted: bool
    flags: tuple[str, ...] = ()
    flops: int | None = None
    saved_bytes: int | None = None
    by_head: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    course: HeadCourse | None = None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What :func:`dyntune.suggest_heads` found.

    Args:
        value: The number of heads to use; None where none could be chosen.
        verdict: Whether the number of heads moves the learning rate at which training fails.
        table: A row for each head count, in the order given.
        status: How far to trust it.
        reason: Why the status is what it is, and what decided.
        margin: Factor either way within which critical rates count as equal.
        effects: By head count, its critical rate over the mean of all counts, with the interval of the test.
        edges: The same of the edge that curvature gives, 1 / lambda; empty where that was not measured.
        checks: What was verified, in words.
        cost: Gradient-equivalents spent.
    """

    value: int | None
    verdict: Verdict
    table: tuple[HeadChoice, ...]
    status: Status
    reason: str
    margin: float
    effects: Mapping[int, Estimate]
    edges: Mapping[int, Estimate] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    cost: float = 0.0

    @property
    def row(self) -> HeadChoice:
        """The chosen one.

        Raises:
            RefusedError: None could be chosen.
        """
        for row in self.table:
            if row.heads == self.value:
                return row
        raise RefusedError(f"no head count was chosen: {self.reason}", partial=self)

    @property
    def lr(self) -> float:
        """The learning rate that goes with `value`."""
        return float(self.row.lr)

    def require(self) -> Heads:
        """Return self when the status is OK; raise the matching error otherwise (what ``strict=True`` does)."""
        if self.status is Status.OK and self.value is not None:
            return self
        error = RefusedError if self.value is None else NotConvergedError
        raise error(f"heads: {self.status.name}: {self.reason}", partial=self)

    def __str__(self) -> str:
        if self.value is None:
            return f"heads: refused. {self.reason}"
        text = f"{self.value} heads at learning rate {short_number(self.lr)} (critical rates: {self.verdict})"
        if self.row.flags:
            text += f"; flagged: {self.row.flags[0]}"
        return text if self.status is Status.OK else f"{text} [{self.status.name.lower()}: {self.reason}]"

    def explain(self) -> str:
        """The table, the test, the checks and the sources, in words."""
        lines = [str(self), f"status: {self.status.name}: {self.reason}"]
        for row in self.table:
            lines.append(
                f"  {row.heads} heads of {row.head_dim or 'unknown'}{'' if row.admitted else ' (too narrow)'}: lr "
                f"{estimate_text(row.lr)}; critical {estimate_text(row.critical_lr)}, by its own "
                f"seeds {estimate_text(row.own_critical_lr)}; "
                f"loss {estimate_text(row.loss)}; {1e3 * row.step_seconds:.3g} ms a step; {row.parameters} parameters"
                f"{'' if row.flops is None else f'; {short_number(float(row.flops))} operations a step'}"
                f"{'' if row.saved_bytes is None else f'; {row.saved_bytes / 1e6:.3g} MB of activations'}"
            )
            lines += [f"    flag: {flag}" for flag in row.flags]
            lines += [f"    {name}: {short_number(value)}" for name, value in row.measured.items()]
        lines.append(f"critical rate over the mean of all (equal within a factor {self.margin:g}):")
        lines += [f"  {heads} heads: {estimate_text(effect)}" for heads, effect in self.effects.items()]
        if self.edges:
            lines.append("edge by curvature, before training reaches it, over the mean of all:")
            lines += [f"  {heads} heads: {estimate_text(edge)}" for heads, edge in self.edges.items()]
        lines += [f"check: {check}" for check in self.checks]
        lines.append(f"cost: {self.cost:.0f} gradient-equivalents")
        lines += [f"source: {source}" for source in SOURCES]
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None, *, observed: Mapping[int, float] | None = None) -> Axes:
        """Draw learning rates over the number of heads (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_heads

        return plot_heads(self, observed=observed, ax=ax)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN and infinity become None."""
        rows = [
            {
                "heads": row.heads,
                "head_dim": row.head_dim,
                "parameters": row.parameters,
                "lr": row.lr.to_dict(),
                "critical_lr": row.critical_lr.to_dict(),
                "own_critical_lr": row.own_critical_lr.to_dict(),
                "loss": row.loss.to_dict(),
                "step_seconds": row.step_seconds,
                "measured": {name: _finite(v) for name, v in row.measured.items()},
                "admitted": row.admitted,
                "flags": list(row.flags),
                "flops": row.flops,
                "saved_bytes": row.saved_bytes,
                "by_head": {
                    name: {module: [_finite(x) for x in values] for module, values in modules.items()}
                    for name, modules in row.by_head.items()
                },
                "course": None if row.course is None else row.course.to_dict(),
            }
            for row in self.table
        ]
        return {
            "value": self.value,
            "verdict": self.verdict,
            "status": self.status.name,
            "reason": self.reason,
            "margin": self.margin,
            "table": rows,
            "effects": {str(heads): effect.to_dict() for heads, effect in self.effects.items()},
            "edges": {str(heads): edge.to_dict() for heads, edge in self.edges.items()},
            "checks": list(self.checks),
            "cost": self.cost,
        }

    def plot_map(self, outcomes: Mapping[int, Mapping[float, float]], ax: Axes | None = None) -> Axes:
        """Draw a brute force with the measured edge over it (needs matplotlib, imported here only).

        Args:
            outcomes: Number of heads -> learning rate -> final loss; infinite for a run that failed.
            ax: Where to draw.
        """
        from dyntune.plots import plot_stability_map

        return plot_stability_map(
            dict(sorted(outcomes.items())),
            critical={row.heads: row.critical_lr for row in self.table},
            suggested={row.heads: row.lr for row in self.table},
            title="What training came to, and where it was expected to fail",
            xlabel="heads",
            ax=ax,
        )

    def plot_attention(self, ax: Axes | None = None, *, heads: int | None = None) -> Axes:
        """Draw logits and entropy of every head along the short training (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_attention

        return plot_attention(self, heads=heads, ax=ax)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


SOURCES = (
    "Schuirmann (1987), J. Pharmacokin. Biopharm. 15 (equivalence by two one-sided tests)",
    "Efron and Morris (1975), JASA 70 (moving estimates towards their mean)",
    "Amsel et al. (2025), ICLR (narrow heads cost accuracy)",
)


def heads_rule(
    evidence: Sequence[HeadEvidence],
    *,
    margin: float = MARGIN,
    min_head_dim: int | None = None,
    checks: tuple[str, ...] = (),
    cost: float = 0.0,
) -> Heads:
    """Turn measurements into a table, a verdict and a choice.

    Args:
        evidence: One for each head count, all with the same seeds.
        margin: Factor, > 1, within which critical rates count as equal.
        min_head_dim: Narrowest head that may be chosen; None: 4, with a warning below 32.
        checks: What was verified, in words.
        cost: Gradient-equivalents spent.

    Raises:
        InvalidArgumentError: No head count, a different number of seeds, or a number outside its range.

    Example:
        >>> def row(heads, loss):
        ...     return HeadEvidence(
        ...         heads=heads,
        ...         head_dim=64 // heads,
        ...         parameters=9,
        ...         lr=(0.1,) * 3,
        ...         max_stable=(1.0, 1.1, 0.9),
        ...         start=(3.0,) * 3,
        ...         loss=loss,
        ...         step_seconds=(1.0,) * 3,
        ...     )
        >>> found = heads_rule([row(1, (2.0, 2.1, 2.2)), row(2, (1.0, 1.1, 1.2))])
        >>> found.value, found.verdict
        (2, 'equivalent')
    """
    _check(evidence, margin)
    effects, verdict = _effects(evidence, margin)
    edges, by_curvature = _edges(evidence, margin)
    if verdict == "undecided" and by_curvature == "equivalent":
        verdict = by_curvature
    shrunk = _shrunk(evidence)
    narrowest = MIN_HEAD_DIM if min_head_dim is None else min_head_dim
    admitted = [row for row in evidence if row.head_dim is None or row.head_dim >= narrowest]
    table = tuple(_row(row, shrunk.get(row.heads), admitted=row in admitted) for row in evidence)
    value, why = _chosen(admitted, narrowest)
    chosen = next((row for row in admitted if row.heads == value), None)
    if chosen is not None and chosen.head_dim is not None and chosen.head_dim < NARROW:
        checks = (
            *checks,
            f"heads of {chosen.head_dim} are narrow: what that costs may show in a longer training only (min_head_dim)",
        )
    return Heads(
        value=value,
        verdict=verdict,
        table=table,
        status=Status.REFUSED if value is None else Status.UNCERTAIN,
        reason=why if value is None else f"{why}. The choice has not been judged against brute force",
        margin=margin,
        effects=effects,
        edges=edges,
        checks=checks,
        cost=cost,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def estimate_text(found: Estimate) -> str:
    """The value with its interval, or why there is none."""
    if found.value is None:
        return f"not established ({found.reason})"
    return f"{short_number(found.value)} ({short_number(found.low)} .. {short_number(found.high)})"


def _check(evidence: Sequence[HeadEvidence], margin: float) -> None:
    if not evidence:
        raise InvalidArgumentError("evidence is empty: at least one head count has to be measured.")
    if not 1 < margin < math.inf:
        raise InvalidArgumentError(f"margin={margin}: a factor above 1 within which rates count as equal.")
    counts = {len(row.lr) for row in evidence} | {len(row.max_stable) for row in evidence}
    if len(counts | {len(row.loss) for row in evidence}) != 1 or 0 in counts:
        raise InvalidArgumentError("every head count needs the same seeds, one or more, for every number.")


def _logs(evidence: Sequence[HeadEvidence]) -> tuple[list[HeadEvidence], np.ndarray]:
    """Counts with a critical rate for every seed, and its log2: shape (counts, seeds)."""
    known = [row for row in evidence if all(math.isfinite(x) and x > 0 for x in row.max_stable)]
    return known, np.log2(np.array([row.max_stable for row in known])) if known else np.empty((0, 0))


def paired_effects(
    apart: Mapping[_Choice, Sequence[float]], margin: float, *, resolution: float = RESOLUTION
) -> tuple[dict[_Choice, Estimate], Verdict]:
    """What each choice does to the critical rate, and the verdict.

    Args:
        apart: By choice, log2 of its critical rate over the mean of all, seed by seed.
        margin: Factor within which rates count as equal.
        resolution: Standard deviation, in octaves, below which seeds agree by chance only.
    """
    if len(apart) < 2:
        return {}, "undecided"
    effects: dict[_Choice, Estimate] = {}
    equal, different = True, False
    for choice, d in apart.items():
        mean, low, high = _interval(d, EQUIVALENCE, resolution)
        equal &= -math.log2(margin) <= low and high <= math.log2(margin)
        _, first, last = _interval(d, 1 - (1 - LEVEL) / len(apart), resolution)
        different |= first > 0 or last < 0
        effects[choice] = Estimate(
            value=2**mean,
            low=_power(low),
            high=_power(high),
            level=EQUIVALENCE,
            unit="1",
            method=f"critical rates of {len(d)} paired seeds over their mean for {len(apart)} choices, Student's t",
            covers="sampling",
        )
    # What is both is different by less than matters.
    return effects, "equivalent" if equal else "different" if different else "undecided"


def _effects(evidence: Sequence[HeadEvidence], margin: float) -> tuple[dict[int, Estimate], Verdict]:
    known, logs = _logs(evidence)
    if len(known) < 2:
        return {}, "undecided"
    apart = logs - logs.mean(axis=0)
    return paired_effects({row.heads: d.tolist() for row, d in zip(known, apart, strict=True)}, margin)


def _edges(evidence: Sequence[HeadEvidence], margin: float) -> tuple[dict[int, Estimate], Verdict]:
    """The test of the edges that curvature gives; undecided unless every count has one for every seed."""
    seeds = {len(row.curvature) for row in evidence}
    if len(evidence) < 2 or seeds == {0} or len(seeds) != 1:
        return {}, "undecided"
    values = np.array([row.curvature for row in evidence])
    if not (np.isfinite(values) & (values > 0)).all():
        return {}, "undecided"
    logs = -np.log2(values)
    apart = logs - logs.mean(axis=0)
    return paired_effects(
        {row.heads: d.tolist() for row, d in zip(evidence, apart, strict=True)}, margin, resolution=SOLVED
    )


def _shrunk(evidence: Sequence[HeadEvidence]) -> dict[int, float]:
    """log2 of each count's critical rate, moved towards the mean of all."""
    known, logs = _logs(evidence)
    if not known:
        return {}
    means, middle = logs.mean(axis=1), float(logs.mean())
    apart = logs - logs.mean(axis=0)
    count, seeds = logs.shape
    if count < 4 or seeds < 2:  # three degrees of freedom, at which James and Stein's estimator begins to gain
        kept = 0.0 if count > 1 else 1.0
    else:
        noise = float(((apart - apart.mean(axis=1, keepdims=True)) ** 2).sum()) / ((count - 1) * (seeds - 1)) / seeds
        spread = float(((means - middle) ** 2).sum())
        kept = max(0.0, 1 - (count - 3) * noise / spread) if spread > 0 else 0.0
    return {row.heads: middle + kept * (float(m) - middle) for row, m in zip(known, means, strict=True)}


def _row(row: HeadEvidence, critical: float | None, *, admitted: bool) -> HeadChoice:
    own = geometric(row.max_stable)
    if critical is None or own.value is None:
        moved = Estimate.refused("no failing rate was found for every seed", unit="learning rate", method="pilots")
    else:
        factor = 2**critical / own.value
        moved = Estimate(
            value=2**critical,
            low=own.low * factor,
            high=own.high * factor,
            level=own.level,
            unit="learning rate",
            method="moved towards the mean of all head counts (James and Stein)",
            covers="sampling",
            status=own.status,
            reason=own.reason,
        )
    return HeadChoice(
        heads=row.heads,
        head_dim=row.head_dim,
        parameters=row.parameters,
        lr=geometric(row.lr),
        critical_lr=moved,
        own_critical_lr=own,
        loss=seeds_loss(row.loss),
        step_seconds=float(np.median(row.step_seconds)),
        measured={name: float(np.mean(values)) for name, values in row.measured.items()},
        admitted=admitted,
        flags=_flags(row),
        flops=row.flops,
        saved_bytes=row.saved_bytes,
        by_head=row.by_head,
        course=row.course,
    )


def _flags(row: HeadEvidence) -> tuple[str, ...]:
    """What is known to precede failures, before any step or after the common low warm-up."""
    flags = []
    for when in (", untrained", ""):
        logits = row.measured.get(f"largest attention logit{when}", ())
        entropy = row.measured.get(f"lowest relative entropy of a head{when}", ())
        stage = "before training" if when else "after the low warm-up"
        if any(not x < HOT_LOGIT for x in logits):
            flags.append(f"attention logits of {max(logits):.3g} {stage} ({HOT_LOGIT:g} or more saturate the softmax)")
        if any(not x > COLLAPSED for x in entropy):
            flags.append(f"a head with {min(entropy):.0%} of its largest entropy {stage} (below {COLLAPSED:.0%})")
    return tuple(flags)


def seeds_loss(losses: Sequence[float]) -> Estimate:
    """The mean over seeds of the loss after a short training, with Student's interval."""
    if not all(map(math.isfinite, losses)):
        return Estimate.refused("a short training failed at the suggested rate", unit="loss", method="seeds")
    mean, low, high = student_interval(losses)
    return Estimate(
        value=mean, low=low, high=high, level=LEVEL, unit="loss", method=f"{len(losses)} seeds", covers="sampling"
    )


def geometric(values: Sequence[float]) -> Estimate:
    """The geometric mean over seeds of a learning rate, with Student's interval of the logarithms."""
    if not all(math.isfinite(x) and x > 0 for x in values):
        return Estimate.refused("not found for every seed", unit="learning rate", method="pilots")
    mean, low, high = _interval([math.log2(x) for x in values], LEVEL)
    bounded = math.isfinite(low)
    return Estimate(
        value=2**mean,
        low=_power(low),
        high=_power(high),
        level=LEVEL if bounded else None,
        unit="learning rate",
        method=f"geometric mean of {len(values)} pilots, Student's t of logarithms",
        covers="sampling",
        status=Status.OK if bounded else Status.UNCERTAIN,
        reason="" if bounded else "one seed has no interval",
    )


def _interval(octaves: Sequence[float], level: float, resolution: float = RESOLUTION) -> tuple[float, float, float]:
    """Student's, of a deviation that is not below the resolution."""
    mean, low, high = student_interval(octaves, level)
    count = len(octaves)
    if count < 2 or float(np.std(octaves, ddof=1)) >= resolution:
        return mean, low, high
    from scipy.special import stdtrit

    half = float(stdtrit(count - 1, (1 + level) / 2)) * resolution / math.sqrt(count)
    return mean, mean - half, mean + half


def _power(log: float) -> float:
    """2^log, infinite or zero where that is beyond floats."""
    return 2.0 ** min(max(log, -1074.0), 1023.0) if math.isfinite(log) else (math.inf if log > 0 else 0.0)


def _chosen(admitted: Sequence[HeadEvidence], narrowest: int) -> tuple[int | None, str]:
    """The count to use and what decided."""
    alive = [row for row in admitted if all(map(math.isfinite, row.loss))]
    if not admitted:
        return None, f"no head count has heads of {narrowest} or wider"
    if not alive:
        return None, "every short training failed at the suggested learning rate"
    best = min(alive, key=lambda row: float(np.mean(row.loss)))
    level = 1 - (1 - LEVEL) / max(1, len(alive) - 1)
    near = ALIKE * max(float(np.mean(best.start)) - float(np.mean(best.loss)), 0.0)
    alike = [best]
    for row in alive:
        if row is best:
            continue
        paired = [a - b for a, b in zip(row.loss, best.loss, strict=True)]
        mean, low, _ = student_interval(paired, level)
        if low <= 0 and mean <= near:
            alike.append(row)
    if len(alike) == 1:
        return best.heads, f"{best.heads} heads end at the lowest loss after the short training"
    fastest = min(alike, key=lambda row: float(np.median(row.step_seconds)))
    quick, slow = (float(np.median(row.step_seconds)) for row in (fastest, best))
    names = " and ".join(str(row.heads) for row in sorted(alike, key=lambda row: row.heads))
    if quick < (1 - FASTER) * slow:
        return fastest.heads, f"{names} heads end at about the same loss; {fastest.heads} are fastest"
    return best.heads, f"{names} heads end at about the same loss and take as long; {best.heads} had the lowest"
