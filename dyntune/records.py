"""Results that carry their own uncertainty: :class:`Estimate`, :class:`Recommendation` and :class:`Status`."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from dyntune.errors import InvalidArgumentError, NotConvergedError, RefusedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Estimate", "Recommendation", "Status", "short_number"]

Covers = Literal["numerical", "sampling", "both"]


class Status(Enum):
    """How far a result can be trusted; the value of each member is the advice shown to the user."""

    OK = "established; the evidence agrees."
    UNCERTAIN = "usable with care: the pieces of evidence disagree or the interval is wide; see `explain()`."
    ONE_BATCH = (
        "measured on one batch only: the noise between batches is unknown, and so is progress on other data. Pass a "
        "DataLoader or a list of batches."
    )
    NOT_CONVERGED = (
        "the solver's budget ran out before the value was established: the value is a bound. Raise `max_products` "
        "(or `max_gradients`), or loosen `rtol`."
    )
    REFUSED = "no value could be established; see `explain()` for the reason."

    @property
    def usable(self) -> bool:
        """Whether a value comes with this status."""
        return self is not Status.REFUSED


def short_number(value: float | None, digits: int = 3) -> str:
    """Shortest decimal of `value` with `digits` significant digits: 3.1e-3 rather than 3.100e-03."""
    if value is None:
        return "none"
    if math.isnan(value) or math.isinf(value):
        return str(value)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")  # the exponent after rounding: 999.9 is 1e3
    if value == 0 or -2 <= int(exponent) < digits:
        return f"{value:.{digits}g}"
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def _shown(value: float | None) -> str:
    """As :func:`short_number`; factors close below 1, such as 0.9999, with two digits of what they lack."""
    if value is None or not 0.99 < value < 1:
        return short_number(value)
    return short_number(value, max(3, 1 + math.ceil(-math.log10(1 - value))))


def _finite_or_none(value: float | None) -> float | None:
    """JSON has no NaN and no infinity (RFC 8259): an unbounded end is written as null."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured number with its interval.

    Args:
        value: The number; None when the measurement was refused.
        low: Lower end of the interval (``-inf`` where nothing is known).
        high: Upper end of the interval (``inf`` where nothing is known).
        level: Probability with which the interval covers the truth, in [0, 1]; None where it was not calibrated.
        unit: Unit of `value`, such as ``"loss / parameter^2"``.
        method: How the number was made.
        covers: What the interval speaks of: the solver's error (``numerical``), the choice of batches
            (``sampling``), or ``both``.
        status: How far to trust it.
        reason: Why the status is what it is; empty when OK.
        num_products: Operator products spent.

    Example:
        >>> e = Estimate(value=2.0, low=1.9, high=2.1, level=0.95, unit="1", method="closed form", covers="numerical")
        >>> float(e), 2.05 in e
        (2.0, True)
    """

    value: float | None
    low: float
    high: float
    level: float | None
    unit: str
    method: str
    covers: Covers
    status: Status = Status.OK
    reason: str = ""
    num_products: int = 0

    def __post_init__(self) -> None:
        if self.value is not None and not self.low <= self.value <= self.high:
            raise InvalidArgumentError(
                f"Estimate: value={self.value!r} lies outside [low={self.low!r}, high={self.high!r}]; "
                "an interval must hold its own value."
            )

    @classmethod
    def refused(
        cls, reason: str, *, unit: str, method: str, low: float = -math.inf, high: float = math.inf
    ) -> Estimate:
        """Of sampling, without a value.

        Args:
            reason: Why.
            unit: As above.
            method: What was tried.
            low: What is known all the same.
            high: Likewise.

        Example:
            >>> str(Estimate.refused("two steps are no series", unit="steps", method="Sokal's window"))
            'refused: two steps are no series'
        """
        return cls(
            value=None,
            low=low,
            high=high,
            level=None,
            unit=unit,
            method=method,
            covers="sampling",
            status=Status.REFUSED,
            reason=reason,
        )

    def __float__(self) -> float:
        if self.value is None:
            raise RefusedError(f"this estimate was refused and has no value: {self.reason}", partial=self)
        return float(self.value)

    def __contains__(self, truth: float) -> bool:
        return self.low <= truth <= self.high

    def __str__(self) -> str:
        if self.value is None:
            return f"refused: {self.reason}"
        interval = f"{_shown(self.low)} .. {_shown(self.high)}"
        text = f"{_shown(self.value)} ({interval}) {self.unit}".rstrip()
        return text if self.status is Status.OK else f"{text} [{self.status.name.lower()}: {self.reason}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; infinite ends become None."""
        data = asdict(self) | {"status": self.status.name}
        return data | {key: _finite_or_none(data[key]) for key in ("value", "low", "high", "level")}


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A choice with its evidence.

    Args:
        knob: What is chosen, such as ``"learning rate"``.
        value: The recommended value; None when refused.
        low: Lower end of the range in which the choice is expected to do about as well.
        high: Upper end of that range.
        level: Measured coverage of ``[low, high]``; None while it is not calibrated.
        status: How far to trust it.
        rule: One sentence: how the evidence was turned into the value.
        sources: Papers and equations behind the rule.
        evidence: Named measurements that went into the rule.
        checks: What was verified afterwards, in words.
        cost: Gradient-equivalents spent (one forward and backward pass on a training batch).
        reason: Why the status is what it is; empty when OK.
        max_stable: Largest value expected to train without diverging, where the knob has one.
        warmup_steps: Steps of warm-up that the value assumes, where the knob has them.
        series: Curves behind the evidence (for plots): name -> list of floats.
    """

    knob: str
    value: float | None
    low: float
    high: float
    level: float | None
    status: Status
    rule: str
    sources: tuple[str, ...]
    evidence: Mapping[str, Estimate | float | str | None]
    checks: tuple[str, ...]
    cost: float
    reason: str = ""
    max_stable: Estimate | None = None
    warmup_steps: int | None = None
    series: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    def __float__(self) -> float:
        if self.value is None:
            raise RefusedError(f"no {self.knob} was recommended: {self.reason}", partial=self)
        return float(self.value)

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.knob}: refused. {self.reason}"
        parts = [f"{_shown(self.value)} ({_shown(self.low)} .. {_shown(self.high)})"]
        if self.max_stable is not None and self.max_stable.value is not None:
            parts.append(f"stable up to {short_number(self.max_stable.value)}")
        if self.warmup_steps:
            parts.append(f"warm up {self.warmup_steps} step{'s' if self.warmup_steps > 1 else ''}")
        text = ", ".join(parts)
        return text if self.status is Status.OK else f"{text} [{self.status.name.lower()}: {self.reason}]"

    def explain(self) -> str:
        """The whole chain in words: value, rule, evidence, checks, cost and sources."""
        lines = [f"{self.knob}: {self}", f"status: {self.status.name}: {self.reason or self.status.value}"]
        lines += [f"rule: {self.rule}", "evidence:"]
        for name, item in self.evidence.items():
            shown = _shown(item) if isinstance(item, float) else str(item)
            lines.append(f"  {name}: {shown}")
        lines += [f"check: {check}" for check in self.checks]
        coverage = "not calibrated yet" if self.level is None else f"{100 * self.level:.4g}%"
        lines += [f"coverage of the range: {coverage}", f"cost: {self.cost:.0f} gradient-equivalents"]
        lines += [f"source: {source}" for source in self.sources]
        return "\n".join(lines)

    def require(self) -> Recommendation:
        """Return self when the status is OK; raise the matching error otherwise (what ``strict=True`` does).

        Raises:
            RefusedError: No value was established.
            NotConvergedError: There is a value, but its status is not OK; the error carries this object as ``partial``.
        """
        if self.status is Status.OK and self.value is not None:
            return self
        error = RefusedError if self.value is None else NotConvergedError
        raise error(f"{self.knob}: {self.status.name}: {self.reason or self.status.value}", partial=self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        evidence = {k: v.to_dict() if isinstance(v, Estimate) else v for k, v in self.evidence.items()}
        return {
            "knob": self.knob,
            "value": _finite_or_none(self.value),
            "low": _finite_or_none(self.low),
            "high": _finite_or_none(self.high),
            "level": _finite_or_none(self.level),
            "status": self.status.name,
            "reason": self.reason,
            "rule": self.rule,
            "sources": list(self.sources),
            "evidence": {k: _finite_or_none(v) if isinstance(v, float) else v for k, v in evidence.items()},
            "checks": list(self.checks),
            "cost": _finite_or_none(self.cost),
            "max_stable": None if self.max_stable is None else self.max_stable.to_dict(),
            "warmup_steps": self.warmup_steps,
            "series": {k: [_finite_or_none(x) for x in v] for k, v in self.series.items()},
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the recommendation with its evidence (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_recommendation

        return plot_recommendation(self, ax=ax)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"
