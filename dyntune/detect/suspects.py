"""What explains a loss that rose or never fell: the mechanisms whose signals are there, the likeliest first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from dyntune.detect.readings import Known
from dyntune.monitor.alerts import Cause

__all__ = ["Onset", "Past", "Signs", "Suspicion", "suspects_of_no_progress", "suspects_of_rise"]

RAISED = 1.5  # times the highest learning rate before: not a schedule that returns to where it was
ABRUPT = 0.5  # share of the whole rise that one block makes
GREW = 3.0  # times the gradient before the rise
WILD = 100.0  # times the start: no confidence of a classifier is that wrong; the numbers that came in were
CONFIDENT = 2.0  # times the start: wrong with confidence, so the network still answers, to another question
DECAYED = 0.1  # of the highest learning rate
APART = 3.0  # between learning rates of groups, and between relative changes of tensors
QUIET = 0.03  # gradient by loss; 39 healthy runs of the benchmark's tune half begin at 0.094 or more
CONSTANT = 1e-3  # relative scatter of a gradient's length that is set by clipping, and not by batches
MOST_DEAD = 0.9  # of a layer's units
TINY = 1e-4  # of a tensor's length a step: a tenth of the usual 1e-3, which moves it by 5% in 512 steps at most
HUGE = 0.05  # of a tensor's length a step: fifty times the usual
EPS_SHARE = 0.5  # of the entries whose second moment eps hides
CONSEQUENCE = 0.5
SMALL_GRADIENT = -10.0  # nats of RMS below the head's: divided by 20,000 on the way
ADVICE: Mapping[Cause, tuple[str, str]] = {
    Cause.LR_TOO_HIGH: ("Go back to a checkpoint from before and lower the learning rate.", "dyntune.suggest_lr"),
    Cause.WARMUP_MISSING: ("Warm the learning rate up over the first steps.", "dyntune.suggest_lr"),
    Cause.LR_TOO_LOW: ("Raise the learning rate.", "dyntune.suggest_lr"),
    Cause.BAD_BATCH: ("Go back to a checkpoint from before and leave out, or repair, the batches from there on.", ""),
    Cause.WRONG_LABELS: ("Look at inputs and targets of a batch side by side: do they belong together?", ""),
    Cause.DEAD_UNITS: ("Begin again with smaller steps or smaller biases, or use an activation that leaks.", ""),
    Cause.VANISHING: ("Look at the initial weights and at saturating activations; add normalisation or skips.", ""),
    Cause.EXPLODING: ("Look at the initial weights and the normalisation of the layers that are named.", ""),
    Cause.EPS_TOO_LARGE: ("Make Adam's eps smaller than the gradients: 1e-8 is the default.", ""),
    Cause.OUTPUT_LOGITS: ("Add a z-loss or weight decay on the output layer.", ""),
    Cause.ATTENTION_LOGITS: ("Normalise queries and keys, or lower the learning rate.", "dyntune.suggest_heads"),
    Cause.GROUP_LR: ("Give the group that is named the learning rate of the others.", "dyntune.suggest_lr"),
}
OTHERWISE = "Look at what changed there: the learning rate, the data, the code that runs from that step on."


@dataclass(frozen=True)
class Past:
    """A block in short."""

    step: int
    level: float
    norm: float
    lr: float
    highest: float


@dataclass(frozen=True)
class Onset:
    """Where in the list of blocks a rise began; `whole`: before the list did."""

    at: int
    whole: bool


@dataclass(frozen=True)
class Signs:
    """What else is known when the loss is judged.

    Args:
        readings: Of single tensors.
        start: Loss at the start of the run.
        highest_lr: Learning rate so far.
        groups: Factor between the learning rates of the first group and of the one that differs most.
    """

    readings: Known
    _: KW_ONLY
    start: float
    highest_lr: float
    groups: float


@dataclass(frozen=True)
class Suspicion:
    """Causes, the likeliest first; `proven`: the first one's own signal is there, and not only its shape."""

    causes: tuple[Cause, ...] = ()
    text: str = ""
    where: tuple[str, ...] = ()
    evidence: Mapping[str, float | str | None] = field(default_factory=dict)
    proven: bool = False

    @property
    def advice(self) -> str:
        """Of the likeliest cause."""
        return ADVICE[self.causes[0]][0] if self.causes and self.causes[0] in ADVICE else OTHERWISE

    @property
    def recommender(self) -> str:
        """Likewise."""
        return ADVICE[self.causes[0]][1] if self.causes and self.causes[0] in ADVICE else ""


