"""The most careful of candidates that cannot be told from the best: the rule of one standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dyntune.errors import InvalidArgumentError

__all__ = ["CarefulChoice", "careful_choice"]


@dataclass(frozen=True, kw_only=True)
class CarefulChoice:
    """Which candidate to take.

    Args:
        chosen: The smallest candidate that is not worse than the best by more than a standard error.
        best: Candidate with the highest mean.
        tied: All that are not, in order.
        error: Standard error of the paired difference from the best, by candidate; 0 for the best itself.
        mean: By candidate.
    """

    chosen: float
    best: float
    tied: tuple[float, ...]
    error: Mapping[float, float]
    mean: Mapping[float, float]


def careful_choice(scores: Mapping[float, Sequence[float]]) -> CarefulChoice:
    """The smallest candidate within one standard error of the best, by scores that are paired over seeds.

    Args:
        scores: Candidate -> one score for each seed, in the same order for all; higher is better. A score that is not
            finite rules its candidate out.

    Returns:
        The choice with what it rests on.

    Raises:
        InvalidArgumentError: Nothing finite to choose from, or different numbers of seeds.

    Source:
        Breiman, Friedman, Olshen, Stone (1984), Classification and Regression Trees, section 3.4.3; here the error is
        that of the paired difference, which the seeds' common luck does not widen. With one seed there is none: the
        best is taken.

    Example:
        >>> careful_choice({0.1: [1.0, 2.0, 3.0], 0.3: [1.2, 2.0, 3.1], 1.0: [0.0, 0.5, 0.2]}).chosen
        0.3
        >>> careful_choice({0.1: [1.0, 2.0, 3.2], 0.3: [1.2, 2.0, 3.1]}).chosen
        0.1
    """
    counts = {len(s) for s in scores.values()}
    finite = {c: np.asarray(s, dtype=float) for c, s in scores.items() if len(s) and np.isfinite(s).all()}
    if len(counts) != 1 or not finite:
        raise InvalidArgumentError(
            f"{len(scores)} candidates with {sorted(counts)} seeds, {len(finite)} of them finite throughout: a choice "
            "takes one finite score for each seed of a candidate at least. Lower the candidates, or train for longer."
        )
    mean = {c: float(s.mean()) for c, s in finite.items()}
    best = max(sorted(mean), key=lambda c: mean[c])
    error = {c: _error(finite[best] - s) for c, s in finite.items()}
    tied = tuple(c for c in sorted(mean) if mean[best] - mean[c] <= error[c])
    return CarefulChoice(chosen=tied[0], best=best, tied=tied, error=error, mean=mean)


def _error(differences: np.ndarray) -> float:
    return float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
