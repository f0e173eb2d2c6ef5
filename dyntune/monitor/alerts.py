"""What is wrong with training, and who looks for it: :class:`Alert`, :class:`Cause` and :class:`Detector`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from dyntune.monitor.rows import Rows

__all__ = ["Alert", "Cause", "Detector", "default_detectors"]


class Cause(StrEnum):
    """What would have to be changed; the fixed vocabulary of alerts, and of the benchmark that judges them."""

    LR_TOO_HIGH = "lr too high"
    LR_TOO_LOW = "lr too low"
    WARMUP_MISSING = "warm-up missing"
    NOISE_PLATEAU = "plateau from noise"
    GROUP_LR = "wrong lr of a group"
    GROUP_WEIGHT_DECAY = "wrong weight decay of a group"
    BETA2_TOO_SMALL = "beta2 too small"
    STALE_SECOND_MOMENT = "stale second moment"
    EPS_TOO_LARGE = "adam eps too large"
    CLIP_TOO_LOW = "clipping too low"
    VANISHING = "vanishing gradients"
    EXPLODING = "exploding gradients"
    DEAD_UNITS = "dead units"
    ATTENTION_LOGITS = "attention logits grow"
    OUTPUT_LOGITS = "output logits drift"
    NON_FINITE = "not finite"
    FROZEN = "frozen parameters"
    DISCONNECTED = "disconnected parameters"
    BAD_BATCH = "bad batches"
    DATA_ORDER = "data order"
    WRONG_LABELS = "labels do not belong to inputs"
    ACCUMULATED_GRADIENTS = "gradients not cleared"
    WRONG_LOSS = "wrong loss"
    LOSS_SCALE = "wrong scale of the loss"


@dataclass(frozen=True, kw_only=True)
class Alert:
    """Something is wrong with training.

    Args:
        kind: What was seen, such as ``"non-finite"``, ``"diverging"`` or ``"loss-spike"``: a symptom.
        severity: ``"critical"``, or ``"warning"``.
        step: Where it was seen.
        text: What.
        advice: What to do.
        evidence: The numbers behind it, by column.
        causes: Mechanisms that fit, the likeliest first; none where nothing but the symptom was seen.
        where: Parameters or layers at fault; none for the whole model.
        since: The first step that shows it; None where that is `step`.
        recommender: What measures a better value, such as ``"dyntune.suggest_lr"``; empty where nothing does.

    Example:
        >>> alert = Alert(kind="stuck", severity="warning", step=9, text="no.", advice="", causes=(Cause.LR_TOO_LOW,))
        >>> alert.cause
        <Cause.LR_TOO_LOW: 'lr too low'>
    """

    kind: str
    severity: Literal["critical", "warning"]
    step: int
    text: str
    advice: str
    evidence: Mapping[str, float | str | None] = field(default_factory=dict)
    causes: tuple[Cause, ...] = ()
    where: tuple[str, ...] = ()
    since: int | None = None
    recommender: str = ""

    @property
    def cause(self) -> Cause | None:
        """The likeliest one."""
        return self.causes[0] if self.causes else None

    def __str__(self) -> str:
        return f"step {self.step}, {self.severity}: {self.text} {self.advice}"


class Detector(Protocol):
    """Looks at everything that is recorded, in the order in which it is recorded: some ten steps at a time.

    A recorded run can be looked at in the same way, ``detector.update(run.rows)``. An exception from a detector is one
    of the monitor's: recorded, and after three in a row detectors are off.
    """

    def update(self, rows: Rows) -> Iterable[Alert]:
        """Rows that are new: a sequence of :class:`~dyntune.monitor.rows.Row`, and columns by ``rows.column(name)``."""


def default_detectors() -> tuple[Detector, ...]:
    """Those of ``detectors="default"``; see :func:`dyntune.detect.default_detectors`."""
    from dyntune.detect import default_detectors as found  # detectors stand above the records that they look at

    return found()
