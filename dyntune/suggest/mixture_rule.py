r"""The rule behind :func:`dyntune.suggest_mixture`: how noisy each source is in, sampling proportions out.

The objective stays what it is, the mean :math:`\sum_i w_i L_i`: a row from source i counts :math:`w_i / p_i` times. Of
a batch of B rows the gradient then has the variance

.. math:: \frac{1}{B} \sum_i \frac{w_i^2 \sigma_i^2}{p_i} \quad \text{(stratified: } p_i B \text{ rows of source i)},
          \qquad
          \frac{1}{B} \Bigl( \sum_i \frac{w_i^2 m_i}{p_i} - |g|^2 \Bigr) \quad \text{(multinomial: a source drawn anew
          for each row)}

with the trace of the covariance :math:`\sigma_i^2` and the raw second moment :math:`m_i = \sigma_i^2 + |\mu_i|^2` of
one row's gradient. :func:`dyntune.numerics.water_filling.water_filling` makes either smallest, per row or per cost.

**Metric.** A step :math:`-\eta P^{-1} g` with noise :math:`\xi` raises the loss by
:math:`\tfrac{\eta^2}{2} \xi^\top P^{-1} H P^{-1} \xi` on average; where :math:`P^{-1/2} H P^{-1/2}` is a multiple of
the identity, as its preconditioner wants it to be, that is proportional to :math:`\xi^\top P^{-1} \xi`, which is what
variance means here.

**Floors** of 0.1 w keep every importance weight at 10 or less and the variance at 10 times that of proportional
sampling or less, whatever was measured wrongly: one over the tenth in both cases.

**Shrinkage.** Logarithms of the measured amounts are moved towards their mean by what their noise accounts for.

Sources: Neyman (1934); Cochran (1977), sections 5.5 and 5A; Hesterberg (1995), Technometrics 37(2) (defensive
mixtures); Efron and Morris (1975).
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dyntune.dynamics.sources import SourceMoments
from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError
from dyntune.numerics.shrinkage import kept_shares
from dyntune.numerics.water_filling import checked_floors, error_per_cost, water_filling
from dyntune.records import Estimate, Status, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Mixture", "MixtureEvidence", "Sampling", "checked_weights", "default_floors", "mixture_rule"]

Sampling: TypeAlias = Literal["stratified", "multinomial"]
Array: TypeAlias = NDArray[np.float64]
LEVEL = 0.95
KEPT = 0.1  # of each weight, as a floor: see above
SOURCES = (
    "Neyman (1934), J. R. Statist. Soc. 97(4); Cochran (1977), Sampling techniques, 5.5 (shares and costs)",
    "Hesterberg (1995), Technometrics 37(2) (defensive mixtures)",
    "Efron and Morris (1975), J. Am. Stat. Assoc. 70 (shrinkage)",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class MixtureEvidence:
    """What was measured, and what is wanted.

    Args:
        names: Of the sources.
        weights: w_i, what each counts in the objective; adds up to one.
        floors: f_i, the least share of rows of each.
        costs: t_i of a row, in any unit; None where all are equal.
        sampling: How rows are drawn.
        moments: Of one row's gradient, in the metric.
        metric: What lengths are measured in, in words.
        rows: Rows that each measured gradient is the mean of.
        shrink: Whether to shrink.
        cost: Gradient-equivalents spent.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    floors: tuple[float, ...]
    costs: tuple[float, ...] | None
    sampling: Sampling
    moments: SourceMoments
    metric: str
    rows: int = 1
    shrink: bool = True
    cost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What :func:`dyntune.suggest_mixture` found.

    Args:
        names: Of the sources.
        proportions: Share of the rows to draw from each; None where none could be chosen.
        low: Lower end of each share's 95% interval.
        high: Upper end.
        importance: What a row of each source counts in the loss: weight over share.
        weights: Of each source in the objective, which they leave as it is.
        floors: Least share of each.
        sampling: ``"stratified"`` or ``"multinomial"``: what the shares are for.
        objective: ``"same"``: nothing but the variance changes.
        to_uniform: Variance (times cost) at these shares, relative to equal shares.
        to_proportional: The same, relative to shares like the weights.
        noise: Root of one row's variance (multinomial: second moment) by source, in the metric, as used.
        status: How far to trust it.
        reason: Why the status is what it is.
        checks: What was verified, in words.
        cost: Gradient-equivalents spent.
    """

    names: tuple[str, ...]
    proportions: tuple[float, ...] | None
    low: tuple[float, ...]
    high: tuple[float, ...]
    importance: tuple[float, ...]
    weights: tuple[float, ...]
    floors: tuple[float, ...]
    sampling: Sampling
    objective: Literal["same"] = "same"
    to_uniform: Estimate
    to_proportional: Estimate
    noise: tuple[float, ...]
    status: Status
    reason: str
    checks: tuple[str, ...]
    cost: float
    evidence: MixtureEvidence = field(repr=False)

    def require(self) -> Mixture:
        """Return self when the status is OK; raise the matching error otherwise (what ``strict=True`` does).

        Raises:
            RefusedError: No proportions.
            NotConvergedError: There are some, but the status is not OK; the error carries this object as ``partial``.
        """
        if self.status is Status.OK:
            return self
        error = RefusedError if self.proportions is None else NotConvergedError
        raise error(f"mixture: {self.status.name}: {self.reason}", partial=self)

    def __str__(self) -> str:
        if self.proportions is None:
            return f"mixture: refused. {self.reason}"
        shares = ", ".join(f"{name} {100 * p:.3g}%" for name, p in zip(self.names, self.proportions, strict=True))
        text = f"{shares} ({self.sampling}, importance-weighted)"
        return text if self.status is Status.OK else f"{text} [{self.status.name.lower()}: {self.reason}]"

    def explain(self) -> str:
        """Shares, noise, ratios and sources, in words."""
        lines = [str(self), f"status: {self.status.name}: {self.reason or self.status.value}"]
        for i, name in enumerate(self.names):
            share = "none" if self.proportions is None else f"{self.proportions[i]:.4f}"
            cost = "" if self.evidence.costs is None else f", cost {short_number(self.evidence.costs[i])}"
            lines.append(
                f"  {name}: share {share} ({self.low[i]:.4f} .. {self.high[i]:.4f}), weight {self.weights[i]:.4g}, "
                f"floor {self.floors[i]:.4g}{cost}; noise {short_number(self.noise[i])}; a row counts "
                f"{short_number(self.importance[i])} times"
            )
        unit = "variance" if self.evidence.costs is None else "variance times cost"
        lines += [
            f"{unit} relative to equal shares: {self.to_uniform}",
            f"{unit} relative to shares like the weights: {self.to_proportional}",
            "objective: the same; only the gradient's variance changes, as long as rows are weighted by importance",
            "what fewer steps come of it depends on how much of the progress noise takes; in benchmarks/mixture a "
            "variance lower by 1% saved none, and measuring has its price",
        ]
        lines += [f"check: {check}" for check in self.checks]
        lines.append(f"cost: {self.cost:.0f} gradient-equivalents")
        return "\n".join([*lines, *(f"source: {source}" for source in SOURCES)])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw shares with their intervals, weights and floors (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_mixture

        return plot_mixture(self, ax=ax)

    def to_dict(self) -> Mapping[str, Any]:
        """Plain JSON types; NaN and infinity become None."""
        arrays = {name: getattr(self, name) for name in ("low", "high", "importance", "weights", "floors", "noise")}
        return {name: [x if math.isfinite(x) else None for x in each] for name, each in arrays.items()} | {
            "names": list(self.names),
            "proportions": None if self.proportions is None else list(self.proportions),
            "costs": None if self.evidence.costs is None else list(self.evidence.costs),
            "sampling": self.sampling,
            "objective": self.objective,
            "to_uniform": self.to_uniform.to_dict(),
            "to_proportional": self.to_proportional.to_dict(),
            "status": self.status.name,
            "reason": self.reason,
            "checks": list(self.checks),
            "cost": self.cost,
        }

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


def checked_weights(weights: object, count: int) -> tuple[float, ...]:
    """Weights as floats; equal ones where there are none.

    Raises:
        InvalidArgumentError: Not `count` of them, one that is negative or not finite, or another sum than one.
    """
    if weights is None:
        return (1 / count,) * count
    found = np.array(weights, dtype=np.float64)
    if found.shape != (count,) or not bool(np.isfinite(found).all()) or bool((found < 0).any()):
        raise InvalidArgumentError(
            f"weights={found.tolist()}: a weight is 0 or more, one for each of the {count} sources."
        )
    # 1e-6: weights that were written down with six digits.
    if abs(math.fsum(found) - 1) > 1e-6:
        raise InvalidArgumentError(
            f"weights={found.tolist()} add up to {math.fsum(found):.6g}: the objective is a mean over sources, and "
            "importance weights would change the learning rate by that factor. Divide them by their sum."
        )
    return tuple((found / found.sum()).tolist())


def default_floors(weights: tuple[float, ...]) -> tuple[float, ...]:
    """A tenth of each weight: see the module's docstring."""
    return tuple(KEPT * w for w in weights)


