"""A gradient that has outgrown everything before: :class:`GradientGrowth`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from dyntune.detect.course import Course, Moment
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows

__all__ = ["GradientGrowth"]

# Times the highest median of 32 steps from before. In 78 healthy runs of the tune half it was 2.7 at most from the
# fifth block on, and 10.9 in one that left a plateau at the start.
GREW = 30.0
FIRST = 4  # blocks before anything is compared: signals grow while a network leaves its initial point
LASTING = 2  # blocks in a row
LAG = 4  # blocks that do not count as before yet
STALE = 2.3  # times what the second moment expects; see dyntune.detect.inside.Staleness
REMEMBERS = 0.999  # beta2 from which on a growing gradient is a danger by itself


class GradientGrowth:
    """The gradient has been 30 times longer than it ever was 128 steps earlier, for 64 steps.

    Compared are medians of 32 steps, from the ninth on. The likeliest cause is read from the attention logits, the
    output logits and the second moment.

    Args:
        course: Shared with other detectors.
    """

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._highest = 0.0
        self._latest: deque[float] = deque(maxlen=LAG + 1)
        self._blocks = self._above = self._since = 0
        self._said = False

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        for moment in self._course.take(rows):
            seen = moment.seen
            level = seen.block.length
            if math.isnan(level):
                continue
            self._blocks += 1
            self._latest.append(level)
            if self._blocks > FIRST + LAG and level > GREW * self._highest > 0.0:
                self._above += 1
                self._since = int(seen.block.steps[0]) if self._above == 1 else self._since
                if self._above >= LASTING and not self._said:
                    self._said = True
                    yield self._alert(moment, level)
            else:
                self._above = 0
                if len(self._latest) > LAG:  # what grows slowly is compared with what it was a while ago
                    self._highest = max(self._highest, self._latest[-1 - LAG])

    def _alert(self, moment: Moment, level: float) -> Alert:
        causes = [Cause.EXPLODING, Cause.LR_TOO_HIGH]
        text = f"the gradient is {level:.3g} long, {level / self._highest:.3g} times as long as ever before."
        beta2 = moment.settings.of("beta2")
        attention, logits = moment.known.single("attention/max_logit"), moment.known.single("logits/max_abs")
        stale = [x for x in moment.known.of("adam/staleness/").values() if math.isfinite(x)]
        if attention > 100.0:
            causes.insert(0, Cause.ATTENTION_LOGITS)
            text += f" The largest attention logit is {attention:.3g}."
        elif logits > 100.0:
            causes.insert(0, Cause.OUTPUT_LOGITS)
            text += f" The largest output logit is {logits:.3g}."
        elif beta2 >= REMEMBERS:
            causes.insert(0, Cause.STALE_SECOND_MOMENT)
            text += f" The second moment, with beta2 = {beta2:g}, remembers {1.0 / (1.0 - beta2):.0f} steps."
            if stale and max(stale) > STALE:
                text += f" It expects {max(stale):.3g} times less."
        return Alert(
            kind="gradient-growth",
            severity="critical",
            step=moment.step,
            since=self._since,
            text=text,
            advice="Go back to a checkpoint from before; look at what was changed there, and clip the gradient.",
            evidence={"grad/norm": level, "before": self._highest},
            causes=tuple(causes),
            recommender="dyntune.suggest_beta2" if causes[0] == Cause.STALE_SECOND_MOMENT else "dyntune.suggest_lr",
        )
