"""Steps that are far too small or far too large for the weights that they change: :class:`Pace`."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from dyntune.detect.course import Course, Moment
from dyntune.detect.steps import Block
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows

__all__ = ["Pace"]

RATIO = "update/ratio/"
LOOKS = 3  # of single tensors; their median
# Of a tensor's length a step. The usual is 1e-3; healthy runs of the benchmark's tune half had 2e-3 to 2e-2 until the
# loss had come down by half.
SMALL, LARGE = 8e-4, 0.05
SMALL_CLIPPED = 1.5e-3  # where clipping makes every gradient of one length
LEAST = 4  # tensors: the length of a single one, at its optimum of zero, measures nothing
SETTLED = 192  # steps after the learning rate last rose
LATEST = 1024  # steps after which a small update may be that of a network that has learnt what there is
FAR = 0.45  # of the start, above which the loss still is
FIRST = 128  # steps in which updates may be large: weights that begin small change by much of their length
QUIET = 0.03  # gradient by loss; 39 healthy runs of the tune half begin at 0.094 or more
CONSTANT = 1e-3  # relative scatter of a gradient's length that is set by clipping, and not by batches
CONSTANT_BLOCKS = 4  # in a row
SILENT = 0.6  # of a layer's units, as in dyntune.detect.tensors.DeadUnits
FEW = 4  # lengths in a block, of which some are not taken
RISES = 1.01
BEFORE, SEEN = 3.0, 32  # times the limit, that no earlier look may have found, from so many steps on


class Pace:
    """The median update moves tensors by far less, or far more, of their length than training does.

    - *Too slow* (a warning: small batches and careful learning rates are like that, too): below 8e-4 a step in three
      looks, in the first thousand steps, with a learning rate that has stopped rising and a loss above 0.45 of its
      start. Where clipping cuts every gradient to one length and the optimizer is not of Adam's kind (which does not
      notice), below 1.5e-3.
    - *Too fast*: above 0.05 in three looks after the first 128 steps, with a loss above a tenth of its start.

    Args:
        course: Shared with other detectors.
    """

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._ratios: deque[float] = deque(maxlen=LOOKS)
        self._looks: deque[int] = deque(maxlen=LOOKS)  # their steps
        self._largest = 0.0  # of all ratios
        self._highest, self._since = 0.0, 0  # learning rate, and when it last rose
        self._constant = 0
        self._norm = math.nan
        self._said: set[str] = set()

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        for moment in self._course.take(rows):
            self._note(moment.seen.block)
            for reading in moment.new:
                found = [x for x in reading.kinds.get(RATIO, {}).values() if math.isfinite(x) and x > 0.0]
                if len(found) >= LEAST:
                    self._ratios.append(statistics.median(found))
                    self._looks.append(reading.step)
                    if reading.step - moment.first.begun >= SEEN:
                        self._largest = max(self._largest, self._ratios[-1])
            if len(self._ratios) == LOOKS:
                yield from self._judge(moment)

    def _note(self, block: Block) -> None:
        if block.highest_rate > RISES * self._highest:
            self._highest, self._since = block.highest_rate, int(block.steps[-1])
            self._ratios.clear()
        known = block.norms
        same = known.size >= FEW and known.max() - known.min() < CONSTANT * known.max()
        self._constant = self._constant + 1 if same else 0
        self._norm = float(known[-1]) if known.size else math.nan

    def _judge(self, moment: Moment) -> Iterable[Alert]:
        step, level, begun = moment.step, moment.first.share, moment.first.begun
        middle = statistics.median(self._ratios)
        clipped = self._constant >= CONSTANT_BLOCKS and not moment.settings.is_adam
        early = step - self._since >= SETTLED and step - begun < LATEST
        slow = level > FAR and self._is_slow(SMALL_CLIPPED if clipped else SMALL)
        if "slow" not in self._said and early and slow:
            self._said.add("slow")
            yield self._slow(moment, middle, clipped=clipped)
        if "fast" not in self._said and level > 0.1 and min(self._ratios) > LARGE and self._looks[0] - begun > FIRST:
            self._said.add("fast")
            yield Alert(
                kind="too-fast",
                severity="critical",
                step=step,
                text=f"a step changes the median tensor by {middle:.1%} of its length; 0.1% to 1% is usual.",
                advice="Lower the learning rate, and look at the scale of the loss.",
                evidence={"update/ratio_median": middle},
                causes=(Cause.LR_TOO_HIGH, Cause.LOSS_SCALE, Cause.WRONG_LOSS),
                recommender="dyntune.suggest_lr",
            )

    def _is_slow(self, limit: float) -> bool:
        """Now, and ever: a network that has died has small steps, too, and another trouble."""
        return statistics.median(self._ratios) < limit and self._largest < BEFORE * limit

    def _slow(self, moment: Moment, middle: float, *, clipped: bool) -> Alert:
        share = moment.first.share
        text = f"a step changes the median tensor by {middle:.1g} of its length, and the loss is at {share:.0%} of its "
        text += "start."
        hidden = [x for x in moment.known.of("adam/below_eps/").values() if math.isfinite(x)]
        causes = [Cause.LR_TOO_LOW, Cause.LOSS_SCALE, Cause.CLIP_TOO_LOW]
        advice = "Raise the learning rate."
        silent = {layer: share for layer, share in moment.known.of("units/dead/").items() if share > SILENT}
        if silent:
            causes.insert(0, Cause.DEAD_UNITS)
            text += f" {max(silent.values()):.0%} of the units of {next(iter(silent))} answer to no input."
            advice = "Look at initial weights and biases, or use an activation that leaks."
        elif hidden and statistics.median(hidden) > 0.5:
            causes.insert(0, Cause.EPS_TOO_LARGE)
            text += f" eps hides the second moment of {statistics.median(hidden):.0%} of the entries."
            advice = "Make Adam's eps smaller than the gradients: 1e-8 is the default."
        elif clipped:
            causes = [Cause.CLIP_TOO_LOW, Cause.LR_TOO_LOW, Cause.LOSS_SCALE]
            text += f" Every gradient is {self._norm:.3g} long: clipping makes it that."
            advice = "Raise the largest norm that clipping allows."
        elif self._norm < QUIET * moment.first.level:
            causes.insert(0, Cause.WRONG_LOSS)
            text += f" The gradient is {self._norm / moment.first.level:.1g} of the loss."
            advice = "Look at what the loss is given: probabilities where it takes logits?"
        elif moment.first.fell and moment.first.threw:
            causes.insert(0, Cause.WARMUP_MISSING)
            text += " The first steps, at a much higher learning rate, threw it up."
            advice = "Begin again with a warm-up."
        return Alert(
            kind="too-slow",
            severity="warning",
            step=moment.step,
            text=text,
            advice=advice,
            evidence={"update/ratio_median": middle, "train/loss": moment.first.level},
            causes=tuple(causes),
            recommender="dyntune.suggest_lr",
        )
