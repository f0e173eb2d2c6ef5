"""Detectors of single tensors and layers, by the looks that a monitor takes at them now and then."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from dyntune.detect.course import Course, Moment
from dyntune.detect.readings import Reading
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows

__all__ = ["DeadUnits", "EpsTooLarge", "Explosion", "Frozen", "GroupRate", "Vanishing"]

TWICE = 2  # looks in a row: one may have met an unusual batch
RATIO = "update/ratio/"
GRADIENT = "grad/log_rms/"


class OnLooks(ABC):
    """Asks every look which tensors or layers are at fault; those of several looks in a row are one alarm.

    What was said of a tensor is not said again until a look finds it sound.

    Args:
        course: Shared with other detectors.
    """

    looks = TWICE
    once = False  # further tensors are part of the same trouble until all that were named are sound again

    def __init__(self, course: Course | None = None) -> None:
        self._course = course or Course()
        self._seen: dict[str, int] = {}  # looks in a row, by tensor
        self._said: set[str] = set()

    def update(self, rows: Rows) -> Iterable[Alert]:
        """See :class:`~dyntune.monitor.alerts.Detector`."""
        for moment in self._course.take(rows):
            for reading in moment.new:
                yield from self._look(reading, moment)

    def _look(self, reading: Reading, moment: Moment) -> Iterable[Alert]:
        found = self.at_fault(reading, moment)
        if found is None:
            return
        self._seen = {name: self._seen.get(name, 0) + 1 for name in found}
        self._said &= found.keys()
        new = [name for name, count in self._seen.items() if count >= self.looks and name not in self._said]
        if new and not (self.once and self._said):
            self._said.update(new)
            yield self.alert(reading.step, {name: found[name] for name in new}, moment)

    @abstractmethod
    def at_fault(self, reading: Reading, moment: Moment) -> Mapping[str, float] | None:
        """Tensors or layers with what is wrong of each; None where the reading says nothing about them."""

    @abstractmethod
    def alert(self, step: int, found: Mapping[str, float], moment: Moment) -> Alert:
        """Of all tensors that are newly at fault."""


def named(names: Iterable[str]) -> str:
    """A few of them."""
    every = list(names)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


def _is_bias(name: str) -> bool:
    return "bias" in name.rsplit(".", 1)[-1]


class Frozen(OnLooks):
    """Parameters that do not change while others do, or had a gradient earlier and have none now.

    A change of exactly zero over a step, or no gradient, in two looks in a row. Layers that are frozen on purpose
    raise it, too, if that happens after a first look.
    """

    def __init__(self, course: Course | None = None) -> None:
        super().__init__(course)
        self._known: dict[str, None] = {}

    def at_fault(self, reading: Reading, _moment: Moment) -> Mapping[str, float] | None:
        """See :class:`OnLooks`."""
        ratios = reading.kinds.get(RATIO)
        if not ratios or not any(ratio > 0.0 for ratio in ratios.values()):
            return None
        self._known |= dict.fromkeys(ratios)
        return {name: 0.0 for name in self._known if ratios.get(name, 0.0) == 0.0}

    def alert(self, step: int, found: Mapping[str, float], moment: Moment) -> Alert:
        """See :class:`OnLooks`."""
        latest = moment.known.of(RATIO)
        gone = [name for name in found if name not in latest]
        low = list(self._known)[: len(gone)] == gone and len(gone) > 1
        causes = (Cause.DISCONNECTED, Cause.FROZEN) if low else (Cause.FROZEN, Cause.DISCONNECTED)
        why = "has no gradient any more" if gone else "does not change while others do"
        return Alert(
            kind="frozen",
            severity="warning",
            step=step,
            text=f"{named(found)} {why}.",
            advice="If that is not meant: look for requires_grad_(False), detach() or no_grad(), and parameter groups.",
            evidence={f"{RATIO}{name}": latest.get(name) for name in found},
            causes=causes,
            where=tuple(found),
        )


class Vanishing(OnLooks):
    """Gradients that get lost on the way down: more than 8 nats of RMS (3,000 times) below the last tensor's.

    Biases are left out: before a normalisation, and in the keys of attention, their gradient is zero by right.

    In 78 healthy runs of the benchmark's tune half it was 2.9 nats at most, in an embedding that is sparse.

    Source: AutoTrainer's rule (Zhang et al. 2021, ICSE) compares first and last layer at a thousandth *and* an absolute
    1e-4; a thousandth alone is passed by healthy networks with embeddings.
    """

    LEAST = -8.0
    EARLY = 128  # steps; a tensor that lost its gradient later has died, which is another fault

    def __init__(self, course: Course | None = None) -> None:
        super().__init__(course)
        self._sound: set[str] = set()  # had a gradient at the first look
        self._looked = False

    def at_fault(self, reading: Reading, _moment: Moment) -> Mapping[str, float] | None:
        """See :class:`OnLooks`."""
        logs = {n: x for n, x in reading.kinds.get(GRADIENT, {}).items() if not (math.isnan(x) or _is_bias(n))}
        last = next(reversed(logs.values()), math.nan)
        if len(logs) < 2 or not math.isfinite(last):
            return None
        weak = {name: x - last for name, x in logs.items() if x - last < self.LEAST}
        if not self._looked and reading.step < self.EARLY:
            self._looked, self._sound = True, logs.keys() - weak.keys()
        return {name: x for name, x in weak.items() if math.isfinite(x) or name not in self._sound}

    def alert(self, step: int, found: Mapping[str, float], moment: Moment) -> Alert:
        """See :class:`OnLooks`."""
        nats = -max(found.values())
        times = "infinitely many times" if math.isinf(nats) else f"{math.exp(nats):.1g} times or more"
        return Alert(
            kind="vanishing",
            severity="critical",
            step=step,
            text=f"the gradient of {named(found)} is {times} smaller than the last tensor's.",
            advice="Look at initial weights and saturating or dead activations there; add normalisation or skips.",
            evidence={f"{GRADIENT}{name}": moment.known.of(GRADIENT)[name] for name in found},
            causes=(Cause.LR_TOO_HIGH, Cause.WARMUP_MISSING, Cause.VANISHING)
            if moment.first.threw
            else (Cause.VANISHING, Cause.DEAD_UNITS),
            where=tuple(found),
        )


class Explosion(OnLooks):
    """A gradient that has grown by 7 nats (1,000 times) since the tensor's median look, in two looks in a row."""

    GREW = 7.0
    LEAST = 3  # looks before

    def __init__(self, course: Course | None = None) -> None:
        super().__init__(course)
        self._past: dict[str, list[float]] = {}

    def at_fault(self, reading: Reading, _moment: Moment) -> Mapping[str, float] | None:
        """See :class:`OnLooks`."""
        logs = reading.kinds.get(GRADIENT)
        if not logs:
            return None
        found = {}
        for name, x in logs.items():
            past = self._past.setdefault(name, [])
            if len(past) >= self.LEAST and x - statistics.median(past) > self.GREW:
                found[name] = x - statistics.median(past)
            elif math.isfinite(x):
                past.append(x)
                del past[:-64]
        return found

    def alert(self, step: int, found: Mapping[str, float], moment: Moment) -> Alert:
        """See :class:`OnLooks`."""
        return Alert(
            kind="exploding",
            severity="warning",
            step=step,
            text=f"the gradient of {named(found)} has grown {math.exp(min(found.values())):.1g} times or more.",
            advice="Clip the gradient, and look at the normalisation and the learning rate of these layers.",
            evidence={f"{GRADIENT}{name}": moment.known.of(GRADIENT)[name] for name in found},
            causes=(Cause.EXPLODING, Cause.LR_TOO_HIGH),
            where=tuple(found),
        )