class _Suspects:
    """Collects them; those with a signal of their own stand before those by shape."""

    def __init__(self) -> None:
        self._found: list[tuple[float, Cause, str, tuple[str, ...], dict[str, float | str | None]]] = []

    def add(self, weight: float, cause: Cause, text: str, *, where: Sequence[str] = (), **evidence: float) -> None:
        self._found.append((weight, cause, text, tuple(where), dict(evidence)))

    def told(self) -> Suspicion:
        if not self._found:
            return Suspicion()
        ranked = sorted(self._found, key=lambda item: -item[0])
        weight, _, text, where, evidence = ranked[0]
        causes = tuple(dict.fromkeys(cause for _, cause, *_ in ranked))
        return Suspicion(causes, text, where, evidence, proven=weight >= 1.0)


def suspects_of_rise(signs: Signs, past: Sequence[Past], onset: Onset) -> Suspicion:
    """Why the loss went up.

    Args:
        signs: What else is known.
        past: Blocks, the present one last.
        onset: Where it began.
    """
    suspects, start = _Suspects(), signs.start
    before, after = past[: onset.at], past[onset.at :]
    _lr_raised(suspects, before, after)
    if onset.whole:
        _from_looks(suspects, signs)
        _from_the_first_steps(suspects, "It has risen from the first steps on.")
        return suspects.told()
    ground = before[-1].level if before else start
    rise = max(block.level for block in after) - ground
    abrupt = max(block.level for block in after[:2]) - ground > ABRUPT * rise
    peak = max(block.highest for block in after[:2])
    grown = _ratio([block.norm for block in after[-3:]], [block.norm for block in before[-4:]])
    at_start = abs(after[-1].level - start) < 0.1 * abs(start)
    # What a jump leaves behind, silent units and gradients that are gone, is no cause of it.
    _from_looks(suspects, signs, factor=CONSEQUENCE if abrupt else 1.0)
    if abrupt:
        _jumped(suspects, peak=peak, start=start, at_start=at_start)
        if grown > GREW:
            suspects.add(0.85, Cause.ACCUMULATED_GRADIENTS, f"The gradient is {grown:.3g} times as long.", grown=grown)
    elif grown > GREW:
        text = f"It rises step by step, and the gradient is {grown:.3g} times as long."
        suspects.add(0.76, Cause.OUTPUT_LOGITS, text, grown=grown)
        suspects.add(0.74, Cause.ACCUMULATED_GRADIENTS, text, grown=grown)
    suspects.add(0.7 if not abrupt else 0.3, Cause.LR_TOO_HIGH, "" if abrupt else "It rises step by step.")
    suspects.add(0.2, Cause.BAD_BATCH, "")
    return suspects.told()


def suspects_of_no_progress(signs: Signs, past: Sequence[Past]) -> Suspicion:
    """Why the loss never fell.

    Args:
        signs: What else is known.
        past: Blocks, the present one last.
    """
    suspects, start, highest_lr = _Suspects(), signs.start, signs.highest_lr
    if max(block.highest for block in past[:2]) > CONFIDENT * abs(start):
        _from_the_first_steps(suspects, "The first steps threw it up.", weight=1.5)
        if highest_lr * DECAYED > past[-1].lr:
            text = f"The first steps, at {highest_lr / past[-1].lr:.3g} times the present learning rate, threw it up."
            suspects.add(1.6, Cause.WARMUP_MISSING, text, highest_lr=highest_lr)
    elif highest_lr * DECAYED > past[-1].lr:
        now = past[-1].lr / highest_lr
        suspects.add(1.1, Cause.LR_TOO_LOW, f"The learning rate is {now:.1g} of its highest value.", left=now)
    _from_looks(suspects, signs)
    _from_updates(suspects, signs.readings, past)
    suspects.add(0.4, Cause.LR_TOO_HIGH, "")
    suspects.add(0.3, Cause.WRONG_LOSS, "")
    suspects.add(0.2, Cause.WRONG_LABELS, "")
    found = suspects.told()
    if found.proven:
        return found
    # Nothing that can be seen is wrong with the steps: what they are made from is left.
    causes = (Cause.WRONG_LABELS, *(cause for cause in found.causes if cause != Cause.WRONG_LABELS))
    return Suspicion(causes, "Steps, gradients and units are as they should be.", found.where, found.evidence)


def _jumped(suspects: _Suspects, *, peak: float, start: float, at_start: bool) -> None:
    """Within a few steps, to `peak`."""
    said = f"It jumped to {peak:.3g} at once"
    if peak > WILD * abs(start):
        suspects.add(0.9, Cause.BAD_BATCH, f"{said}, as on inputs of another size.", peak=peak)
        suspects.add(0.8, Cause.EXPLODING, f"{said}.", peak=peak)
    elif at_start and peak < CONFIDENT * abs(start):
        suspects.add(
            0.8, Cause.DEAD_UNITS, "It jumped to where it began and no further: the network has fallen silent."
        )
        suspects.add(0.6, Cause.WRONG_LABELS, "It jumped to where it began.")
    else:
        suspects.add(0.8, Cause.WRONG_LABELS, f"{said}: the answers are certain, and wrong.", peak=peak)
        suspects.add(0.75, Cause.BAD_BATCH, f"{said}.", peak=peak)


