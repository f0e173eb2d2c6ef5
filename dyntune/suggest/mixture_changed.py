"""Proportions that change the objective on purpose: the record that both ways of choosing them return."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dyntune.errors import NotConvergedError, RefusedError
from dyntune.records import Estimate, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ChangedMixture"]


@dataclass(frozen=True, kw_only=True)
class ChangedMixture:
    """Weights of the sources in a new objective: rows are drawn in these shares *without* importance weights.

    Args:
        names: Of the sources.
        proportions: Shares of the new objective; None where none could be chosen.
        low: Lower end of each share's interval.
        high: Upper end.
        floors: Least share of each.
        present: What it is compared with.
        objective: ``"held-out"``: the largest fall of a held-out loss in one step. ``"mixing-law"``: the lowest loss
            that a fitted law predicts after training.
        change: What is expected of it: change of the held-out loss in a step relative to `present`, or the loss.
        gap: By how much the criterion may at most be better elsewhere: the solver's error.
        status: How far to trust it.
        reason: Why.
        checks: What was verified, in words.
        cost: Gradient-equivalents spent.
        sources: Papers and derivations.
    """

    names: tuple[str, ...]
    proportions: tuple[float, ...] | None
    low: tuple[float, ...]
    high: tuple[float, ...]
    floors: tuple[float, ...]
    present: tuple[float, ...]
    objective: Literal["held-out", "mixing-law"]
    change: Estimate
    gap: float
    status: Status
    reason: str
    checks: tuple[str, ...]
    cost: float
    sources: tuple[str, ...]

    def require(self) -> ChangedMixture:
        """Return self when the status is OK; raise the matching error otherwise.

        Raises:
            RefusedError: No proportions.
            NotConvergedError: There are some, but the status is not OK.
        """
        if self.status is Status.OK:
            return self
        error = RefusedError if self.proportions is None else NotConvergedError
        raise error(f"mixture: {self.status.name}: {self.reason}", partial=self)

    def __str__(self) -> str:
        if self.proportions is None:
            return f"mixture: refused. {self.reason}"
        shares = ", ".join(f"{name} {100 * p:.3g}%" for name, p in zip(self.names, self.proportions, strict=True))
        text = f"{shares} (objective changed: {self.objective})"
        return text if self.status is Status.OK else f"{text} [{self.status.name.lower()}: {self.reason}]"

    def explain(self) -> str:
        """Shares, what is expected, and sources, in words."""
        lines = [str(self), f"status: {self.status.name}: {self.reason or self.status.value}"]
        for i, name in enumerate(self.names):
            share = "none" if self.proportions is None else f"{self.proportions[i]:.4f}"
            lines.append(
                f"  {name}: share {share} ({self.low[i]:.4f} .. {self.high[i]:.4f}), compared with "
                f"{self.present[i]:.4f}, floor {self.floors[i]:.4g}"
            )
        lines += [
            "objective: changed on purpose; rows are not weighted by importance",
            f"expected: {self.change}; elsewhere better by {self.gap:.2g} at most",
            *(f"check: {check}" for check in self.checks),
            f"cost: {self.cost:.0f} gradient-equivalents",
        ]
        return "\n".join([*lines, *(f"source: {source}" for source in self.sources)])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw shares with their intervals (needs matplotlib, imported here only)."""
        from dyntune.plots import plot_mixture

        return plot_mixture(self, ax=ax)

    def to_dict(self) -> Mapping[str, Any]:
        """Plain JSON types; NaN and infinity become None."""
        arrays = {name: getattr(self, name) for name in ("low", "high", "floors", "present")}
        return {name: [x if math.isfinite(x) else None for x in each] for name, each in arrays.items()} | {
            "names": list(self.names),
            "proportions": None if self.proportions is None else list(self.proportions),
            "objective": self.objective,
            "change": self.change.to_dict(),
            "gap": self.gap if math.isfinite(self.gap) else None,
            "status": self.status.name,
            "reason": self.reason,
            "checks": list(self.checks),
            "cost": self.cost,
            "sources": list(self.sources),
        }

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"
