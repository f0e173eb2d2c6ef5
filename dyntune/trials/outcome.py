"""What one trial came to: a result, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Key", "Outcome", "TrialFunction", "tried"]

# A point, such as a learning rate, and a seed.
Key: TypeAlias = tuple[float, int]
# (point, seed) -> a mapping of JSON types. Its entry "loss", where there is one, is what Optuna's own tools show.
TrialFunction: TypeAlias = Callable[[float, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What one trial came to.

    Args:
        result: What the function returned, as JSON types; None for a failure.
        reason: Why it failed; empty when it did not.
        lost: Whether it failed because its process died, which says nothing about the trial itself.
    """

    result: Mapping[str, Any] | None = None
    reason: str = ""
    lost: bool = False


def tried(function: TrialFunction, key: Key) -> Outcome:
    """Run one trial; what it raises is its failure.

    The result goes through JSON in every process, so that it does not depend on where it was made or read from.
    """
    try:
        return Outcome(json.loads(json.dumps(dict(function(*key)))))
    except Exception as error:
        return Outcome(reason=f"{type(error).__name__}: {error}")
