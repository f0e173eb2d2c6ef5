"""Long series as few points that hide nothing: the middle of every bin, and its lowest and highest value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dyntune.monitor.rows import Array

__all__ = ["BINS", "Envelope", "envelope"]

# A chart is some 900 pixels wide: two to three for a bin, and a page with ten of them stays below a megabyte.
BINS = 360


@dataclass(frozen=True, kw_only=True, eq=False)
class Envelope:
    """A series as it is drawn.

    Args:
        steps: Shape (n,), ascending: the middle of each bin's steps.
        middle: Median of each bin's finite values, shape (n,); NaN where there is none.
        low: Lowest of them, or the lowest lower end of their intervals; the middle where there is none.
        high: Likewise.
        missing: Steps with a value that is none, or is not finite, shape (m,); one of each bin.
        binned: Whether a point stands for several values.
    """

    steps: Array
    middle: Array
    low: Array
    high: Array
    missing: Array
    binned: bool


def envelope(
    steps: NDArray[np.int64], values: Array, low: Array | None = None, high: Array | None = None, *, bins: int = BINS
) -> Envelope:
    """Reduce a series to at most `bins` points by equal spans of steps; twice as many are left as they are.

    Args:
        steps: Shape (n,), in any order.
        values: Shape (n,).
        low: Lower ends of the values' intervals, shape (n,); NaN where there is none.
        high: Upper ends.
        bins: How many.

    Returns:
        What to draw. No finite value lies outside low .. high of its bin.

    Example:
        >>> import numpy as np
        >>> values = np.zeros(10_000)
        >>> values[4_321] = 9.0  # one spike
        >>> found = envelope(np.arange(10_000), values, bins=100)
        >>> found.steps.size, float(found.high.max()), float(found.middle.max())
        (100, 9.0, 0.0)
    """
    order = np.argsort(steps, kind="stable")
    at, middle = steps[order].astype(np.float64), values[order].astype(np.float64)
    finite = np.isfinite(middle)
    low, high = (_ends(middle, finite, end if end is None else end[order]) for end in (low, high))
    if at.size <= 2 * bins:
        known = np.where(finite, middle, np.nan)
        return Envelope(steps=at, middle=known, low=low, high=high, missing=at[~finite], binned=False)
    edges = np.linspace(at[0], at[-1], bins + 1)
    cuts = np.unique(np.concatenate([np.searchsorted(at, edges[:-1]), [at.size]]))
    spans = list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))
    return Envelope(
        steps=np.array([(at[a] + at[b - 1]) / 2 for a, b in spans]),
        middle=np.array([_reduced(np.median, middle[a:b], finite[a:b]) for a, b in spans]),
        low=np.array([_reduced(np.min, low[a:b], finite[a:b]) for a, b in spans]),
        high=np.array([_reduced(np.max, high[a:b], finite[a:b]) for a, b in spans]),
        missing=np.array([at[a:b][~finite[a:b]][0] for a, b in spans if not finite[a:b].all()]),
        binned=True,
    )


def _ends(values: Array, finite: NDArray[np.bool_], ends: Array | None) -> Array:
    """Ends of intervals, as far as they are finite; the value itself elsewhere."""
    known = np.where(finite, values, np.nan)
    if ends is None:
        return known
    return np.where(np.isfinite(ends) & finite, ends, known)


def _reduced(how: object, values: Array, finite: NDArray[np.bool_]) -> float:
    return float(how(values[finite])) if finite.any() else float("nan")  # type: ignore[operator]