def mixture_rule(evidence: MixtureEvidence) -> Mixture:
    """Turn measured noise into sampling proportions.

    Args:
        evidence: What was measured.

    Raises:
        InvalidArgumentError: Weights, floors or costs outside their ranges, or of another number of sources.
    """
    e, m = evidence, evidence.moments
    k = len(e.names)
    w = np.array(checked_weights(e.weights, k))
    floors = checked_floors(e.floors, k)
    multinomial = e.sampling == "multinomial"
    if e.sampling not in ("stratified", "multinomial") or m.variance.shape != (k,):
        raise InvalidArgumentError(
            f"sampling={e.sampling!r} and moments of {m.variance.size} sources for {k} names: sampling is "
            '"stratified" or "multinomial", with moments of each source.'
        )
    squares, draws = (m.second, m.second_draws) if multinomial else (m.variance, m.variance_draws)
    offset = max(0.0, float(w @ m.means @ w)) if multinomial else 0.0
    offsets = np.maximum(np.einsum("i,dij,j->d", w, m.means_draws, w), 0.0) if multinomial else np.zeros(len(draws))
    amounts, again = w * np.sqrt(squares), w * np.sqrt(np.maximum(draws, 0.0))
    if not (amounts > 0).any():
        return _refused(e, w, floors, "every gradient is zero" if not m.second.any() else _QUIET)
    if multinomial and offset >= float((amounts.sum()) ** 2) * (1 - 1e-9):
        return _refused(e, w, floors, _QUIET)
    used, used_again, kept = _shrunk(amounts, again, w) if e.shrink else (amounts, again, np.ones(k))
    shares = water_filling(used, floors, e.costs, offset=_within(offset, used))
    found = [
        water_filling(a, floors, e.costs, offset=_within(g, a))
        for a, g in zip(used_again, offsets, strict=True)
        if (a > 0).any()
    ]
    ends = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    low, high = np.quantile(np.array(found), ends, axis=0) if found else (floors, np.ones(k))
    uniform = _ratio(e, amounts, again, offset, offsets, shares, np.full(k, 1 / k), "equal shares")
    proportional = _ratio(e, amounts, again, offset, offsets, shares, w, "shares like the weights")
    status, reason = _judged(proportional, min(m.counts))
    checks = [
        f"lengths: {e.metric}",
        f"{' + '.join(str(n) for n in m.counts)} gradients of {e.rows} row{'s' if e.rows > 1 else ''} each"
        + (f", {m.measurements:.0f} looks" if m.measurements > 1 else ""),
    ]
    if e.shrink:
        checks.append(f"shrunk: {', '.join(f'{100 * b:.0f}%' for b in kept)} of the distances from the mean kept")
    at_floor = [name for name, p, f in zip(e.names, shares, floors, strict=True) if p == f]
    if at_floor:
        checks.append(f"at the floor: {', '.join(at_floor)}")
    return Mixture(
        names=e.names,
        proportions=tuple(shares.tolist()),
        low=tuple(np.minimum(low, shares).tolist()),
        high=tuple(np.maximum(high, shares).tolist()),
        importance=tuple(np.divide(w, shares, out=np.zeros(k), where=shares > 0).tolist()),
        weights=tuple(w.tolist()),
        floors=tuple(floors.tolist()),
        sampling=e.sampling,
        to_uniform=uniform,
        to_proportional=proportional,
        noise=tuple(np.divide(used, w, out=np.sqrt(squares), where=w > 0).tolist()),
        status=status,
        reason=reason,
        checks=tuple(checks),
        cost=e.cost,
        evidence=e,
    )


