"""Settings of the optimizer that theory and practice speak against: :class:`Configured`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from dyntune.detect.readings import Readings
from dyntune.detect.tensors import named
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows

__all__ = ["Configured"]

RATIO = "update/ratio/"
FORGETS, FORGETS_SOON = 500.0, 100.0  # steps in which weight decay removes what was learnt: an epoch, at the very least
OTHER = 10.0  # times the first group's weight decay: a group without one (biases, norms) is usual, ten times is not
APART, FAR_APART = 10.0, 30.0  # between learning rates of two groups; a head of ten times the rest is usual
STOPPED, SHARE = 0.005, 1.0 / 3.0  # of the highest learning rate, and of the run so far that it has been below that
LEAST = 256  # steps before anything is said of a schedule
EPS_LOOKS = 2


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
    """

    def __init__(self) -> None:
        self._readings = Readings()
        self._settings: dict[str, float] = {}
        self._groups: dict[int, tuple[str, ...]] = {}
        self._rates: dict[int, float] = {}  # relative to the first group's
        self._peak = 0.0
        self._lr = 0.0
        self._steps = self._low = 0
        self._said: dict[str, str] = {}

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        self._readings.take(rows)
        self._readings.advance(1 << 62)
        names = rows.names
        if any(name.startswith("optimizer/") for name in names):
            for row in rows:
                self._settings |= {n: x for n, x in row.values.items() if x is not None and n.startswith("optimizer/")}
                for label, text in row.labels.items():
                    if label.startswith("group/"):
                        self._groups[int(label.removeprefix("group/"))] = tuple(text.split("\n"))
        if "train/lr" not in names:
            return
        step = int(rows.steps.max())
        self._take_rates(rows, names)
        for found in (self._beta2(step), self._decay(step), self._group(step), self._ended(step)):
            if found is not None:
                key, alert = found
                if self._said.get(key) not in ("critical", alert.severity):
                    self._said[key] = alert.severity
                    yield alert

    def _take_rates(self, rows: Rows, names: tuple[str, ...]) -> None:
        lr = rows.column("train/lr")
        known = lr[np.isfinite(lr)]
        if not known.size:
            return
        peaks = np.maximum.accumulate(np.concatenate([[self._peak], known]))[1:]
        self._steps += known.size
        low = known < STOPPED * peaks
        # Of restarts each cycle counts for itself: what lies before the latest high rate says nothing.
        self._low = self._low + known.size if low.all() else int(np.argmin(low[::-1]))
        self._peak, self._lr = float(peaks[-1]), float(known[-1])
        for name in names:
            if name.startswith("train/lr/"):
                ratio = rows.column(name) / lr
                ratio = ratio[np.isfinite(ratio) & (ratio > 0.0)]
                if ratio.size:
                    self._rates[int(name.rsplit("/", 1)[1])] = float(ratio[-1])

    def _setting(self, name: str, index: int = 0) -> float:
        first = self._settings.get(f"optimizer/{name}", math.nan)
        return self._settings.get(f"optimizer/{name}/{index}", first) if index else first

    def _beta2(self, step: int) -> tuple[str, Alert] | None:
        beta1, beta2 = self._setting("beta1"), self._setting("beta2")
        if not beta2 < beta1:  # NaN without one
            return None
        severe = beta2 < beta1**2
        half = math.log(0.5) / math.log(beta2) if 0.0 < beta2 < 1.0 else 0.0
        return "beta2", Alert(
            kind="beta2-too-small",
            severity="critical" if severe else "warning",
            step=step,
            text=f"beta2 is {beta2:.4g}, below {'the square of beta1' if severe else 'beta1'} ({beta1:.4g}): the second "
            f"moment remembers {half:.2g} steps, fewer than the first, so single gradients set the size of steps.",
            advice="Raise beta2: 0.95 to 0.999 are usual.",
            evidence={"optimizer/beta2": beta2, "optimizer/beta1": beta1},
            causes=(Cause.BETA2_TOO_SMALL,),
            recommender="dyntune.suggest_beta2",
        )

    def _decay(self, step: int) -> tuple[str, Alert] | None:
        first = self._setting("weight_decay")
        decoupled = "optimizer/beta2" in self._settings
        for index, names in self._groups.items():
            own = self._setting("weight_decay", index)
            rate = self._lr * self._rates.get(index, 1.0) * own
            if not decoupled:
                rate /= max(1.0 - (self._setting("momentum", index) or 0.0), 1e-3) if self._has_momentum(index) else 1.0
            if not (own > OTHER * first and rate > 1.0 / FORGETS):
                continue
            return f"decay {index}", Alert(
                kind="weight-decay",
                severity="critical" if rate > 1.0 / FORGETS_SOON else "warning",
                step=step,
                text=f"the weight decay of a parameter group ({named(names)}) is {own:.4g}, {first:.4g} in the first "
                f"group: what it has learnt is gone after {1.0 / rate:.2g} steps.",
                advice="Give that group the weight decay of the others.",
                evidence={f"optimizer/weight_decay/{index}": own, "optimizer/weight_decay": first, "train/lr": self._lr},
                causes=(Cause.GROUP_WEIGHT_DECAY,),
                where=names,
            )
        return None

    def _has_momentum(self, index: int) -> bool:
        return self._setting("momentum", index) > 0.0

    def _group(self, step: int) -> tuple[str, Alert] | None:
        rates = {round(math.log(rate), 2): index for index, rate in self._rates.items()}
        if len(rates) != 1:
            return None
        index = next(iter(rates.values()))
        factor = self._rates[index]
        if abs(math.log(factor)) < math.log(APART):
            return None
        names = self._groups.get(index, ())
        apart = self._apart(names)
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
            step=step,
            text=f"the learning rate of a parameter group ({named(names)}) is {factor:.3g} times that of the first.{said}",
            advice="Give that group the learning rate of the others, if that is not meant.",
            evidence={f"train/lr/{index}": factor * self._lr, "train/lr": self._lr}
            | ({"apart": apart} if math.isfinite(apart) else {}),
            causes=(Cause.GROUP_LR,),
            where=names,
            recommender="dyntune.suggest_lr",
        )

    def _apart(self, names: Iterable[str]) -> float:
        """Relative change of the group's median tensor, by that of the others'; NaN where it was not measured."""
        inside = set(names)
        ratios: Mapping[str, float] = self._readings.of(RATIO)
        own = [x for name, x in ratios.items() if name in inside and math.isfinite(x)]
        others = [x for name, x in ratios.items() if name not in inside and math.isfinite(x)]
        if not own or not others or not statistics.median(others) > 0.0:
            return math.nan
        return statistics.median(own) / statistics.median(others)

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
