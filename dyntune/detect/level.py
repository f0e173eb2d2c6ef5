"""Where the loss is, against where it began and how far it had come: :class:`LossLevel`."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

import numpy as np

from dyntune.detect.course import Course, Settings
from dyntune.detect.readings import Known
from dyntune.detect.steps import BLOCK, median
from dyntune.detect.suspects import Onset, Past, Signs, Suspicion, suspects_of_no_progress, suspects_of_rise
from dyntune.detect.watch import START, Seen
from dyntune.monitor.alerts import Alert
from dyntune.monitor.rows import Array, Rows

__all__ = ["LossLevel"]

BLOCKS = 4  # in a row, all of them: 128 steps
# Share of the progress that is lost. In 63 healthy runs of the benchmark's tune half (8,000 steps each, among them
# curriculum switches, restarts and batches of one) it was 0.12 at most, but for two: 0.37 after a curriculum switch,
# and 0.9 in a ramp that began with batches so small that training broke down for some hundred steps.
LOST, LOST_MUCH = 0.2, 0.25
OVER = 0.2  # of the start's own size, above the start; in the same runs no such 128 steps were above it
FAR_OVER = 0.5  # likewise, of a single block,
LOWER = 0.125  # of which all but so many are above the start by OVER: where losses scatter around nothing they are not
RECOVERS = 0.75  # of the highest of the latest blocks, above the best: below it the loss is on its way back
NOISE = 8.0  # standard deviations of a block's median that a rise has to have at least
NOISE_OVER = 4.0  # and above the start, where nothing healthy is
BACK = 0.1  # share of the progress below which it has recovered
FLAT = 16  # blocks without progress: 512 steps
PROGRESS = 0.05  # of the start's size; of those past their warm-up the slowest had come down by 0.2 after 512 steps
PAST = 64  # blocks that are remembered for where a rise began
NOISY = 0.1  # scatter (MAD) of losses, by their median, above which a single one is no start
Kind = Literal["lost", "above", "stuck"]


class LossLevel:
    """The loss has come back up, has outgrown its start, or has not moved from it.

    Compares medians of 32 steps. *Lost progress*: four in a row lie more than a fifth (warning) or a quarter
    (critical, unless the loss is already on its way down again) of the way back from the best level to the start.
    *Above the start*: four in a row lie above 1.2 times the start, or one jumped from below the start
    to 1.5 times it, with nearly all of its losses above 1.2 times. *Stuck*: after 512 steps whose learning rate does
    not rise any more the loss is within 5% of the start and falls no further; critical together with a mechanism that
    explains it, else a warning. Each is said once until the loss has
    recovered. What explains it is looked for among the learning rate, the gradient norm and the latest look at single
    tensors.

    Args:
        course: Shared with other detectors.
    """

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._known, self._settings = Known(), Settings()
        self._first: list[float] = []
        self._first_level = math.nan
        self._losses: Array = np.empty(0)  # of the latest block
        self._past: deque[Past] = deque(maxlen=PAST)
        self._latest: deque[float] = deque(maxlen=BLOCKS)  # levels
        self._count = 0  # blocks
        self._best = math.inf
        self._settled = 0  # blocks since the learning rate last rose
        self._lr = 0.0  # the highest so far
        self._said: dict[Kind, str] = {}

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        for moment in self._course.take(rows):
            self._known, self._settings = moment.known, moment.settings
            yield from self._block(moment.seen)

    def _block(self, seen: Seen) -> Iterable[Alert]:
        losses = seen.block.losses
        if len(self._first) < START:
            self._first += losses[: START - len(self._first)].tolist()
        if losses.size < len(seen.block.loss) // 2:
            return
        self._count += 1
        self._note_lr(seen.block.highest_rate)
        self._losses = losses
        self._past.append(_summary(seen))
        if math.isnan(self._first_level):
            self._first_level = self._past[-1].level
        self._latest.append(self._past[-1].level)
        if len(self._latest) == BLOCKS:
            self._best = min(self._best, sorted(self._latest)[1])
        if len(self._past) >= 2 * BLOCKS:
            yield from self._judge(int(seen.block.steps[-1]))

    def _note_lr(self, high: float) -> None:
        self._settled += 1
        if high > 1.01 * self._lr:
            self._lr, self._settled = high, 0

    def _judge(self, step: int) -> Iterable[Alert]:
        low, start = min(self._latest), self._start
        progress = start - self._best
        near = low < min(self._best + LOST * max(progress, 0.0), start - PROGRESS * abs(start))
        if near and not self._said and self._latest[-1] < start:
            return  # as good as ever: nearly always
        past = list(self._past)
        noise = _noise([block.level for block in past[: -BLOCKS + 1]])
        kind: Kind | None = None
        severity: Literal["critical", "warning"] = "warning"
        blocks = BLOCKS
        share = (low - self._best) / progress if progress > max(NOISE * noise, PROGRESS * abs(start)) else math.nan
        if low - start > max(NOISE_OVER * noise, OVER * abs(start)):
            kind, severity = "above", "critical"
        elif share > LOST and low - self._best > NOISE * noise:
            kind, severity = "lost", "critical" if share > LOST_MUCH and not self._recovers() else "warning"
        elif self._is_stuck(low, start):
            kind = "stuck"
        elif self._is_far_above(start, noise):
            kind, severity, low, blocks = "above", "critical", self._latest[-1], 1
        if kind is None:
            if (math.isnan(share) and low <= start) or share < BACK:
                self._said.clear()
        elif self._is_news(kind, severity):
            lasting = f"{low:.4g} or more for {blocks * BLOCK} steps" if blocks > 1 else f"{low:.4g} over {BLOCK} steps"
            yield self._alert(kind, severity, step, lasting, low=low, start=start, share=share)

    def _is_news(self, kind: Kind, severity: str) -> bool:
        """A critical one is said after a warning, and once; what is above the start had lost its progress before."""
        if "critical" in self._said.values() or self._said.get(kind) == severity:
            return False
        return severity == "critical" or not self._said

    def _is_far_above(self, start: float, noise: float) -> bool:
        """One block is enough, where it jumped from below the start to where no healthy one is."""
        if self._latest[-2] > start:
            return False
        high = self._latest[-1] - start > max(NOISE_OVER * noise, FAR_OVER * abs(start))
        return high and float(np.quantile(self._losses, LOWER)) - start > OVER * abs(start)

    def _recovers(self) -> bool:
        """Whether the latest block has come down from the highest: new data is being learnt, as after a switch."""
        return self._latest[-1] - self._best < RECOVERS * (max(self._latest) - self._best)

    @property
    def _start(self) -> float:
        """The loss before the first step, or, where single losses scatter, the median of the first block.

        Scatter is that of the latest block: the first one may hold steps that threw the loss up.
        """
        level = self._past[-1].level
        apart = np.abs(self._losses - level)
        scatter = median(apart)
        return (
            self._first_level if scatter > NOISY * abs(level) else min(self._first[0], statistics.median(self._first))
        )

    def _is_stuck(self, low: float, start: float) -> bool:
        if self._count < FLAT or self._settled < FLAT - 1 or self._best < start - 2.0 * PROGRESS * abs(start):
            return False
        levels = [block.level for block in list(self._past)[-FLAT:]]
        early, late = statistics.median(levels[: FLAT // 2]), statistics.median(levels[FLAT // 2 :])
        return low > start - PROGRESS * abs(start) and early - late < PROGRESS * abs(start)

    def _alert(
        self,
        kind: Kind,
        severity: Literal["critical", "warning"],
        step: int,
        lasting: str,
        *,
        low: float,
        start: float,
        share: float,
    ) -> Alert:
        past = list(self._past)
        signs = Signs(self._known, start=start, highest_lr=self._lr, groups=self._settings.furthest_rate)
        if kind == "stuck":
            found = suspects_of_no_progress(signs, past)
            since: int | None = None
            severity = "critical" if found.proven else "warning"
            said = f"the loss has not moved from its start, {start:.4g}, in {FLAT * BLOCK} steps and more."
        else:
            onset = self._onset(start, past)
            found = suspects_of_rise(signs, past, onset)
            since = past[onset.at].step
            back = "" if math.isnan(share) else f", {100 * share:.0f}% of the way back to where it began"
            said = f"the loss has been {lasting}: best {self._best:.4g}{back}."
            if kind == "above":
                said = f"the loss has outgrown its start, {start:.4g}: {lasting}."
        self._said[kind] = severity
        evidence = {"train/loss": low, "start": start, "best": self._best if math.isfinite(self._best) else None}
        return _told(found, kind, severity, step, since, said, evidence)

    def _onset(self, start: float, past: list[Past]) -> Onset:
        """The block where the rise began: the one after the last that was at the level of the best."""
        line = self._best + BACK * max(start - self._best, 0.0) if self._best < start else start
        below = [index for index, block in enumerate(past) if block.level <= line]
        at = min(below[-1] + 1, len(past) - 1) if below else 0
        return Onset(at=at, whole=not below)


def _summary(seen: Seen) -> Past:
    block = seen.block
    return Past(
        step=int(block.steps[0]),
        level=block.level,
        norm=block.length,
        lr=block.highest_rate,
        highest=float(block.losses.max()),
    )


def _noise(levels: list[float]) -> float:
    """Standard deviation of a block's median, by differences of neighbours, which a trend hardly changes."""
    steps = [abs(b - a) for a, b in pairwise(levels)]
    return 1.4826 * statistics.median(steps) / math.sqrt(2.0) if steps else 0.0


def _told(
    found: Suspicion,
    kind: str,
    severity: Literal["critical", "warning"],
    step: int,
    since: int | None,
    said: str,
    evidence: dict[str, float | None],
) -> Alert:
    return Alert(
        kind={"lost": "loss-rose", "above": "diverged", "stuck": "no-progress"}[kind],
        severity=severity,
        step=step,
        since=since,
        text=f"{said} {found.text}".strip(),
        advice=found.advice,
        evidence={**evidence, **found.evidence},
        causes=found.causes,
        where=found.where,
        recommender=found.recommender,
    )