class DeadUnits(OnLooks):
    """Layers in which more than 60% of the units answer to no input of a batch, in two looks in a row.

    In 78 healthy runs of the benchmark's tune half, rectified networks that are naturally sparse among them, no layer
    had more than 38%. Counted are units that are silent on every input of the batch, not zeros, half of which a healthy
    ReLU has.

    Units that were silent at the first look were made so, by weights and biases; others were pushed there by steps that
    were too large, of which the first ones are suspected where the learning rate was highest in these.
    """

    once = True
    MOST, FROM_THE_START = 0.6, 0.9
    EARLY = 128  # steps, by which the first look was taken

    def __init__(self, course: Course | None = None) -> None:
        super().__init__(course)
        self._first: dict[str, float] = {}

    def at_fault(self, reading: Reading, _moment: Moment) -> Mapping[str, float] | None:
        """See :class:`OnLooks`."""
        shares = reading.kinds.get("units/dead/")
        if not shares:
            return None
        if not self._first and reading.step < self.EARLY:
            self._first = dict(shares)
        return {layer: share for layer, share in shares.items() if self.MOST < share < math.inf}

    def alert(self, step: int, found: Mapping[str, float], moment: Moment) -> Alert:
        """See :class:`OnLooks`."""
        made = any(self._first.get(layer, 0.0) > self.FROM_THE_START for layer in found)
        if made and not moment.first.threw and not moment.first.fell:
            causes = (Cause.DEAD_UNITS, Cause.VANISHING, Cause.LR_TOO_HIGH)
            said, advice = "from the start", "Look at initial weights and biases, or use an activation that leaks."
        elif moment.first.fell:
            causes = (Cause.WARMUP_MISSING, Cause.LR_TOO_HIGH, Cause.DEAD_UNITS)
            said, advice = "since the learning rate was highest, in the first steps", "Begin again with a warm-up."
        else:
            causes = (Cause.LR_TOO_HIGH, Cause.DEAD_UNITS, Cause.VANISHING)
            said, advice = "by now", "Begin again with a lower learning rate, or use an activation that leaks."
        return Alert(
            kind="dead-units",
            severity="critical",
            step=step,
            text=f"{min(found.values()):.0%} or more of the units of {named(found)} answer to no input, {said}.",
            advice=advice,
            evidence={f"units/dead/{layer}": share for layer, share in found.items()},
            causes=causes,
            where=tuple(found),
            recommender="" if made else "dyntune.suggest_lr",
        )


