"""Whether a window did harm, and whether a change averts it: :class:`Judge`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from dyntune.replay.replaying import Replayed

__all__ = ["Judge", "Verdict", "agreement", "outliers", "rises", "tail_length"]

# Of the window, and most and fewest: the end whose median says how it came out.
TAIL_SHARE, TAIL_MOST, TAIL_LEAST = 0.25, 16, 4
# Median absolute deviations to standard deviations, and the standard error of a median to that of a mean, of normal
# numbers: 1 / Phi^-1(3/4) and sqrt(pi / 2).
MAD_TO_SD = 1.4826
MEDIAN_SE = 1.2533
# Standard errors that a rise has to exceed, whatever the history says: of normal numbers 0.13% do by chance.
NOISE = 3.0
# Robust standard deviations of log(1 + x) from its median at which a batch stands out at fixed parameters. Of 64 normal
# numbers 6e-8 do; heavy-tailed losses of small batches do more often, and a dropped healthy batch averts nothing.
OUTLYING = 6.0
# Losses before the window that it takes to say what is usual: their spread is then known to some 20% (1.17 / sqrt(n)).
PAST_LEAST = 32
# Of the rise, what a change has to undo besides coming back below the limit, so that nothing is averted by a hair.
UNDONE = 0.5
# Two losses of which one was computed by other kernels (compiled, atomic additions) agree to this share of themselves;
# the order of summation changes a loss by some 1e-7, and a window of unstable steps amplifies it.
AGREES = 1e-2


class Verdict(Enum):
    """What a replay found; the value is for a reader."""

    AVERTED = "one change averts it"
    NOTHING_AVERTS = "nothing that was tried averts it"
    NOTHING_TO_AVERT = "the loss did not rise in this window beyond what is usual for this run"
    BATCHES = "the batches at the end stand out by themselves, at parameters that never saw them"
    NOT_REPRODUCED = "the replay is not the training itself, so it says nothing"
    TOO_SHORT = "the window is too short to say"


@dataclass(frozen=True)
class Judge:
    """Compares how windows ended: by the rise of the loss on the same batches since the window's first step.

    The rise is the median, over the last steps, of the loss in the replay minus that of the same batch at the
    parameters of the first step. Health is a rise up to `margin`: the largest rise between two stretches of the losses
    before the window, as far apart, or what the spread of the batches alone could do.

    Args:
        tail: Steps whose losses count.
        start: Losses of the same steps' batches at the window's first parameters.
        margin: Largest healthy rise.
    """

    tail: tuple[int, ...]
    start: tuple[float, ...]
    margin: float

    @classmethod
    def of(cls, surveyed: Replayed, history: Sequence[float], *, without: frozenset[int] = frozenset()) -> Judge | None:
        """From the survey and the losses before the window; None where too few steps are left.

        Args:
            surveyed: Losses at the window's first parameters.
            history: Losses before the window.
            without: Steps of batches that stand out, whose losses say little of the parameters.
        """
        wanted = tail_length(len(surveyed.steps))
        usable = [s for s, loss in zip(surveyed.steps, surveyed.losses, strict=True) if math.isfinite(loss)]
        tail = tuple(step for step in usable if step not in without)[-wanted:]
        # Of the first half nothing can be told: harm has had no time.
        if len(tail) < TAIL_LEAST or tail[0] < surveyed.steps[len(surveyed.steps) // 2]:
            return None
        pairs = zip(surveyed.steps, surveyed.losses, strict=True)
        calm = np.array([loss for step, loss in pairs if math.isfinite(loss) and step not in without])
        sd = MAD_TO_SD * float(np.median(np.abs(calm - np.median(calm))))
        chance = NOISE * MEDIAN_SE * sd / math.sqrt(len(tail))
        past = rises(history, length=len(tail), apart=len(surveyed.steps) - len(tail))
        return cls(tail, tuple(surveyed.at(tail)), max([chance, *past]))

    def rise(self, replayed: Replayed) -> float:
        """How much the window raised the loss; infinite where it is not finite any more."""
        ends = np.subtract(replayed.at(self.tail), self.start)
        kept = ends[[not replayed.change.skips(step) for step in self.tail]]
        if kept.size and not np.isfinite(kept[-1]):  # of a batch that was finite before: the parameters broke
            return math.inf
        rise = float(np.median(np.where(np.isfinite(kept), kept, math.inf))) if kept.size else math.nan
        return math.inf if math.isnan(rise) else rise

    def harmed(self, unchanged: Replayed) -> bool:
        """Whether there is anything to avert."""
        return self.rise(unchanged) > self.margin

    def averts(self, changed: Replayed, unchanged: Replayed) -> bool:
        """Whether the rise is back in the healthy range, and at least half of it undone."""
        rise = self.rise(changed)
        return rise <= self.margin and rise <= UNDONE * self.rise(unchanged)


def tail_length(steps: int) -> int:
    """How many of the last steps of a window say how it came out."""
    return max(TAIL_LEAST, min(TAIL_MOST, round(TAIL_SHARE * steps)))


def rises(losses: Sequence[float], *, length: int, apart: int) -> list[float]:
    """Differences between medians of `length` losses that begin `apart` steps from each other.

    Example:
        >>> rises([1.0, 1.0, 3.0, 3.0], length=2, apart=2)
        [2.0]
    """
    known = np.asarray(losses, dtype=float)
    if len(known) < length + apart:
        return []
    medians = np.median(np.lib.stride_tricks.sliding_window_view(known, length), axis=1)
    found = medians[apart:] - medians[:-apart] if apart else np.zeros(0)
    return [float(rise) for rise in found if math.isfinite(rise)]


def outliers(surveyed: Replayed, history: Sequence[float] = ()) -> list[int]:
    """Steps whose batch stands out at fixed parameters by its loss or its gradient, the worst first.

    Losses are compared with those before the window, where there are enough, so that bad batches may be the most of it.

    Args:
        surveyed: Losses and norms at the window's first parameters.
        history: Losses before the window.
    """
    past = [loss for loss in history if math.isfinite(loss)][-len(surveyed.steps) :]
    worst: dict[int, float] = {}
    for values, usual in (
        (surveyed.losses, past if len(past) >= PAST_LEAST else surveyed.losses),
        (surveyed.norms, surveyed.norms),
    ):
        calm = _logs(usual)
        calm = calm[np.isfinite(calm)]
        if 2 * len(calm) <= len(usual):  # most are not finite: the window begins after the training broke
            continue
        middle = float(np.median(calm))
        sd = MAD_TO_SD * float(np.median(np.abs(calm - middle)))
        if sd == 0:
            continue
        for step, log in zip(surveyed.steps, _logs(values), strict=True):
            if (log - middle) / sd > OUTLYING:
                worst[step] = max(worst.get(step, 0.0), float((log - middle) / sd))
    return sorted(worst, key=lambda step: -worst[step])


def _logs(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([math.log1p(v) if math.isfinite(v) and v > -1 else math.inf for v in values])


def agreement(replayed: Replayed, told: Sequence[float]) -> float:
    """Largest difference between the replay's losses and those that the loop told, relative to these.

    0: bit for bit; infinite where one is finite and the other is not, NaN where none was told.
    """
    worst = math.nan
    for ours, theirs in zip(replayed.losses, told, strict=True):
        if math.isnan(theirs) and math.isfinite(ours):
            continue  # not told
        if not (math.isfinite(ours) and math.isfinite(theirs)):
            gap = 0.0 if not math.isfinite(ours) and not math.isfinite(theirs) else math.inf
        else:
            gap = abs(ours - theirs) / max(abs(theirs), np.finfo(np.float64).tiny)
        worst = gap if math.isnan(worst) else max(worst, gap)
    return worst
