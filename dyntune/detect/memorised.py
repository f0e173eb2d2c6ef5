"""A loss that falls only by meeting the same rows again: :class:`Memorised`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable

import numpy as np

from dyntune.detect.course import Course
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Array, Rows

__all__ = ["Memorised", "staircase"]

PASS = "train/pass"
LEAST = 4  # whole blocks of 32 steps in a pass: enough to see whether the first one learns anything
PASSES = 3  # that have ended, before a staircase is told from chance
NOTHING = 0.05  # of its own level: what the first pass may learn (how often each label comes)
FELL = 0.2  # of the first pass's level, that later passes have to have brought
AT_BOUNDARIES = 0.6  # of the fall after the first pass that happens from one pass to the next


class Memorised:
    """The first pass over the data learns nothing, and later ones learn at the moments when rows come again.

    With labels that do not belong to their inputs nothing can be learnt from rows that were not met before: the loss
    stays where it began for the whole first pass, however long, and later falls by steps from pass to pass, since what
    was memorised of a row is of no use until it comes again. Real learning goes on within passes.

    Needs to know passes: iterate over ``monitor.watch(loader)``. Not on by default: its false-alarm rate is not
    established.

    Args:
        course: Shared with other detectors.
    """

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._starts: list[int] = []  # first steps of passes
        self._ends: list[int] = []  # last steps of blocks
        self._begins: list[int] = []
        self._levels: list[float] = []
        self._judged = 0  # passes
        self._said = False

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        if PASS in rows.names:
            self._starts += [int(rows.steps[at]) for at, _ in rows.numbers(PASS)]
        for moment in self._course.take(rows):
            block = moment.seen.block
            if self._said or not self._starts:
                continue
            self._begins.append(int(block.steps[0]))
            self._ends.append(int(block.steps[-1]))
            self._levels.append(block.level)
            begun = bisect_right(self._starts, self._begins[-1])
            if begun > PASSES and begun > self._judged:  # a block that lies in a new pass
                self._judged = begun
                yield from self._judge(moment.step, self._starts[:begun])

    def _judge(self, step: int, starts: list[int]) -> Iterable[Alert]:
        found = staircase(np.array(starts), np.array(self._begins), np.array(self._ends), np.array(self._levels))
        if found is None:
            return
        first, now, share = found
        self._said = True
        yield Alert(
            kind="memorised",
            severity="warning",
            step=step,
            since=starts[1],
            text=f"the first pass over the data learnt nothing (loss {first:.4g} all along), and {share:.0%} of the "
            f"fall to {now:.4g} since came from one pass to the next: rows are memorised, nothing is learnt of others.",
            advice="Look at inputs and targets of a batch side by side: do they belong together? Look at the loss on "
            "rows that are held out.",
            evidence={"first pass": first, "train/loss": now, "share at boundaries": share},
            causes=(Cause.WRONG_LABELS,),
        )


def staircase(starts: Array, begins: Array, ends: Array, levels: Array) -> tuple[float, float, float] | None:
    """Level of the first pass, the present one, and the share of the fall at boundaries; None for no staircase.

    Args:
        starts: First steps of passes, shape (p,).
        begins: First steps of blocks, shape (b,).
        ends: Their last steps.
        levels: Their losses.
    """
    passes = []
    for first, after in zip(starts, [*starts[1:], math.inf], strict=True):
        inside = (begins >= first) & (ends < after)
        passes.append(levels[inside])
    whole = passes[:-1]
    if min(map(len, whole)) < LEAST or not np.isfinite(np.concatenate(passes)).all():
        return None
    early = whole[0]
    # The first blocks of a run learn how often each label comes: the pass is judged from its second half on.
    half = early[len(early) // 2 :]
    level, begun = float(half.mean()), float(early[0])
    learnt = max(begun, level) - float(half[-2:].mean())
    if not level > 0 or learnt > NOTHING * begun:
        return None
    # From one pass to the next: means of the two blocks on either side of a boundary.
    jumps = sum(float(a[-2:].mean() - b[:2].mean()) for a, b in zip(whole, passes[1:], strict=True) if len(b))
    now = float(passes[-1][:2].mean()) if len(passes[-1]) else float(whole[-1][-2:].mean())
    fall = level - now
    if not fall > FELL * level:
        return None
    share = jumps / fall
    return (level, now, share) if share > AT_BOUNDARIES else None