class EpsTooLarge(OnLooks):
    """Adam's eps takes a tenth or more of the divisor of half of a tensor's entries, in half of all tensors.

    Of all tensors together that have a gradient: rows of an embedding that no batch has met have no second moment, and
    are no fault. Nothing is said once the loss is below a fiftieth of its start: the gradients of a network that has
    learnt everything are small by right. With an eps of 1e-7 or less it is the gradients that are too small.
    """

    once = True
    MOST = 0.5
    LEARNT = 0.02
    USUAL_EPS = 1e-7  # 1e-8 is torch's default, 1e-7 Keras'

    def at_fault(self, reading: Reading, moment: Moment) -> Mapping[str, float] | None:
        """See :class:`OnLooks`."""
        logs = reading.kinds.get(GRADIENT, {})
        shares = {
            n: x
            for n, x in reading.kinds.get("adam/below_eps/", {}).items()
            if math.isfinite(x) and math.isfinite(logs.get(n, 0.0))
        }
        if not shares:
            return None
        if not statistics.median(shares.values()) > self.MOST or moment.first.share < self.LEARNT:
            return {}
        return {n: x for n, x in shares.items() if x > self.MOST}

    def alert(self, step: int, found: Mapping[str, float], moment: Moment) -> Alert:
        """See :class:`OnLooks`."""
        eps = moment.settings.of("eps")
        small = eps <= self.USUAL_EPS
        what = f"eps ({eps:g}) hides" if math.isfinite(eps) else "eps hides"
        return Alert(
            kind="eps-too-large",
            severity="critical",
            step=step,
            text=f"{what} the second moment of {min(found.values()):.0%} or more of the entries of {named(found)}.",
            advice="The gradients are tiny: look at initial weights and saturating activations."
            if small
            else "Make Adam's eps smaller than the gradients: 1e-8 is the default, 1e-15 does no harm in fp32.",
            evidence={f"adam/below_eps/{name}": share for name, share in found.items()},
            causes=(Cause.VANISHING, Cause.EPS_TOO_LARGE) if small else (Cause.EPS_TOO_LARGE, Cause.VANISHING),
            where=tuple(found),
        )


class GroupRate(OnLooks):
    """Tensors whose relative change is 100 times that of the median tensor, or a hundredth, in three looks in a row.

    Tensors that begin at zero change by all of their length at first, so the first two looks do not count.
    """

    looks = 3
    FACTOR = math.log(100.0)

    def __init__(self, course: Course | None = None) -> None:
        super().__init__(course)
        self._count = 0

    def at_fault(self, reading: Reading, _moment: Moment) -> Mapping[str, float] | None:
        """See :class:`OnLooks`."""
        ratios = {n: x for n, x in reading.kinds.get(RATIO, {}).items() if math.isfinite(x) and x > 0.0}
        if len(ratios) < 4:
            return None
        self._count += 1
        middle = math.log(statistics.median(ratios.values()))
        if self._count <= TWICE:
            return {}
        return {name: x for name, x in ratios.items() if abs(math.log(x) - middle) > self.FACTOR}

    def alert(self, step: int, found: Mapping[str, float], moment: Moment) -> Alert:
        """See :class:`OnLooks`."""
        middle = statistics.median(x for x in moment.known.of(RATIO).values() if math.isfinite(x))
        first = next(iter(found.values()))
        return Alert(
            kind="group-rate",
            severity="warning",
            step=step,
            text=f"a step changes {named(found)} by {first:.1g} of its length, and the median tensor by {middle:.1g}.",
            advice="Give the group that these are in the learning rate and weight decay of the others.",
            evidence={f"{RATIO}{name}": ratio for name, ratio in found.items()},
            causes=(Cause.GROUP_LR, Cause.GROUP_WEIGHT_DECAY),
            where=tuple(found),
            recommender="dyntune.suggest_lr",
        )