def _from_the_first_steps(suspects: _Suspects, text: str, *, weight: float = 0.8) -> None:
    suspects.add(weight, Cause.LR_TOO_HIGH, text)
    suspects.add(0.9 * weight, Cause.WARMUP_MISSING, text)
    suspects.add(0.6 * weight, Cause.EXPLODING, text)


def _lr_raised(suspects: _Suspects, before: Sequence[Past], after: Sequence[Past]) -> None:
    """A learning rate above all that were used before, just before the rise or with it."""
    earlier = [block.lr for block in before[:-2] if not math.isnan(block.lr)]
    now = [block.lr for block in (*before[-2:], *after[:2]) if not math.isnan(block.lr)]
    if earlier and now and max(now) > RAISED * max(earlier):
        ratio = max(now) / max(earlier)
        suspects.add(2.0, Cause.LR_TOO_HIGH, f"The learning rate was raised {ratio:.3g} times just then.", raised=ratio)


def _from_looks(suspects: _Suspects, signs: Signs, *, factor: float = 1.0) -> None:
    """What the latest looks at single tensors and layers show."""
    readings = signs.readings
    if abs(math.log(signs.groups)) > math.log(APART):
        ratios = {name: x for name, x in readings.of("update/ratio/").items() if math.isfinite(x) and x > 0.0}
        middle = statistics.median(ratios.values()) if ratios else math.nan
        where = [name for name, x in ratios.items() if abs(math.log(x / middle)) > math.log(APART)]
        text = f"The learning rate of a parameter group is {signs.groups:.3g} times that of the first."
        suspects.add(1.7, Cause.GROUP_LR, text, where=where, groups=signs.groups)
    dead = [layer for layer, share in readings.of("units/dead/").items() if share > MOST_DEAD]
    if dead:
        share = max(readings.of("units/dead/").values())
        suspects.add(
            1.4 * factor, Cause.DEAD_UNITS, f"{share:.0%} of the units of {dead[0]} answer to no input.", where=dead
        )
    hidden = [share for share in readings.of("adam/below_eps/").values() if math.isfinite(share)]
    if hidden and not dead and statistics.median(hidden) > EPS_SHARE:
        share = statistics.median(hidden)
        suspects.add(
            1.3 * factor,
            Cause.EPS_TOO_LARGE,
            f"eps hides the second moment of {share:.0%} of the entries.",
            share=share,
        )
    rms = {name: x for name, x in readings.of("grad/log_rms/").items() if not math.isnan(x)}
    last = next(reversed(rms.values()), math.nan)
    weak = [name for name, x in rms.items() if x - last < SMALL_GRADIENT]
    if weak and math.isfinite(last):
        text = f"The gradient of {weak[0]} is {_times(last - rms[weak[0]])} smaller than the last layer's."
        suspects.add(1.2 * factor, Cause.VANISHING, text, where=weak)


def _from_updates(suspects: _Suspects, readings: Known, past: Sequence[Past]) -> None:
    """What the size of updates shows."""
    ratios = [r for r in readings.of("update/ratio/").values() if math.isfinite(r) and r > 0.0]
    middle = statistics.median(ratios) if ratios else math.nan
    text = f"An update changes the median tensor by {middle:.1g} of its length."
    if middle < TINY:
        norms = [block.norm for block in past if not math.isnan(block.norm)]
        if len(norms) > 2 and max(norms) - min(norms) < CONSTANT * max(norms):
            said = f"{text} Every gradient is {norms[-1]:.3g} long: clipping makes it that."
            suspects.add(1.3, Cause.CLIP_TOO_LOW, said, norm=norms[-1])
        if norms and statistics.median(norms) < QUIET * abs(past[-1].level):
            said = f"{text} The gradient is {norms[-1] / abs(past[-1].level):.1g} of the loss."
            suspects.add(1.2, Cause.WRONG_LOSS, said, norm=norms[-1])
        suspects.add(1.0, Cause.LR_TOO_LOW, text, update_ratio=middle)
        suspects.add(0.7, Cause.LOSS_SCALE, text, update_ratio=middle)
    if middle > HUGE:
        suspects.add(1.0, Cause.LR_TOO_HIGH, text, update_ratio=middle)
        suspects.add(0.9, Cause.LOSS_SCALE, text, update_ratio=middle)


def _ratio(late: Sequence[float], early: Sequence[float]) -> float:
    """Of medians; NaN where one of them has no number."""
    a, b = ([x for x in numbers if not math.isnan(x)] for numbers in (late, early))
    return statistics.median(a) / statistics.median(b) if a and b and statistics.median(b) > 0.0 else math.nan


def _times(nats: float) -> str:
    return "infinitely many times" if math.isinf(nats) else f"{math.exp(nats):.1g} times"