_QUIET = "no source has any noise to reduce: every row of a source has the same gradient, and all shares do as well"


def _within(offset: float, amounts: Array) -> float:
    """|g|^2 is at most (sum a)^2 in truth; noise may say otherwise."""
    return min(offset, float(amounts.sum()) ** 2)


def _shrunk(amounts: Array, draws: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Amounts and draws with their logarithms moved towards the mean (weights apart), and what was kept."""
    kept = np.ones(len(amounts))
    seen = amounts > 0
    noise = amounts[seen] / weights[seen]
    with np.errstate(divide="ignore"):
        again = np.log(draws[:, seen] / weights[seen])
    # By the delta method: draws of a few gradients may be zero, and have no logarithm.
    errors = (draws[:, seen] / weights[seen]).var(0) / noise**2
    kept[seen] = kept_shares(np.log(noise), errors)
    share = kept[seen]

    def moved(logs: Array) -> Array:
        # A draw of zero keeps its place at minus infinity, and is not part of the mean.
        real = np.isfinite(logs)
        center = np.where(real, logs, 0.0).sum(-1, keepdims=True) / np.maximum(real.sum(-1, keepdims=True), 1)
        return weights[seen] * np.exp(np.where(real, center + share * (logs - center), -np.inf))

    new, new_draws = amounts.copy(), draws.copy()
    with np.errstate(invalid="ignore"):
        new[seen], new_draws[:, seen] = moved(np.log(noise)), moved(again)
    return new, new_draws, kept


def _ratio(
    e: MixtureEvidence,
    amounts: Array,
    again: Array,
    offset: float,
    offsets: Array,
    ours: Array,
    other: Array,
    than: str,
) -> Estimate:
    """Error per cost at our shares over that at others, with the bootstrap's interval at the shares as they are."""
    unit, method = "1", f"relative to {than}; bootstrap over gradients"

    def ratio(a: Array, g: float) -> float:
        top = error_per_cost(a, ours, costs=e.costs, offset=g)
        bottom = error_per_cost(a, other, costs=e.costs, offset=g)
        return 0.0 if top == 0 else top / bottom if 0 < top < math.inf and bottom > 0 else math.nan

    value = ratio(amounts, offset)
    draws = np.array([ratio(a, g) for a, g in zip(again, offsets, strict=True)])
    draws = draws[np.isfinite(draws)]
    if not math.isfinite(value) or not len(draws):
        return Estimate.refused("the signal is not told from the noise", unit=unit, method=method)
    low, high = (float(x) for x in np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)))
    return Estimate(
        value=value,
        low=min(low, value),
        high=max(high, value),
        level=None,
        unit="",
        method=method,
        covers="sampling",
    )


