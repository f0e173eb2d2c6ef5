"""What a recorded run says of its training in one sentence: stable, at the edge, diverging, or not to be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np

from dyntune.dynamics.edge import EDGE_SHARE, Regime
from dyntune.monitor.ratios import (
    GRADIENT_NORM,
    LEARNING_RATE,
    LOSS,
    Ratio,
    first_column,
    nearest_ratio,
    stability_ratios,
)
from dyntune.monitor.rows import Array, Rows
from dyntune.monitor.run import Run
from dyntune.records import short_number

__all__ = ["State", "Verdict", "verdict"]

# Losses that are averaged (by their median, which a spike does not move) for the loss at the start and now: a tenth of
# the run at either end, and no more than a burst of noise takes.
MOST_LOSSES = 20

# Kinds of alerts that say so: the gradient flips and grows, or the loss has outgrown its start or what was reached.
_DIVERGENCE = ("diverging", "diverged", "loss-rose")
_BELOW = (Regime.SMOOTH, Regime.STATIONARY_NOISE, Regime.DAMPED)


class State(Enum):
    """Where training stands; the value is how to say it."""

    STABLE = "stable"
    EDGE = "at the edge, self-stabilising"
    DIVERGING = "diverging"
    UNDETERMINED = "undetermined"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A state, and why.

    Args:
        state: Where training stands.
        sentence: That with the main evidence.
        evidence: What speaks for it, one sentence each.
        advice: What to do, one sentence each.
        step: The step that the evidence is of; None without any.
    """

    state: State
    sentence: str
    evidence: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    step: int | None = None

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class _Loss:
    """The loss at either end, and since when it is no number."""

    start: float
    now: float
    broken: int | None  # the first step of those that lead to the end without any finite value
    name: str = "loss"

    @property
    def above_start(self) -> bool | None:
        if math.isnan(self.start) or math.isnan(self.now):
            return None
        return self.now > self.start

    def __str__(self) -> str:
        if self.above_start is None:
            return "the loss was not recorded"
        way = "above" if self.above_start else "not above"
        return f"the loss, {short_number(self.now)}, is {way} its start, {short_number(self.start)}"


def verdict(run: Run) -> Verdict:
    """Judge a run by what it recorded.

    A loss that is not finite to the end is divergence (a gradient norm, where no loss was recorded). Else the latest
    regime that bursts of gradients established decides (:func:`dyntune.dynamics.edge.classify`), unless an alert of
    divergence came after it; else the stability ratio: below the edge, less 1.3%, with a loss that is not above its
    start, training is stable; at the edge or above it, with such a loss, it is *at the edge*, where the best learning
    rates train. A ratio alone is never called divergence. Where more steps came after the evidence than before it,
    training stays undetermined.

    Args:
        run: Any run; columns may be missing.

    Returns:
        The verdict; ``UNDETERMINED`` says what is missing.

    Example:
        >>> from dyntune.monitor.run import Row
        >>> run = Run(rows=[Row(step=0, values={"train/loss": 2.0}), Row(step=1, values={"stability/lr_ratio": 0.4})])
        >>> print(verdict(run))
        Stable: the learning rate is at 0.4 of its deterministic stability threshold (step 1).
    """
    loss = _loss(run)
    if loss.broken is not None:
        return _broken(run, loss, loss.broken)
    ratio = nearest_ratio(stability_ratios(run))
    regime = next(reversed(_bursts(run)), None)
    alert = _alert(run, since=-1 if regime is None else regime[0])
    if alert is not None:
        return _dated(run, alert)
    known = regime is not None and regime[1] is not Regime.UNDETERMINED
    if regime is not None and known and _is_recent(run, regime[0]):
        return _by_regime(run, regime, ratio, loss)
    reason = "" if regime is None or known else f"at step {regime[0]:,} {regime[2]}"
    found = _dated(run, _by_ratio(run, ratio, loss, reason))
    if regime is not None and known and found.state is State.UNDETERMINED:
        return _dated(run, _by_regime(run, regime, ratio, loss))
    return found


def _is_recent(run: Run, step: int) -> bool:
    """Whether not more steps came after it than before."""
    return int(run.steps.max()) - step <= step - int(run.steps.min())


