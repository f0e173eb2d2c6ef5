"""A run as detectors see it, block by block, each with what was known by then: :class:`Course`, :class:`Moment`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np

from dyntune.detect.first_steps import FirstSteps
from dyntune.detect.readings import Known, Reading, Readings
from dyntune.detect.watch import Seen, Watch
from dyntune.monitor.rows import Rows

__all__ = ["Course", "Moment", "Settings", "Wired"]

WIRING = ("grad/frozen", "grad/unreached", "update/unheld")
NOTED = ("optimizer/", *WIRING)
RATE = "train/lr/"


@dataclass(frozen=True)
class Settings:
    """Of the optimizer.

    Args:
        numbers: By column, without ``optimizer/``.
        groups: Names of the parameters of groups but the first.
        rates: Learning rates of groups by that of the first, where they differ.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    rates: Mapping[int, float] = field(default_factory=dict)

    def of(self, name: str, group: int = 0) -> float:
        """A number of a group, which is the first one's where it does not differ; NaN where it is not known."""
        first = self.numbers.get(name, math.nan)
        return self.numbers.get(f"{name}/{group}", first) if group else first

    @property
    def is_adam(self) -> bool:
        """Whether steps do not scale with the loss."""
        return "beta2" in self.numbers

    @property
    def furthest_rate(self) -> float:
        """The factor between learning rates that is furthest from 1."""
        return max(self.rates.values(), key=lambda factor: abs(math.log(factor)), default=1.0)


@dataclass(frozen=True)
class Wired:
    """That parameters take part, or no longer do; see :class:`dyntune.monitor.wiring.Wiring`."""

    step: int
    values: Mapping[str, float | None]
    labels: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Moment:
    """A block, with everything that was recorded by its last step.

    Args:
        seen: The block and its scores.
        new: Looks at single tensors and layers since the block before.
        known: The latest of each kind.
        settings: Of the optimizer.
        wired: What changed since the block before.
        first: What the first steps did.
    """

    seen: Seen
    new: tuple[Reading, ...]
    known: Known
    settings: Settings
    wired: tuple[Wired, ...]
    first: FirstSteps

    @property
    def step(self) -> int:
        """The last one of the block."""
        return int(self.seen.block.steps[-1])


class Course:
    """Reads rows once for all detectors that share it; what they see does not depend on how rows were portioned.

    Attributes:
        changes: Settings that are new in the latest rows, by their place there, whether a block is full or not.

    Example:
        >>> from dyntune.monitor.rows import Row
        >>> rows = Rows.of(Row(step=i, values={"train/loss": 1.0, "optimizer/eps": 1e-8}) for i in range(70))
        >>> [(moment.step, moment.settings.of("eps")) for moment in Course().take(rows)]
        [(31, 1e-08), (63, 1e-08)]
    """

    def __init__(self) -> None:
        self._watch, self._readings = Watch(), Readings()
        self._settings, self._first = Settings(), FirstSteps()
        self._waiting: list[tuple[int, Settings]] = []
        self._wired: list[Wired] = []
        self._newest = Settings()
        self.changes: list[tuple[int, Settings]] = []
        self._rows: Rows | None = None
        self._moments: list[Moment] = []

    def take(self, rows: Rows) -> list[Moment]:
        """More rows; the blocks that are full now. The same rows again: the same ones."""
        if rows is not self._rows:
            self._rows = rows
            self._note(rows)
            self._readings.take(rows)
            self._moments = [self._moment(seen) for seen in self._watch.take(rows)]
        return self._moments

    def _moment(self, seen: Seen) -> Moment:
        step = int(seen.block.steps[-1])
        # As with looks: rows of the last step itself may come before or after the block is full, so they wait.
        while self._waiting and self._waiting[0][0] < step:
            self._settings = self._waiting.pop(0)[1]
        wired = tuple(item for item in self._wired if item.step < step)
        if wired:
            self._wired = [item for item in self._wired if item.step >= step]
        self._first = self._first.after(seen)
        new = tuple(self._readings.advance(step))
        return Moment(seen, new, self._readings.known, self._settings, wired, self._first)

    def _note(self, rows: Rows) -> None:
        names = rows.names
        found = [change for name in names if name.startswith(RATE) for change in self._rates(rows, name)]
        if any(name.startswith(NOTED) for name in names):
            for at, row in enumerate(rows):
                numbers = {n.removeprefix("optimizer/"): x for n, x in row.values.items() if n.startswith("optimizer/")}
                known = {name: x for name, x in numbers.items() if x is not None}
                if known:
                    named = {n[6:]: text for n, text in row.labels.items() if n.startswith("group/")}
                    groups = {int(index): tuple(text.split("\n")) for index, text in named.items()}
                    found.append((at, Settings(known, groups)))
                if any(kind in row.values for kind in WIRING):
                    self._wired.append(Wired(row.step, row.values, row.labels))
        self.changes = []
        for at, new in sorted(found, key=itemgetter(0)):
            old = self._newest
            # A group's number is recorded where it differs from the first one's, so a new first one drops the old ones.
            kept = {name: x for name, x in old.numbers.items() if name.partition("/")[0] not in new.numbers}
            self._newest = Settings({**kept, **new.numbers}, {**old.groups, **new.groups}, {**old.rates, **new.rates})
            self.changes.append((at, self._newest))
            self._waiting.append((int(rows.steps[at]), self._newest))

    def _rates(self, rows: Rows, name: str) -> Iterator[tuple[int, Settings]]:
        """Where the factor between a group's learning rate and the first one's changes by a hundredth."""
        first, own = rows.column("train/lr"), rows.column(name)
        places = np.flatnonzero(np.isfinite(first) & np.isfinite(own) & (first > 0.0) & (own > 0.0))
        index, factors = int(name.removeprefix(RATE)), own[places] / first[places]
        before = self._newest.rates.get(index, math.nan)
        while (moved := ~(np.abs(factors / before - 1.0) < 0.01)).any():
            at = int(np.argmax(moved))
            before = float(factors[at])
            yield int(places[at]), Settings(rates={index: before})
            places, factors = places[at + 1 :], factors[at + 1 :]