def _judged(ratio: Estimate, fewest: int) -> tuple[Status, str]:
    if ratio.value is None:
        return Status.UNCERTAIN, f"how much is gained is not known: {ratio.reason}; measure more gradients"
    if ratio.high < 1:
        return Status.OK, ""
    if ratio.low > 1:
        return Status.UNCERTAIN, "the floors cost more than the shares gain on sampling like the weights; lower them"
    return (
        Status.UNCERTAIN,
        f"{fewest} gradients of a source do not tell the variance from that of sampling like the weights; measure "
        "more, or sample like the weights",
    )


def _refused(e: MixtureEvidence, weights: Array, floors: Array, reason: str) -> Mixture:
    k = len(e.names)
    nothing = Estimate.refused(reason, unit="1", method="bootstrap over gradients")
    return Mixture(
        names=e.names,
        proportions=None,
        low=tuple(floors.tolist()),
        high=(1.0,) * k,
        importance=(math.nan,) * k,
        weights=tuple(weights.tolist()),
        floors=tuple(floors.tolist()),
        sampling=e.sampling,
        to_uniform=nothing,
        to_proportional=nothing,
        noise=(0.0,) * k,
        status=Status.REFUSED,
        reason=reason,
        checks=(f"lengths: {e.metric}",),
        cost=e.cost,
        evidence=e,
    )