def _dated(run: Run, found: Verdict) -> Verdict:
    """What was found, if it is recent enough to speak of the run as it ends."""
    if found.step is None or not len(run) or _is_recent(run, found.step):
        return found
    since = int(run.steps.max()) - found.step
    return Verdict(
        state=State.UNDETERMINED,
        sentence=(
            f"Undetermined: most of the run, {since:,} steps, came after the last measurement of stability, at step "
            f"{found.step:,}."
        ),
        evidence=(f"At that time: {found.sentence}", *found.evidence),
        advice=("Allow the monitor a larger overhead, so that it can measure more often.",),
        step=found.step,
    )


def _loss(run: Run) -> _Loss:
    name = first_column(run, LOSS + GRADIENT_NORM)
    if name is None:
        return _Loss(math.nan, math.nan, None)
    steps, values = run.series(name)
    words = "loss" if name in LOSS else "gradient"
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    finite = np.flatnonzero(np.isfinite(values))
    if values.size and (not finite.size or finite[-1] < values.size - 1):
        return _Loss(math.nan, math.nan, int(steps[finite[-1] + 1 if finite.size else 0]), words)
    if name not in LOSS:
        return _Loss(math.nan, math.nan, None)
    known = values[finite]
    count = max(1, min(MOST_LOSSES, known.size // 10))
    return _Loss(_middle(known[:count]), _middle(known[-count:]), None)


def _middle(values: Array) -> float:
    return float(np.median(values)) if values.size else math.nan


def _bursts(run: Run) -> list[tuple[int, Regime, str]]:
    """(step, regime, reason) of the bursts that say one, in the order of writing."""
    assert isinstance(run.rows, Rows)  # since its __post_init__
    labels = zip(run.steps.tolist(), run.rows.label("regime"), run.rows.label("regime_reason"), strict=True)
    return [(s, Regime[n.upper()], why or "") for s, n, why in labels if n and n.upper() in Regime.__members__]


def _alert(run: Run, *, since: int) -> Verdict | None:
    """The verdict of a critical alert after the latest regime."""
    critical = [e for e in run.events if e.name == "alert" and e.detail.get("severity") == "critical"]
    if not critical or critical[-1].attempt < run.attempts - 1:
        return None
    last = critical[-1]
    if last.detail.get("kind") not in _DIVERGENCE or last.step is None or last.step < since:
        return None
    text = _sentence(str(last.detail.get("text", "an alert without words")))
    return Verdict(
        state=State.DIVERGING,
        sentence=f"Diverging at step {last.step:,}: {text}",
        advice=(
            _sentence(str(last.detail.get("advice") or _advice(Regime.DIVERGING))),
            *_critical_rate(run, last.step),
        ),
        step=last.step,
    )


def _broken(run: Run, loss: _Loss, step: int) -> Verdict:
    onset = _onset(run, step)
    back = step if onset is None else min(step, onset)
    before = "" if onset is None or onset >= step else f", and training has been diverging since step {onset:,}"
    advice = [f"Go back to a checkpoint from before step {back:,} and lower the learning rate, or clip gradients."]
    if not before:
        advice.append("If the ratio was far below 1 until then, look at the batch of that step and at the precision.")
    return Verdict(
        state=State.DIVERGING,
        sentence=f"Diverged: the {loss.name} has not been finite since step {step:,}{before}.",
        advice=(*advice, *_critical_rate(run, step)),
        step=step,
    )


def _onset(run: Run, until: int) -> int | None:
    """The step at which the latest stretch of diverging bursts, or of alerts of it, began."""
    starts = [e.step for e in run.events if e.name == "alert" and e.detail.get("kind") in _DIVERGENCE]
    found = min((step for step in starts if step is not None and step <= until), default=None)
    for step, name, _ in reversed(_bursts(run)):
        if step > until:
            continue
        if name is not Regime.DIVERGING:
            return None if found is not None and found < step else found
        found = step if found is None else min(found, step)
    return found


def _by_regime(run: Run, found: tuple[int, Regime, str], ratio: Ratio | None, loss: _Loss) -> Verdict:
    step, regime, reason = found
    evidence = [_sentence(f"step {step:,}: {reason}")] if reason else []
    evidence += [_sentence(_ratio_words(ratio))] if ratio is not None else []
    evidence += [_sentence(str(loss))]
    state = State.DIVERGING
    if regime is Regime.EDGE:
        state = State.EDGE
    elif regime in _BELOW:
        state = State.STABLE
    advice = (_advice(regime), *(_critical_rate(run, step) if state is State.DIVERGING else ()))
    why = _ratio_words(ratio) if ratio is not None else str(loss)
    lead = {
        Regime.SMOOTH: "Stable: successive gradients agree",
        Regime.STATIONARY_NOISE: "Stable: training moves within its noise",
        Regime.DAMPED: "Stable: steps overshoot and settle",
        Regime.EDGE: "At the edge of stability, and staying there (healthy)",
        Regime.DIVERGING: "Diverging: the gradient flips its sign and grows",
    }[regime]
    return Verdict(state=state, sentence=f"{lead}; {why}.", evidence=tuple(evidence), advice=advice, step=step)


def _by_ratio(run: Run, ratio: Ratio | None, loss: _Loss, reason: str) -> Verdict:
    evidence = [_sentence(f"successive gradients do not settle it: {reason}")] if reason else []
    if ratio is None or ratio.last is None:
        blind = [_sentence(str(e.detail.get("reason", ""))) for e in run.events if e.name == "blind"]
        return Verdict(
            state=State.UNDETERMINED,
            sentence="Undetermined: the run holds no stability ratio.",
            evidence=(*evidence, _sentence(str(loss)), *blind[:2]),
            advice=(
                "Give the monitor the loss function and the batches, or a larger overhead, so that it can measure.",
            ),
        )
    words, step = _ratio_words(ratio), int(ratio.steps[ratio.last])
    evidence += [_sentence(str(loss))]
    value, high = float(ratio.values[ratio.last]), float(ratio.high[ratio.last])
    upper = high if math.isfinite(high) else value
    if upper < EDGE_SHARE and loss.above_start:
        return Verdict(
            state=State.UNDETERMINED,
            sentence=f"Undetermined: {words}, and yet {loss}.",
            evidence=tuple(evidence),
            advice=("Something other than the stability limit raises the loss: look at the alerts and at the data.",),
            step=step,
        )
    if upper < EDGE_SHARE:
        return Verdict(
            state=State.STABLE,
            sentence=f"Stable: {words}.",
            evidence=tuple(evidence),
            advice=("Nothing has to change.",),
            step=step,
        )
    if value < EDGE_SHARE:
        state, sentence, advice = State.UNDETERMINED, f"Undetermined: {words}, with an interval up to the edge.", ""
    elif loss.above_start is False:
        state, sentence, advice = (
            State.EDGE,
            f"At the edge of stability (healthy): {words}; {loss}.",
            _advice(Regime.EDGE),
        )
    else:
        state = State.UNDETERMINED
        sentence = f"Undetermined: {words}, and {loss}; that alone does not tell the edge from divergence."
        advice = "Watch the loss: divergence is a ratio above 1 with a gradient that flips its sign and grows."
    return Verdict(
        state=state,
        sentence=sentence,
        evidence=tuple(evidence),
        advice=(advice,) if advice else (),
        step=step,
    )


def _ratio_words(ratio: Ratio) -> str:
    """Where the learning rate stands, with its interval, threshold and step."""
    at = ratio.last
    if at is None:
        return "no stability ratio was established"
    low, high = float(ratio.low[at]), float(ratio.high[at])
    between = f" ({short_number(low)} .. {short_number(high)})" if math.isfinite(low) and math.isfinite(high) else ""
    of = (
        "its stability threshold along the step"
        if ratio.kind == "along the step"
        else (f"its {ratio.kind} stability threshold")
    )
    value = short_number(float(ratio.values[at]))
    return f"the learning rate is at {value}{between} of {of} (step {int(ratio.steps[at]):,})"


def _critical_rate(run: Run, until: int) -> tuple[str, ...]:
    """The learning rate that would have been at the edge, where curvature was measured, and the one there was."""
    critical = _latest(run, ("curvature/lr_crit",), until)
    if critical is None:
        return ()
    text = f"At the curvature of step {critical[0]:,} the edge is at a learning rate of {short_number(critical[1])}"
    rate = _latest(run, LEARNING_RATE, until)
    return (f"{text}." if rate is None else f"{text}; the rate was {short_number(rate[1])} at step {rate[0]:,}.",)


def _latest(run: Run, names: tuple[str, ...], until: int) -> tuple[int, float] | None:
    """The last number of a column up to a step, with its step."""
    name = first_column(run, names)
    if name is None:
        return None
    steps, values = run.series(name)
    known = np.flatnonzero(np.isfinite(values) & (steps <= until))
    if not known.size:
        return None
    at = known[np.argmax(steps[known])]
    return int(steps[at]), float(values[at])


def _advice(regime: Regime) -> str:
    """What a regime asks for: its value without the name that it begins with."""
    return _sentence(regime.value.partition(": ")[2] or regime.value)


def _sentence(text: str) -> str:
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}" if text else ""
