"""Parameters that take no part in training: :class:`Unwired`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dyntune.detect.course import WIRING, Course, Wired
from dyntune.detect.tensors import named
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows

__all__ = ["Unwired"]

FROZEN, UNREACHED, UNHELD = WIRING
LEADING = "grad/unreached/leading"
# Without a change for so long; the monitor has looked several times by then.
LASTING = 64
EARLY = 16  # steps by which what is so from the start was seen
# Share of all entries below which it may be a part that is not used on purpose, such as a pooler.
PART = 0.01


@dataclass
class _State:
    """What is known of one kind."""

    since: int
    count: float
    share: float
    names: tuple[str, ...]


class Unwired:
    """Parameters that the optimizer holds and no gradient reaches, or that have gradients and nobody updates.

    - *Unreached*: no gradient ever came to the first tensors of the model (a ``detach()`` on the way, critical), or to
      other ones (an unused head, a warning), or came and stopped (critical).
    - *Frozen*: ``requires_grad`` was switched off in mid-training; at the start it is what fine-tuning does, and no
      alarm.
    - *Unheld*: gradients are computed, and no optimizer has written to these parameters in 16 steps.

    Said once of each kind, after 64 steps in which several looks agreed, so that parts that take turns raise no alarm.

    False alarms: layers that are frozen on purpose while training goes on look like these, and are said to.

    Args:
        course: Shared with other detectors.
    """

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._found: dict[str, _State] = {}
        self._before: dict[str, tuple[str, ...]] = {}  # what was missing at the first look
        self._leading = 0.0
        self._said: set[str] = set()

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        for moment in self._course.take(rows):
            for wired in moment.wired:
                self._take(wired, moment.first.begun)
            for kind, state in self._found.items():
                if state.count and kind not in self._said and moment.step - state.since >= LASTING:
                    self._said.add(kind)
                    alert = self._alert(kind, state, moment.step)
                    if alert is not None:
                        yield alert

    def _take(self, wired: Wired, begun: int) -> None:
        for kind in WIRING:
            count = wired.values.get(kind)
            if count is None or not math.isfinite(count):
                continue
            names = tuple(wired.labels.get(kind, "").split("\n")) if count else ()
            told = wired.values.get(f"{kind}/since")
            since = wired.step if told is None or not math.isfinite(told) else int(told)
            if kind not in self._found and since - begun <= EARLY:
                self._before[kind] = names
            self._found[kind] = _State(since, count, wired.values.get(f"{kind}/share") or 0.0, names)
            self._said.discard(kind)
            self._leading = wired.values.get(LEADING, self._leading) or 0.0

    def _alert(self, kind: str, state: _State, step: int) -> Alert | None:
        new = tuple(name for name in state.names if name not in self._before.get(kind, ()))
        severity: Literal["critical", "warning"] = "critical" if state.share >= PART else "warning"
        evidence: dict[str, float | str | None] = {kind: state.count, f"{kind}/share": state.share}
        what = f"{state.share:.1%} of all parameters ({named(state.names)})"
        if kind == FROZEN:
            if not new:
                return None
            text = f"{what} were frozen in mid-training: requires_grad is off."
            advice = "If that is not meant, look for requires_grad_(False) in what ran at that step."
            causes = (Cause.FROZEN, Cause.DISCONNECTED)
        elif kind == UNHELD:
            text = f"{what} have gradients, and no optimizer writes to them."
            advice = "Give them to the optimizer, or switch requires_grad off, which saves their gradients."
            causes = (Cause.FROZEN, Cause.GROUP_LR)
        else:
            below = self._leading >= state.count > 0
            if new:
                text = f"no gradient reaches {what} any more."
            else:
                text = f"no gradient ever reached {what}."
                severity = severity if below else "warning"
            advice = "Look for detach(), .data, no_grad() or a conversion to NumPy between these layers and the loss."
            causes = (Cause.DISCONNECTED, Cause.FROZEN)
        return Alert(
            kind={FROZEN: "frozen", UNREACHED: "disconnected", UNHELD: "not-updated"}[kind],
            severity=severity,
            step=step,
            since=state.since,
            text=text,
            advice=advice,
            evidence=evidence,
            causes=causes,
            where=state.names,
        )
