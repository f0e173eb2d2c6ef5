"""Detectors of attention and output logits, and of a second moment that lags behind the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dyntune.detect.course import Course, Moment
from dyntune.detect.readings import Reading
from dyntune.detect.tensors import OnLooks, named
from dyntune.monitor.alerts import Alert, Cause

__all__ = ["AttentionLogits", "OutputLogits", "Staleness"]

ATTENTION, OUTPUT, STALE = "attention/max_logit", "logits/max_abs", "adam/staleness/"


class AttentionLogits(OnLooks):
    """The largest attention logit is above 100 and has grown threefold.

    The limit is that of QK-Clip (Kimi K2; ``qk_clip_threshold`` of Megatron). Logits that are large from the start are
    no alarm by themselves.
    """

    looks = 1
    LIMIT, GREW = 100.0, 3.0
    EARLY = 256  # steps, in which weights of queries and keys have not drifted: steps were too large

    def at_fault(self, reading: Reading, moment: Moment) -> Mapping[str, float] | None:
        """See :class:`~dyntune.detect.tensors.OnLooks`."""
        value = reading.single.get(ATTENTION)
        if value is None:
            return None
        first = moment.known.first[ATTENTION].single[ATTENTION]
        return {ATTENTION: value} if value > max(self.LIMIT, self.GREW * first) else {}

    def alert(self, step: int, found: Mapping[str, float], moment: Moment) -> Alert:
        """See :class:`~dyntune.detect.tensors.OnLooks`."""
        value, first = found[ATTENTION], moment.known.first[ATTENTION].single[ATTENTION]
        return Alert(
            kind="attention-logits",
            severity="critical",
            step=step,
            text=f"the largest attention logit is {value:.3g}, {first:.3g} at first: heads look at one key only.",
            advice="Normalise queries and keys (QK-norm), clip them, or lower the learning rate.",
            evidence={ATTENTION: value, "first": first},
            causes=(Cause.LR_TOO_HIGH, Cause.ATTENTION_LOGITS)
            if step < self.EARLY
            else (Cause.ATTENTION_LOGITS, Cause.LR_TOO_HIGH),
            recommender="dyntune.suggest_heads",
        )


class OutputLogits(OnLooks):
    """The largest output logit is above 100 at the first look, or above 100 and three times those before.

    A classifier that is sure of everything needs 20 or 30 nats: beyond 100 the softmax has underflowed in float32. In
    78 healthy runs of the benchmark's tune half the first look (step 49) found 40 at most. Those that came to 100 and
    more took thousands of steps for it, and had not tripled in the 256 steps before.
    """

    looks = 1
    LIMIT, GREW = 100.0, 3.0
    EARLY, BACK = 128, 256  # steps

    def __init__(self, course: Course | None = None) -> None:
        super().__init__(course)
        self._past: list[tuple[int, float]] = []

    def at_fault(self, reading: Reading, _moment: Moment) -> Mapping[str, float] | None:
        """See :class:`~dyntune.detect.tensors.OnLooks`."""
        value = reading.single.get(OUTPUT)
        if value is None:
            return None
        before = [x for step, x in self._past if step < reading.step - self.BACK] or [x for _, x in self._past[:1]]
        first = not self._past and reading.step < self.EARLY
        self._past.append((reading.step, value))
        grown = bool(before) and value > self.GREW * max(before)
        return {OUTPUT: value} if value > self.LIMIT and (first or grown) else {}

    def alert(self, step: int, found: Mapping[str, float], moment: Moment) -> Alert:
        """See :class:`~dyntune.detect.tensors.OnLooks`."""
        value, first = found[OUTPUT], moment.known.first[OUTPUT].single[OUTPUT]
        early = len(self._past) == 1
        return Alert(
            kind="output-logits",
            severity="critical",
            step=step,
            text=f"the largest output logit is {value:.3g}"
            + (", from the start: weights or inputs are far too large." if early else f", {first:.3g} at first."),
            advice="Look at the scale of initial weights and of inputs."
            if early
            else "Add a z-loss (1e-4 of log Z squared; PaLM) or weight decay on the output layer.",
            evidence={OUTPUT: value, "first": first},
            causes=(Cause.EXPLODING, Cause.LR_TOO_HIGH) if early else (Cause.OUTPUT_LOGITS, Cause.LR_TOO_HIGH),
        )


class Staleness(OnLooks):
    """A tensor's gradient is 2.3 times what its second moment expects, in two looks in a row.

    Source: the limit is that of Wortsman et al. (2023), arXiv:2304.13013, section 3.4, where spikes of the loss follow
    1 to 8 steps later. In a single look noise passes it once in some hundred to a thousand steps, hence two.
    """

    LIMIT = 2.3

    def at_fault(self, reading: Reading, _moment: Moment) -> Mapping[str, float] | None:
        """See :class:`~dyntune.detect.tensors.OnLooks`."""
        ratios = reading.kinds.get(STALE)
        return None if ratios is None else {n: x for n, x in ratios.items() if math.isfinite(x) and x > self.LIMIT}

    def alert(self, step: int, found: Mapping[str, float], _moment: Moment) -> Alert:
        """See :class:`~dyntune.detect.tensors.OnLooks`."""
        worst = max(found.values())
        return Alert(
            kind="stale-second-moment",
            severity="warning",
            step=step,
            text=f"the gradient of {named(found)} is up to {worst:.3g} times what its second moment expects.",
            advice="Lower beta2, or clip the update by this ratio (StableAdamW).",
            evidence={f"{STALE}{name}": x for name, x in found.items()},
            causes=(Cause.STALE_SECOND_MOMENT, Cause.EXPLODING),
            where=tuple(found),
            recommender="dyntune.suggest_beta2",
        )
