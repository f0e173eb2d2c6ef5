"""What the replays of an alarm mean, for a reader: :func:`explain`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dyntune.records import short_number
from dyntune.replay.changes import Drop
from dyntune.replay.investigating import Replays
from dyntune.replay.verdict import Verdict

__all__ = ["ADVICE", "Alarm", "Evidence", "Explanation", "explain"]


class Alarm(Protocol):
    """What is known of an alarm; :class:`dyntune.monitor.alerts.Alert` is one."""

    @property
    def step(self) -> int:
        """Where it was seen."""

    @property
    def text(self) -> str:
        """What."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """How a window came out with one change.

    Args:
        change: What was changed.
        rise: Of the loss over the window; infinite where it was not finite any more.
        averts: Whether that is health.
    """

    change: str
    rise: float
    averts: bool


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why an alarm came, as far as replays can tell.

    Args:
        verdict: In short.
        cause: What would have to be changed; None where nothing averts it.
        where: Parameters at fault; empty: all, or none in particular.
        causes: Every cause that a change speaks for, from the smallest change on.
        evidence: One row per replay; the first is the window unchanged.
        margin: Largest healthy rise of the loss.
        text: For a newcomer.
    """

    verdict: Verdict
    cause: str | None
    where: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    margin: float = math.nan
    text: str = ""

    def __str__(self) -> str:
        rows = [f"  {row.change}: loss {_signed(row.rise)}{', averted' if row.averts else ''}" for row in self.evidence]
        return "\n".join([self.text, *rows])

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON takes; null where a number is not finite."""
        return {
            "verdict": self.verdict.name.lower(),
            "cause": self.cause,
            "where": list(self.where),
            "causes": list(self.causes),
            "margin": _finite(self.margin),
            "evidence": [{"change": e.change, "rise": _finite(e.rise), "averts": e.averts} for e in self.evidence],
            "text": self.text,
        }


# What batches that stand out by themselves speak for: those that pass, and those that stay, which is not known yet.
DATA = (Drop.cause, "labels do not belong to inputs")

# What to do about a cause, by its words.
ADVICE: Mapping[str, str] = {
    "not finite": "Train in bfloat16 or full precision, or lower the initial loss scale.",
    "bad batches": "Look at those rows: a preprocessing step that was skipped, a damaged file, wrong labels.",
    "lr too high": "Go back to a checkpoint from before and lower the learning rate, or raise it more slowly.",
    "wrong weight decay of a group": "Lower the weight decay of that group.",
    "stale second moment": "Lower beta2, so that the optimizer notices sooner that gradients have grown.",
    "beta2 too small": "Raise beta2, so that single batches do not decide how long steps are.",
    "wrong lr of a group": "Lower the learning rate of that group.",
    "exploding gradients": "Clip the gradient norm, or look at the layer that is named.",
}


def explain(alarm: Alarm, replays: Replays) -> Explanation:
    """Say what the replays mean: the cause is the smallest change that averts the alarm.

    Args:
        alarm: What was noticed.
        replays: Of the window that ends after it; see :func:`dyntune.replay.investigating.investigate`.

    Returns:
        The cause in the detectors' words, with the evidence. No cause where nothing averts it, where the loss did not
        rise, or where the replay is not the training itself.
    """
    rows = [] if math.isnan(replays.rise) else [Evidence(change="nothing changed", rise=replays.rise, averts=False)]
    rows += [Evidence(change=c.name, rise=rise, averts=averts) for c, rise, averts in replays.tried]
    averting = replays.averting
    cause = averting[0].cause if averting else Drop.cause if replays.verdict is Verdict.BATCHES else None
    return Explanation(
        verdict=replays.verdict,
        cause=cause,
        where=averting[0].where if averting else (),
        causes=tuple(dict.fromkeys(change.cause for change in averting)) or (DATA if cause else ()),
        evidence=tuple(rows),
        margin=replays.margin,
        text=_text(alarm, replays),
    )


def _text(alarm: Alarm, replays: Replays) -> str:
    said = f"Step {alarm.step}: {alarm.text.rstrip('.')}."
    verdict, count = replays.verdict, replays.num_steps
    if verdict in (Verdict.NOT_REPRODUCED, Verdict.TOO_SHORT, Verdict.BATCHES):
        return f"{said} The last {count} steps were trained again on a copy: {verdict.value}. {replays.reason}"
    usual = f"a rise of up to {short_number(replays.margin)} is usual here"
    story = f"{said} The last {count} steps were trained again on a copy. Unchanged, the loss {_changed(replays.rise)}"
    if verdict is Verdict.NOTHING_TO_AVERT:
        return f"{story}; {usual}, so there was nothing to avert."
    if verdict is Verdict.NOTHING_AVERTS:
        tried = f"{len(replays.tried)} single changes"
        return f"{story}; {usual}. None of {tried} averts it: the cause lies before these steps, or is none of these."
    smallest = replays.averting[0]
    rise = next(rise for change, rise, _ in replays.tried if change is smallest)
    other = len(replays.averting) - 1
    more = f" {other} larger change{'s' if other > 1 else ''} would have done so, too." if other else ""
    return (
        f"{story}; {usual}. With {smallest.name} and all else the same, it {_changed(rise)}: the cause is "
        f"{smallest.cause}.{more} {ADVICE[smallest.cause]}"
    )


def _changed(rise: float) -> str:
    if math.isinf(rise):
        return "stopped being finite"
    return f"{'rose' if rise > 0 else 'fell'} by {short_number(abs(rise))}"


def _signed(rise: float) -> str:
    return "not finite" if math.isinf(rise) else f"{'+' if rise >= 0 else '-'}{short_number(abs(rise))}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
