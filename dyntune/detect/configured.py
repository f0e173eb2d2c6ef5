"""Settings of the optimizer that theory and practice speak against: :class:`Configured`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal

import numpy as np

from dyntune.detect.course import Course, Moment, Settings
from dyntune.detect.tensors import named
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Array, Rows

__all__ = ["Configured"]

RATIO = "update/ratio/"
FORGETS, FORGETS_SOON = 500.0, 100.0  # steps in which weight decay removes what was learnt: an epoch, at the very least
OTHER = 10.0  # times the first group's weight decay: a group without one (biases, norms) is usual, ten times is not
APART, FAR_APART = 10.0, 30.0  # between learning rates of two groups; a head of ten times the rest is usual
STOPPED, SHARE = 0.005, 1.0 / 3.0  # of the highest learning rate, and of the run so far that it has been below that
LEAST = 256  # steps before anything is said of a schedule


class Configured:
    """Reads the settings that the monitor records, and what comes of them.

    - *beta2 too small*: below beta1 squared (critical), where Adam's step is dominated by single gradients and is known
      to diverge, or below beta1 (warning). Source: Zhang et al. (2022), arXiv:2208.09632 (beta1 < sqrt(beta2)).
    - *Weight decay of a group*: what that group has learnt is gone after fewer than 100 (critical) or 500 steps
      (warning), 1 / (lr wd) with decoupled decay and (1 - momentum) / (lr wd) with SGD, and ten times more than in the
      first group. Source of the time scale: Wang and Aitchison (2024), arXiv:2405.13698.
    - *Learning rate of a group*: there are two rates, 30 times apart, and relative changes of the tensors are ten times
      apart in the same direction (critical), or the rates alone are ten times apart (warning). More than two rates are
      taken to be meant (layer-wise decay).
    - *Learning rate that ended early*: below half a percent of its peak for more than a third of the run so far.

    Each is said once.

    Args:
        course: Shared with other detectors.
    """

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._peak = self._lr = 0.0
        self._steps = self._low = 0
        self._said: dict[str, str] = {}
        self._settings, self._now, self._top = Settings(), math.nan, 0.0  # row by row; the highest rate under these

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        moments = self._course.take(rows)
        if self._course.changes or "train/lr" in rows.names:
            yield from self._news(*self._early(rows))
        for moment in moments:
            self._take(moment.seen.block.rates)
            yield from self._news(self._group(moment), self._ended(moment.step))

    def _early(self, rows: Rows) -> Iterable[tuple[str, Alert] | None]:
        """What needs no block, row by row: what is wrong from the first step on may end the run within a few."""
        lr, changes = rows.column("train/lr"), dict(self._course.changes)
        for begin, end in pairwise(sorted({0, *changes, len(rows)})):
            part, steps = lr[begin:end], rows.steps[begin:end]
            if begin in changes:
                self._settings, self._top = changes[begin], 0.0
                part = np.concatenate([[part[0] if math.isfinite(part[0]) else self._now], part[1:]])
                yield _beta2(self._settings, int(steps[0]))
            for at in np.flatnonzero(np.isfinite(part) & (part > self._top)) if self._settings.groups else ():
                if part[at] > self._top:
                    self._top = float(part[at])
                    yield _decay(self._settings, self._top, int(steps[at]))
            known = part[np.isfinite(part)]
            self._now = float(known[-1]) if known.size else self._now

    def _news(self, *found: tuple[str, Alert] | None) -> Iterable[Alert]:
        """Those that were not said yet, or were not critical then."""
        for item in found:
            if item is not None:
                key, alert = item
                if self._said.get(key) not in ("critical", alert.severity):
                    self._said[key] = alert.severity
                    yield alert

    def _take(self, known: Array) -> None:
        if not known.size:
            return
        peaks = np.maximum.accumulate(np.concatenate([[self._peak], known]))[1:]
        low = known < STOPPED * peaks
        # Of restarts each cycle counts for itself: what lies before the latest high rate says nothing.
        self._low = self._low + known.size if low.all() else int(np.argmin(low[::-1]))
        self._steps += known.size
        self._peak, self._lr = float(peaks[-1]), float(known[-1])

    def _group(self, moment: Moment) -> tuple[str, Alert] | None:
        settings = moment.settings
        rates = {round(math.log(rate), 2): index for index, rate in settings.rates.items()}
        if len(rates) != 1:
            return None
        index = next(iter(rates.values()))
        factor = settings.rates[index]
        if abs(math.log(factor)) < math.log(APART):
            return None
        names = settings.groups.get(index, ())
        apart = _apart(moment.known.of(RATIO), names)
        severity: Literal["critical", "warning"] = "warning"
        said = ""
        if not math.isnan(apart):
            said = f" A step changes it by {apart:.2g} times as much of its length as the others."
            same = math.log(apart) * math.log(factor) > 0.0 if apart > 0.0 else factor < 1.0
            far = abs(math.log(apart)) > math.log(APART) if apart > 0.0 else True
            if abs(math.log(factor)) > math.log(FAR_APART) and same and far:
                severity = "critical"
        return "group", Alert(
            kind="group-lr",
            severity=severity,
            step=moment.step,
            text=f"the learning rate of a parameter group ({named(names)}) is {factor:.3g} times that of the first."
            + said,
            advice="Give that group the learning rate of the others, if that is not meant.",
            evidence={f"train/lr/{index}": factor * self._lr, "train/lr": self._lr}
            | ({"apart": apart} if math.isfinite(apart) else {}),
            causes=(Cause.GROUP_LR,),
            where=names,
            recommender="dyntune.suggest_lr",
        )

    def _ended(self, step: int) -> tuple[str, Alert] | None:
        if self._steps < LEAST or self._low < SHARE * self._steps:
            return None
        return "ended", Alert(
            kind="lr-ended",
            severity="critical",
            step=step,
            since=step - self._low,
            text=f"the learning rate has been below {STOPPED:.1%} of its peak, {self._peak:.3g}, for {self._low} of "
            f"{self._steps} steps: nothing is learnt any more.",
            advice="Look at the schedule's length: is it stepped once a batch and made for epochs?",
            evidence={"train/lr": self._lr, "peak": self._peak},
            causes=(Cause.LR_TOO_LOW,),
            recommender="dyntune.suggest_schedule",
        )


def _apart(ratios: Mapping[str, float], names: Iterable[str]) -> float:
    """Relative change of the group's median tensor, by that of the others'; NaN where it was not measured."""
    inside = set(names)
    own = [x for name, x in ratios.items() if name in inside and math.isfinite(x)]
    others = [x for name, x in ratios.items() if name not in inside and math.isfinite(x)]
    if not own or not others or not statistics.median(others) > 0.0:
        return math.nan
    return statistics.median(own) / statistics.median(others)


def _beta2(settings: Settings, step: int) -> tuple[str, Alert] | None:
    beta1, beta2 = settings.of("beta1"), settings.of("beta2")
    if not 0.0 <= beta2 < beta1 < 1.0:  # NaN without one
        return None
    severe = beta2 < beta1**2
    half = math.log(0.5) / math.log(beta2) if 0.0 < beta2 < 1.0 else 0.0
    return "beta2", Alert(
        kind="beta2-too-small",
        severity="critical" if severe else "warning",
        step=step,
        text=f"beta2 is {beta2:.4g}, below {'the square of beta1' if severe else 'beta1'} ({beta1:.4g}): the "
        f"second moment remembers {half:.2g} steps, fewer than the first, so single gradients set the size of steps.",
        advice="Raise beta2: 0.95 to 0.999 are usual.",
        evidence={"optimizer/beta2": beta2, "optimizer/beta1": beta1},
        causes=(Cause.BETA2_TOO_SMALL,),
        recommender="dyntune.suggest_beta2",
    )


def _decay(settings: Settings, lr: float, step: int) -> tuple[str, Alert] | None:
    first = settings.of("weight_decay")
    for index, names in settings.groups.items():
        own = settings.of("weight_decay", index)
        rate = lr * settings.rates.get(index, 1.0) * own
        if not settings.is_adam and settings.of("momentum", index) > 0.0:
            rate /= 1.0 - settings.of("momentum", index)
        if not (own > OTHER * first and rate > 1.0 / FORGETS):
            continue
        return f"decay {index}", Alert(
            kind="weight-decay",
            severity="critical" if rate > 1.0 / FORGETS_SOON else "warning",
            step=step,
            text=f"the weight decay of a parameter group ({named(names)}) is {own:.4g}, {first:.4g} in the first "
            f"group: what it has learnt is gone after {1.0 / rate:.2g} steps.",
            advice="Give that group the weight decay of the others.",
            evidence={
                f"optimizer/weight_decay/{index}": own,
                "optimizer/weight_decay": first,
                "train/lr": lr,
            },
            causes=(Cause.GROUP_WEIGHT_DECAY,),
            where=names,
        )
    return None
