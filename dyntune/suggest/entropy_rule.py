r"""The rule behind :func:`dyntune.suggest_entropy_coef`: a spectrum over the coefficient in, a range and a choice out.

**Stable range.** With the optimizer's threshold c, the coefficients at which the learning rate eta is stable are those
with :math:`\eta \lambda_{max}(A + \alpha B) \le c`. The largest eigenvalue is convex in alpha, so that they are one
interval. Where the bracket's upper end is below the threshold they are stable for certain, where its lower end is above
they are not.

**Drift.** To first order one step changes the mean entropy by :math:`\eta\, h^T P^{-1} h\, (\alpha - \alpha_0)`, with
the gradients h of the entropy and g of the policy loss and :math:`\alpha_0 = h^T P^{-1} g / h^T P^{-1} h`, the
coefficient at which the entropy stands still. It holds for this step; over many inner steps of PPO, whose gradient
fades as the ratio moves, it overstates what happens. So the choice is *the coefficient in use, moved into the stable
range where it lies outside*. Only where it is said how many steps of this same gradient are meant (`num_steps`, as for
full-batch ascent) it is the smallest coefficient at which half of the entropy would be left after them,

.. math:: \alpha = \max\Bigl(0,\ \alpha_0 - \frac{H / 2}{\eta\, h^T P^{-1} h \cdot \mathrm{num\_steps}}\Bigr) .

Sources: Hellmann and Feynman, Weyl (slopes and bounds; see ``dyntune.numerics.affine``); Cui et al. (2025),
arXiv:2505.22617 (the covariance of log-probabilities and advantages drives the entropy).
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.numerics.affine import AffineSpectrum
from dyntune.records import Estimate, Status, short_number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

__all__ = ["EntropyCoefficient", "EntropyEvidence", "entropy_rule"]

KEPT = 0.5  # of the entropy, after the steps that are asked about
CURVES = 201  # alphas at which the stable range is looked for, before its ends are bisected
ENDS = 40  # bisections: to a millionth of a millionth of the range
SOURCES = (
    "Weyl (1912) and Hellmann and Feynman (1937): bounds and slopes of eigenvalues of A + alpha B",
    "Cui et al. (2025), arXiv:2505.22617 (covariance of log-probabilities and advantages drives the entropy)",
    "Foerster et al. (2018), arXiv:1802.05098 (which surrogate has which Hessian)",
)


@dataclass(frozen=True, kw_only=True)
class EntropyEvidence:
    """What was measured of a policy on a batch.

    Args:
        spectrum: Of A + alpha B, scaled as the optimizer scales.
        threshold: Largest stable eigenvalue times learning rate; refused where the optimizer has none.
        lr: Learning rate that acts on the policy: after a clip, where that shortens the step.
        entropy: Mean entropy, nats.
        balance: Coefficient at which it stands still; NaN where it has no gradient.
        gain: ``h.P^-1 h``, the change of entropy per learning rate and coefficient.
        linear: Whether the entropy is linear in the parameters, so that B is zero.
        num_steps: Steps of this gradient that half of the entropy has to last; None where that is not asked.
        present: The coefficient in use; None where it is not known.
        estimator: What the policy loss is.
        covariance: cov(log pi, A) over the batch; None where there is no batch.
        clip_factor: By which a global clip shortens the gradient; None where there is none.
        value_curvature: Largest eigenvalue of the value loss, beside it; None where it was not given.
        checks: What was verified, in words.
        cost: Gradient-equivalents spent.
    """

    spectrum: AffineSpectrum
    threshold: Estimate
    lr: float
    entropy: float
    balance: float
    gain: float
    linear: bool
    num_steps: int | None
    present: float | None
    estimator: str
    covariance: float | None
    clip_factor: float | None
    value_curvature: float | None
    checks: tuple[str, ...]
    cost: float


@dataclass(frozen=True, kw_only=True)
class EntropyCoefficient:
    """What :func:`dyntune.suggest_entropy_coef` found.

    Args:
        value: The coefficient to use; None where none could be chosen.
        low: Lower end of the range in which the learning rate is stable for certain; NaN where there is none.
        high: Upper end; the range that was measured may end there, see `open_ended`.
        open_ended: Whether the stable range reaches to the end of what was measured.
        status: How far to trust it.
        reason: Why the status is what it is, and what decided.
        lr: Learning rate that it is for.
        entropy: Mean entropy on the batch, nats.
        drift: Change of the mean entropy in one step at the coefficient in use (at `value` where that is not known).
        balance: Coefficient at which the entropy stands still to first order; NaN where it has no gradient.
        slope: How the largest eigenvalue changes with the coefficient, at the one in use: negative where more entropy
            raises the critical rate.
        estimator: What the policy loss is: ``"ratio"``, ``"dice"``, ``"loaded-dice"`` or ``"exact"``.
        linear: Whether the entropy is linear in the parameters: no coefficient moves the critical rate then.
        covariance: cov(log pi, A); None without a batch.
        clip_factor: By which a global clip shortens the gradient; None where there is none.
        value_curvature: Largest eigenvalue of the value loss on the same batch; None where it was not given.
        warnings: What speaks for a collapse or an explosion of the entropy, in words.
        checks: What was verified.
        cost: Gradient-equivalents spent.
    """

    value: float | None
    low: float
    high: float
    open_ended: bool
    status: Status
    reason: str
    lr: float
    entropy: float
    drift: float
    balance: float
    slope: float
    estimator: str
    linear: bool
    covariance: float | None
    clip_factor: float | None
    value_curvature: float | None
    warnings: tuple[str, ...]
    checks: tuple[str, ...]
    cost: float
    evidence: EntropyEvidence = field(repr=False)

    def __float__(self) -> float:
        if self.value is None:
            raise RefusedError(f"no entropy coefficient was recommended: {self.reason}", partial=self)
        return self.value

    def critical_lr(self, alpha: float) -> Estimate:
        """The largest stable learning rate at a coefficient, with its bracket; infinite where no curvature is positive.

        Raises:
            InvalidArgumentError: A coefficient outside the range that was measured.
        """
        low, high = self.bracket(alpha)
        limit, found = self.evidence.threshold.value, self.evidence.spectrum.at(alpha)
        if limit is None:
            return Estimate.refused(self.evidence.threshold.reason, unit="learning rate", method="threshold")
        value = limit / found.value if found.value > 0 else math.inf
        share = self.lr_share
        return Estimate(
            value=value / share,
            low=low / share,
            high=high / share,
            level=1 - self.evidence.spectrum.failure_probability,
            unit="learning rate",
            method=f"{self.evidence.threshold.method}; {self.estimator} Hessian, parameters and batch held still",
            covers="numerical",
        )

    @property
    def lr_share(self) -> float:
        """By which a clip shortens a step, 1 where it does not matter."""
        return self.evidence.lr / self.lr

    def bracket(self, alpha: float) -> tuple[float, float]:
        """Bounds on the largest stable step at a coefficient (before a clip), lower and upper.

        Raises:
            InvalidArgumentError: A coefficient outside the range that was measured.
        """
        found, limit = self.evidence.spectrum.at(alpha), self.evidence.threshold.value
        if limit is None:
            return 0.0, math.inf
        return (
            limit / found.high if found.high > 0 else math.inf,
            limit / found.low if found.low > 0 else math.inf,
        )

    def direction(self, alpha: float) -> list[torch.Tensor]:
        """The unit vector of the largest eigenvalue, in the optimizer's scale and the shapes of the parameters."""
        return self.evidence.spectrum.direction(alpha)

    def require(self) -> EntropyCoefficient:
        """Return self when the status is OK; raise the matching error otherwise (what ``strict=True`` does)."""
        if self.status is Status.OK and self.value is not None:
            return self
        error = RefusedError if self.value is None else NotConvergedError
        raise error(f"entropy coefficient: {self.status.name}: {self.reason}", partial=self)

    def __str__(self) -> str:
        if self.value is None:
            return f"entropy coefficient: refused. {self.reason}"
        rest = f"stable at learning rate {short_number(self.lr)} from {self._range}"
        text = f"{short_number(self.value)}, {rest}"
        return text if self.status is Status.OK else f"{text} [{self.status.name.lower()}: {self.reason}]"

    @property
    def _range(self) -> str:
        if math.isnan(self.low):
            return "no coefficient on"
        end = "the end of the range, " if self.open_ended else ""
        return f"{short_number(self.low)} to {end}{short_number(self.high)}"

    def explain(self) -> str:
        """The range, the drift, the warnings and the sources, in words."""
        e = self.evidence
        lines = [str(self), f"status: {self.status.name}: {self.reason}"]
        lines += [f"warning: {line}" for line in self.warnings]
        first, last = e.spectrum.range
        shown = dict.fromkeys(
            (first, *(() if e.present is None else (e.present,)), *(() if self.value is None else (self.value,)), last)
        )
        for alpha in shown:
            if first <= alpha <= last:
                top, bottom = e.spectrum.at(alpha), e.spectrum.at(alpha, "smallest")
                lines.append(
                    f"  at {short_number(alpha)}: critical rate {_said(self.critical_lr(alpha))}; largest eigenvalue "
                    f"{short_number(top.value)} ({short_number(top.low)} .. {short_number(top.high)}), changing by "
                    f"{short_number(top.slope)} per coefficient; smallest {short_number(bottom.value)}"
                )
        lines.append(f"entropy {short_number(self.entropy)} nats, changing by {short_number(self.drift)} a step")
        if not math.isnan(self.balance):
            lines.append(f"it stands still at coefficient {short_number(self.balance)}")
        if self.covariance is not None:
            lines.append(f"cov(log pi, A): {short_number(self.covariance)}")
        if self.clip_factor is not None:
            lines.append(f"the clip shortens the gradient to {self.clip_factor:.3g} of its length")
        if self.value_curvature is not None:
            lines.append(
                f"largest eigenvalue of the value loss, not part of this: {short_number(self.value_curvature)}"
            )
        lines.append(f"policy loss: {self.estimator}")
        lines += [f"check: {check}" for check in self.checks]
        lines.append(f"cost: {self.cost:.0f} gradient-equivalents")
        return "\n".join([*lines, *(f"source: {source}" for source in SOURCES)])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the critical rate over the coefficient (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_entropy_coef

        return plot_entropy_coef(self, ax=ax)

    def to_dict(self) -> Mapping[str, Any]:
        """Plain JSON types; NaN and infinity become None."""
        plain = {
            name: getattr(self, name)
            for name in (
                *("value", "low", "high", "lr", "entropy", "drift", "balance", "slope", "covariance", "clip_factor"),
                *("value_curvature", "cost"),
            )
        }
        return {name: x if x is None or math.isfinite(x) else None for name, x in plain.items()} | {
            "open_ended": self.open_ended,
            "status": self.status.name,
            "reason": self.reason,
            "estimator": self.estimator,
            "linear": self.linear,
            "warnings": list(self.warnings),
            "checks": list(self.checks),
        }

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


def _said(found: Estimate) -> str:
    if found.value is None:
        return f"unknown ({found.reason})"
    return f"{short_number(found.value)} ({short_number(found.low)} .. {short_number(found.high)})"


def stable_range(spectrum: AffineSpectrum, limit: float) -> tuple[float, float] | None:
    """Where the upper end of the bracket of the largest eigenvalue is at most `limit`; None where it is nowhere.

    The bracket's upper end is not convex where nodes meet Weyl's bound, so that the longest interval on a fine grid is
    taken, with its ends bisected.
    """
    first, last = spectrum.range
    # Dense towards the small ones, of which coefficients are thought in powers of ten.
    grid = [first + (last - first) * (i / (CURVES - 1)) ** 3 for i in range(CURVES)]
    below = [spectrum.at(x).high <= limit for x in grid]
    runs: list[tuple[int, int]] = []
    for i, good in enumerate(below):
        if good and runs and runs[-1][1] == i - 1:
            runs[-1] = runs[-1][0], i
        elif good:
            runs.append((i, i))
    if not runs:
        return None
    start, stop = max(runs, key=lambda run: grid[run[1]] - grid[run[0]])

    def crossing(inside: float, outside: float) -> float:
        for _ in range(ENDS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if spectrum.at(middle).high <= limit else (inside, middle)
        return inside

    low = grid[start] if start == 0 else crossing(grid[start], grid[start - 1])
    high = grid[stop] if stop == CURVES - 1 else crossing(grid[stop], grid[stop + 1])
    return low, high


def entropy_rule(evidence: EntropyEvidence) -> EntropyCoefficient:
    """Turn measurements into a stable range and a coefficient.

    Args:
        evidence: What was measured.

    Raises:
        InvalidArgumentError: A learning rate or a number of steps that is not positive.
    """
    e = evidence
    if not e.lr > 0 or (e.num_steps is not None and e.num_steps < 1):
        raise InvalidArgumentError(f"lr={e.lr} and num_steps={e.num_steps}: both are positive.")
    first, last = e.spectrum.range
    limit = e.threshold.value
    found = None if limit is None else stable_range(e.spectrum, limit / e.lr)
    wanted, why = _wanted(e)
    value: float | None
    if limit is None:
        value, status, reason = wanted, Status.UNCERTAIN, f"{why}. No stable range is known: {e.threshold.reason}"
    elif found is None:
        value, status = None, Status.REFUSED
        lowest = min((e.spectrum.at(x).low, x) for x in (first, last, *e.spectrum.nodes))
        rate = math.inf if lowest[0] <= 0 else limit / lowest[0]
        reason = (
            f"no coefficient from {short_number(first)} to {short_number(last)} makes learning rate "
            f"{short_number(e.lr)} stable for certain; {short_number(rate)} is stable at most. Lower the learning rate"
        )
    else:
        value = min(max(wanted, found[0]), found[1])
        status = Status.UNCERTAIN
        moved = "" if value == wanted else f", moved into the stable range from {short_number(wanted)}"
        reason = f"{why}{moved}. The choice has not been judged against brute force"
    if e.linear:
        reason += "; the entropy is linear in the parameters, so that no coefficient moves the critical rate"
    at = e.present if e.present is not None and first <= e.present <= last else (wanted if value is None else value)
    at = min(max(at, first), last)
    drift = 0.0 if math.isnan(e.balance) else e.lr * e.gain * (at - e.balance)
    return EntropyCoefficient(
        value=value,
        low=math.nan if found is None else found[0],
        high=math.nan if found is None else found[1],
        open_ended=found is not None and found[1] >= last,
        status=status,
        reason=reason,
        lr=e.lr if e.clip_factor is None else e.lr / e.clip_factor,
        entropy=e.entropy,
        drift=drift,
        balance=e.balance,
        slope=e.spectrum.at(at).slope,
        estimator=e.estimator,
        linear=e.linear,
        covariance=e.covariance,
        clip_factor=e.clip_factor,
        value_curvature=e.value_curvature,
        warnings=_warnings(e, drift, at),
        checks=e.checks,
        cost=e.cost,
        evidence=e,
    )


def _wanted(e: EntropyEvidence) -> tuple[float, str]:
    """The coefficient that the drift asks for, and why."""
    first, last = e.spectrum.range
    if e.num_steps is None:
        if e.present is None:
            return first, "the least there is: which coefficient is in use was not said"
        return e.present, "the one in use"
    if math.isnan(e.balance) or not e.gain > 0:
        return first, "the entropy has no gradient on this batch"
    # A differential entropy may be negative, and has no half: it may fall by log 2, a halving of its width.
    room = KEPT * e.entropy if e.entropy > 0 else math.log(2)
    needed = e.balance - room / (e.lr * e.gain * e.num_steps)
    if needed <= first:
        return first, f"at the present drift the entropy lasts {e.num_steps} steps without a bonus"
    if needed >= last:
        return last, f"at the present drift no coefficient up to {short_number(last)} keeps half of the entropy"
    return needed, f"the least that keeps half of the entropy over {e.num_steps} steps at the present drift"


def _warnings(e: EntropyEvidence, drift: float, at: float) -> tuple[str, ...]:
    lines = []
    room = KEPT * e.entropy if e.entropy > 0 else math.log(2)
    if e.num_steps is not None and drift < 0 and -drift * e.num_steps > room:
        lines.append(
            f"entropy collapse: at coefficient {short_number(at)} half of it is lost in {room / -drift:.0f} steps"
        )
    if e.threshold.value is not None:
        ratio = e.lr * e.spectrum.at(at).low / e.threshold.value
        if ratio > 1:
            lines.append(f"unstable at coefficient {short_number(at)}: {ratio:.3g} times the edge")
    return tuple(lines)
