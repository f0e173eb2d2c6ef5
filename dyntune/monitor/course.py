"""How the loss of a run went, before and after a step: :class:`Course`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dyntune.monitor.ratios import LOSS, first_column
from dyntune.monitor.rows import Array
from dyntune.monitor.run import Run
from dyntune.records import short_number

__all__ = ["Course", "course"]

# Losses whose median is a level: a tenth of those there are, at most what a burst of noise takes, as in the verdict.
SHARE, MOST = 10, 20
# Of the progress until then: a loss that has come back to within it has recovered, one that has not come down by it in
# all its steps has not fallen. The detectors' own share for "recovered" (detect/level.py).
BACK = 0.1


@dataclass(frozen=True, eq=False)
class Course:
    """The loss over the steps; at least one of them is a number.

    Args:
        steps: Shape (n,), ascending.
        losses: Shape (n,); NaN or infinite where they are.
    """

    steps: NDArray[np.int64]
    losses: Array

    def _level(self, keep: NDArray[np.bool_], *, last: bool) -> float:
        known = self.losses[keep & np.isfinite(self.losses)]
        count = max(1, min(MOST, known.size // SHARE))
        return float(np.median(known[-count:] if last else known[:count])) if known.size else float("nan")

    def from_to(self) -> str:
        """Its level at the start and now."""
        everything = np.ones(self.steps.size, dtype=bool)
        start, end = (short_number(self._level(everything, last=last)) for last in (False, True))
        return f"the loss went from {start} to {end}"

    def stuck(self) -> str:
        """Where it has been all along."""
        went = self.from_to().replace("the loss went", "its level went")
        return f"In all {int(self.steps[-1] - self.steps[0]) + 1:,} steps {went}."

    def until(self, since: int) -> str:
        """How it was before a step."""
        before = self.steps < since
        if np.count_nonzero(before & np.isfinite(self.losses)) < 2:
            return "Training went wrong from the beginning."
        start, level = self._level(before, last=False), self._level(before, last=True)
        last = int(self.steps[before][-1])
        if level < start - BACK * abs(start):
            return (
                f"Training was healthy until step {last:,}: the loss fell from {short_number(start)} to "
                f"{short_number(level)}."
            )
        return (
            f"Until step {last:,} nothing was noticed, but the loss hardly fell: {short_number(start)} at the start, "
            f"{short_number(level)} then."
        )

    def after(self, since: int) -> str:
        """What became of it from a step on; empty where there is nothing to say."""
        after, finite = self.steps >= since, np.isfinite(self.losses)
        if not after.any():
            return ""
        known = np.flatnonzero(after & finite)
        peak = known[np.argmax(self.losses[known])] if known.size else None
        start, level = self._level(~after, last=False), self._level(~after, last=True)
        grown = peak is not None and not self.losses[peak] <= level
        high = f"{short_number(float(self.losses[peak]))} (step {int(self.steps[peak]):,})" if peak is not None else ""
        if not finite[-1]:
            before = np.flatnonzero(finite)
            broken = int(self.steps[before[-1] + 1]) if before.size else int(self.steps[0])
            rose = (
                f"The loss rose to {high}, and from step {broken:,} on it is"
                if grown
                else (f"From step {broken:,} on the loss is")
            )
            return f"{rose} not a number any more."
        end = self._level(after, last=True)
        if np.isfinite(level) and end <= level + BACK * max(start - level, 0.0):
            return f"The loss went up to {high} and came back: it is {short_number(end)} at the end." if grown else ""
        return f"The loss rose to {high} and is {short_number(end)} at the end, step {int(self.steps[-1]):,}."


def course(run: Run) -> Course | None:
    """The loss of a run; None where none was recorded.

    Example:
        >>> from dyntune.monitor.run import Row
        >>> losses = [2.0, 1.0, 0.5, 0.5, 4.0, 8.0]
        >>> found = course(Run(rows=[Row(step=i, values={"train/loss": x}) for i, x in enumerate(losses)]))
        >>> found.until(4)
        'Training was healthy until step 3: the loss fell from 2 to 0.5.'
        >>> found.after(4)
        'The loss rose to 8 (step 5) and is 8 at the end, step 5.'
    """
    name = first_column(run, LOSS)
    if name is None:
        return None
    steps, losses = run.series(name)
    order = np.argsort(steps, kind="stable")
    return Course(steps[order], losses[order]) if steps.size else None
