"""Where a function of a positive step first rises above its start, from values that may be NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["first_rise"]


def first_rise(
    value: Callable[[float], float], *, guess: float, ratio: float = 2.0, most: int = 40
) -> tuple[float, float]:
    """Bracket ``(low, high)`` of a step at which ``value`` rises above ``value(0)``: the smallest, if there is but one.

    Of several crossings it is the first that doublings or halvings of the guess meet.

    Doubling or halving from `guess` until the value crosses its start, then bisection on a logarithmic axis. A value
    that is not finite counts as risen: a comparison with NaN is false, and a search that asks ``value > start`` would
    double for ever.

    Args:
        value: The function; ``value(0.0)`` is asked once.
        guess: Where the search begins, > 0.
        ratio: Stop when ``high / low`` is at most this, > 1; 2 needs no bisection.
        most: Doublings or halvings before giving up.

    Returns:
        ``low`` did not rise, ``high`` did. ``(0, step)`` when even the smallest step tried rose, ``(step, inf)`` when
        even the largest did not.

    Cost:
        Two evaluations and one per doubling from the guess; ``log2(log2(2) / log2(ratio))`` more for the bisection.

    Example:
        >>> low, high = first_rise(lambda s: (s - 1) ** 2, guess=0.1, ratio=1.01)
        >>> low < 2 <= high
        True
    """
    start = value(0.0)

    def risen(step: float) -> bool:
        found = value(step)
        return not math.isfinite(found) or found > start

    low, high = _enclose(risen, guess, most)
    if low == 0.0 or math.isinf(high):
        return low, high
    while high / low > ratio:
        middle = math.sqrt(low * high)
        if risen(middle):
            high = middle
        else:
            low = middle
    return low, high


def _enclose(risen: Callable[[float], bool], guess: float, most: int) -> tuple[float, float]:
    step = guess
    if risen(step):
        for _ in range(most):
            step /= 2
            if not risen(step):
                return step, 2 * step
        return 0.0, step
    for _ in range(most):
        step *= 2
        if risen(step):
            return step / 2, step
    return step, math.inf
