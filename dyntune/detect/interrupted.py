"""Gradients that are exactly zero now and then: :class:`Interrupted`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dyntune.detect.course import Course, Moment
from dyntune.detect.readings import Reading
from dyntune.detect.tensors import OnLooks, named
from dyntune.monitor.alerts import Alert, Cause

__all__ = ["Interrupted"]

GRADIENT = "grad/log_rms/"
USUAL = 3  # looks with numbers, before one without is strange
MANY = 2  # tensors together
SPARSE = 0.25  # silent units of a layer: with more of them a small batch may silence all


class Interrupted(OnLooks):
    """Several tensors whose gradients are exactly zero at one step, though they had numbers at three looks before.

    That is what is left of NaN where a loop replaces what is not finite by zero, and of a branch that is left out. A
    layer that dies stays silent: it is told from this by numbers that come back at the next look.
    """

    looks = 1

    def __init__(self, course: Course | None = None) -> None:
        super().__init__(course)
        self._counts: dict[str, int] = {}
        self._waiting: dict[str, float] = {}
        self._zero: dict[str, float] = {}  # at the latest look
        self._dead = 0.0  # largest share of silent units

    def at_fault(self, reading: Reading, _moment: Moment) -> Mapping[str, float] | None:
        """See :class:`~dyntune.detect.tensors.OnLooks`."""
        dead = reading.kinds.get("units/dead/")
        if dead:
            self._dead = max(dead.values())
        logs = reading.kinds.get(GRADIENT)
        if not logs:
            return None
        back = {name: x for name, x in self._waiting.items() if math.isfinite(logs.get(name, math.nan))}
        zero = {name: x for name, x in logs.items() if x == -math.inf and self._counts.get(name, 0) >= USUAL}
        zero = {name: x for name, x in zero.items() if name not in self._zero}  # twice in a row is no interruption
        self._zero = zero
        self._waiting = zero if len(zero) >= MANY else {}
        for name, x in logs.items():
            self._counts[name] = self._counts.get(name, 0) + 1 if math.isfinite(x) else 0
        for name in zero:
            self._counts[name] = USUAL
        return back if len(back) >= MANY and self._dead < SPARSE else {}

    def alert(self, step: int, found: Mapping[str, float], _moment: Moment) -> Alert:
        """See :class:`~dyntune.detect.tensors.OnLooks`."""
        return Alert(
            kind="interrupted",
            severity="critical",
            step=step,
            text=f"the gradients of {named(found)} were exactly zero at one step, and not before or after.",
            advice="Look for nan_to_num and the like, which hide what is not finite, and where that comes from.",
            evidence={f"{GRADIENT}{name}": value for name, value in found.items()},
            causes=(Cause.NON_FINITE, Cause.DISCONNECTED),
            where=tuple(found),
        )
