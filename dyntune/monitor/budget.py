"""What the monitor may spend, what it has spent, and what training would take without it: :class:`Budget`."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping

from dyntune.errors import InvalidArgumentError

__all__ = ["Budget"]

# A step shorter than 2.5 ms may cost this much all the same, up to 2.5 times the permitted share (5% at the default of
# 2%, so at 1 ms both are 50 microseconds): hooks and a record of the loss do not get shorter with the step.
FLOOR_SECONDS = 50e-6
FLOOR_SHARE = 2.5
# Whatever the step takes, its record may cost this much: one record is 16 to 22 microseconds (benchmarks/run_log.py).
LEAST_SECONDS = 20e-6
USUAL = 0.02
# A bare step is the median over this many, of one step or of the mean of seven: an evaluation in between, or a
# checkpoint, is not one.
RECENT = 63
# What every step costs is a mean over at least this many: several times MOST_STEPS, at which steps are written out.
WINDOW = 256
# Decisions are taken about this often, at every step where steps are longer, and steps are written out with them. They
# take half a millisecond where none of our code is in a cache (measured), a tenth of what 2% of this time allows.
DECISION_SECONDS = 0.25
MOST_STEPS = 64
# So many times rarer where hooks and records alone take more than they shall.
RARER = 4
# The hooks of one step in so many are timed, and the others taken to cost the same: a clock costs nearly as much. A
# prime number, so that steps with a decision are timed as often as others.
TIMED = 7
# What the second measurement of a kind is expected to take: the first, less what is loaded and set up once, and not
# less than a share of it. Eigenvalues begin where the last one ended. In benchmarks/monitor_overhead.py a second burst
# took 0.13 s less on the MLP and 0.16 s less on the transformer, a second eigenvalue 0.1 to 0.2 of the first.
SETTING_UP = 0.15
LATER = 0.2
RESUMED = ("largest",)
# What hooks cost, over what they take by a clock around them: afterwards the training's own code and data come back
# into caches that they displaced. Measured on steps of a millisecond: with 1.4 the budget was not kept (6.8% of 4.8%).
DISPLACED = 2.0
# Of what is permitted: what is aimed at the limit itself is above it half of the time.
AIM = 0.9
# What measurements cost, over what they take by a clock around them: as with hooks, caches and memory have to be filled
# again. On a transformer with steps of 85 ms, paired blocks of training took 2.0, 2.1, 2.4 and 1.2% (each give or take
# 0.5%) where the clock had 1.3% for what every step costs and 0.5, 0.3, 0.4 and 0.1% for measurements.
DISTURBING = 3.0
# Of that, for hooks, records and norms of the gradient; the rest is for measurements.
ALWAYS = 0.8


class Budget:
    """Keeps the monitor's share of training time, by its own clock.

    What is spent is booked by kind. ``"hooks"`` and ``"log"`` are what every step costs; of what they leave, each other
    kind (bursts, probes) has a share, and another one may be begun when its last cost fits into that. The first of each
    is begun in any case, and does not count against those after it: it is dearer, since nothing is warm.

    Args:
        overhead: Permitted share of training time, from 0 (nothing beyond tier 0) to 1, exclusive.

    Raises:
        InvalidArgumentError: A share outside of that.

    Example:
        >>> budget = Budget(0.02)
        >>> for step in range(5):
        ...     budget.step_begins(0.1 * step)
        >>> round(budget.bare, 9), round(budget.permitted, 9)
        (0.1, 0.002)
        >>> budget.affords("burst", share=0.5)
        True
        >>> for _ in range(2):
        ...     budget.book("burst", 0.01)
        ...     budget.cost("burst", 0.01)
        >>> budget.affords("burst", share=0.5)
        False
    """

    def __init__(self, overhead: float = USUAL) -> None:
        if not 0 <= overhead < 1:
            raise InvalidArgumentError(
                f"overhead={overhead}: the share of training time that the monitor may take is at least 0 and below 1; "
                "0.02 is two percent."
            )
        self.overhead = overhead
        self.steps = 0
        self.spent = 0.0
        self.kinds: defaultdict[str, float] = defaultdict(float)
        self.costs: dict[str, float] = {}  # that the next one of each kind is expected to take
        self._first: dict[str, float] = {}
        self.training = 0.0  # seconds between the first step and the latest, the monitor's own left out
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.timing = True  # whether the hooks of this step are timed
        self._hooks, self._timed = 0.0, 1.0  # their seconds, and steps that these are of
        self._per_step = 0.0  # what hooks are taken to cost
        self._last: float | None = None  # when the steps began that are not summed up yet
        self._summed = 0  # steps
        self._spent_then = 0.0
        self._marks: deque[tuple[int, float]] = deque([(0, 0.0)], maxlen=2)

    def step_begins(self, now: float) -> None:
        """An optimizer step begins at `now`, seconds on any clock that does not go back."""
        if self._last is None:
            self._last, self._spent_then = now, self.spent
            return
        self.steps += 1
        self.timing = self.steps % TIMED == 0
        if self.timing or self.steps <= RECENT:
            self._sum_up(now, self._last)

    def _sum_up(self, now: float, last: float) -> None:
        """Of the steps since `last`: one, until a median is over enough, then seven, since bookkeeping costs, too."""
        count, self._summed = self.steps - self._summed, self.steps
        hooks = self._per_step * count
        training = max(now - last - (self.spent - self._spent_then) - hooks, 0.0)
        self._recent.append(training / count)
        self.training += training
        self.spent += hooks
        self.kinds["hooks"] += hooks
        self._last, self._spent_then = now, self.spent
        if not self.timing:
            return
        self._per_step = DISPLACED * self._hooks / self._timed
        self._timed += 1
        if self._timed > RECENT:  # what they cost changes: half of the weight is on the latest of them
            self._hooks, self._timed = self._hooks / 2, self._timed / 2
        if self.steps >= self._marks[-1][0] + WINDOW:
            self._marks.append((self.steps, self.kinds["hooks"] + self.kinds["log"]))

    def book(self, kind: str, seconds: float) -> None:
        """The monitor has spent so long."""
        self.spent += seconds
        self.kinds[kind] += seconds

    def book_hooks(self, seconds: float) -> None:
        """The hooks of a step that is timed have spent so long."""
        self._hooks += seconds

    def cost(self, kind: str, seconds: float) -> None:
        """One whole measurement took so long (booked already); after the first, the next is expected to take less."""
        self.costs[kind] = seconds
        if not self._first.get(kind):
            self._first[kind] = seconds
            self.costs[kind] = max(LATER * seconds, 0.0 if kind in RESUMED else seconds - SETTING_UP)

    @property
    def bare(self) -> float:
        """Seconds of a step without the monitor: the median of recent ones; NaN before there is one."""
        return statistics.median(self._recent) if self._recent else math.nan

    @property
    def share(self) -> float:
        """What was spent over what training took, what the user asked for left out; NaN before the second step."""
        return (self.spent - self.kinds["measure"]) / self.training if self.training > 0 else math.nan

    @property
    def permitted(self) -> float:
        """Seconds that a step may cost at present."""
        bare = self.bare
        if math.isnan(bare):
            return 0.0
        scale = self.overhead / USUAL
        floor = min(FLOOR_SECONDS * min(scale, 1.0), FLOOR_SHARE * self.overhead * bare)
        return max(self.overhead * bare, floor, LEAST_SECONDS)

    @property
    def aimed(self) -> float:
        """Seconds that a step shall cost: what is aimed at the limit itself is above it half of the time."""
        return AIM * self.permitted

    @property
    def aimed_always(self) -> float:
        """Seconds of those that shall be spent at every step."""
        return ALWAYS * self.aimed

    @property
    def always(self) -> float:
        """Seconds that every step costs at present, bursts and probes apart: a mean over :data:`WINDOW` steps or more.

        Not over the whole run: the first steps are all recorded, and would keep everything else away for long.
        """
        steps, seconds = self._marks[0]
        return (self.kinds["hooks"] + self.kinds["log"] - seconds) / max(self.steps - steps, 1)

    def affords(self, kind: str, *, share: float) -> bool:
        """Whether another measurement fits: never one beyond the first where `overhead` is 0.

        Args:
            kind: Of measurement.
            share: Its part of what tier 0 leaves.
        """
        if kind not in self.costs:
            return True
        return self.kinds[kind] - self._first[kind] + self.costs[kind] <= self._left * self.steps * share

    def in_turn(self, shares: Mapping[str, float]) -> list[str]:
        """Kinds of measurement, that which has had the least of its share first."""
        return sorted(shares, key=lambda kind: self.kinds[kind] / shares[kind])

    def period(self, kind: str, *, share: float) -> float:
        """Steps from one measurement to the next at what it cost last; infinite where it is not made again."""
        left = self._left * share
        return self.costs.get(kind, 0.0) / left if left > 0 else math.inf

    @property
    def _left(self) -> float:
        """Seconds per step, by the clock, that tier 0 leaves to measurements."""
        return max(self.aimed - self.always, 0.0) / DISTURBING if self.overhead > 0 else 0.0

    @property
    def interval(self) -> int:
        """Steps from one decision to the next."""
        bare = self.bare
        if math.isnan(bare):
            return 1
        rarer = RARER if self.always > self.aimed_always else 1
        return max(1, min(rarer * MOST_STEPS, int(rarer * DECISION_SECONDS / max(bare, 1e-9))))
