"""A beta2 from the record of a training, at no cost: :func:`suggest_beta2_from_run`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dyntune.dynamics.ema_bank import STALE
from dyntune.dynamics.ema_reading import share_interval
from dyntune.errors import InvalidArgumentError
from dyntune.monitor.monitor import Monitor
from dyntune.monitor.ratios import LEARNING_RATE, LOSS, first_column
from dyntune.monitor.rows import Array, Rows
from dyntune.monitor.run import Column, Run
from dyntune.monitor.settings import NAMED
from dyntune.records import Estimate, Recommendation, Status, short_number
from dyntune.suggest.beta2_rule import HALF_LIFE, MEMORIES, Beta2Evidence, beta2_rule

__all__ = ["suggest_beta2_from_run"]

BETA1, BETA2 = "optimizer/beta1", "optimizer/beta2"
STALENESS, LOOKED, NOISE = "adam/staleness/", "grad/log_rms/", "grad/noise_scale"
# Steps within which spikes of the loss followed: Wortsman et al. (2023), arXiv:2304.13013, section 3.4.
LEAD = 8
# What counts as a spike: six deviations above the losses of the 128 steps before, as OLMo-core's stability monitor has
# it, with median and MAD (1.4826 of it are one deviation of normal noise) since spikes stay in the window.
WINDOW, SIGMAS, MAD_TO_SD = 128, 6.0, 1.4826
LEAST = 32  # losses before a look; the error of their median is twice that of 128
SHARE, LARGEST = "share of tensors above 2.3", "largest staleness"
NO_SCORE = (
    "which beta2 predicts squared gradients best is not in a record: it takes single coordinates at every step "
    "(suggest_beta2 follows some in a pilot)"
)


def suggest_beta2_from_run(
    run: Run | Monitor,
    *,
    num_steps: int | None = None,
    tokens_per_step: float | None = None,
    half_life: float = HALF_LIFE,
    known: tuple[float, float] | None = None,
    weight_rms: float | None = None,
) -> Recommendation:
    """Suggest Adam's beta2 (RMSprop's alpha) from what a monitor has recorded of a training.

    The value is that of :func:`dyntune.suggest_beta2`: with `weight_rms` from the highest recorded learning rate, and
    else from what is known beforehand; within ``beta1 < sqrt(beta2)`` and a memory of at most a third of the training.
    What the record adds is said in ``checks`` and ``evidence`` and moves nothing: how often gradients outgrew the
    second moment at the present beta2 (staleness above 2.3, a threshold that has not been calibrated), whether spikes
    of the loss followed, and the gradient noise scale. Which beta2 predicts squared gradients best cannot be had from a
    record: it takes single coordinates at every step, which :func:`dyntune.suggest_beta2` follows in a pilot.

    Args:
        run: A run that a :class:`dyntune.Monitor` recorded, or the monitor itself.
        num_steps: Optimizer steps of the training to come; None if unknown (the steps made so far do not say it).
        tokens_per_step: Tokens of one optimizer step, over all processes and accumulated batches; None for data without
            tokens.
        half_life: Half-life of the second moment in tokens, default ten million.
        known: A beta2 that is known to be good, and this training's batch size over that one's. Goes before tokens.
        weight_rms: Root mean square of the weights, vectors left out, which a record does not have; None if unknown.

    Returns:
        The recommendation for the first parameter group; groups with a beta1 or beta2 of their own are in its evidence.
        The status is never better than UNCERTAIN.

    Raises:
        InvalidArgumentError: No run, one without a recorded beta2 in (0, 1), or a number outside its range.

    Cost:
        No gradient; one pass over the recorded looks.
    Assumes:
        The looks speak for the steps between them. Their staleness has the gradient of its own step in the second
        moment, and so cannot exceed ``1 / sqrt(1 - beta2)``.
    Source:
        Wortsman et al. (2023), arXiv:2304.13013 (staleness, and spikes 1 to 8 steps after it); see also
        ``Recommendation.sources``.

    Example:
        >>> from dyntune.monitor.run import Row
        >>> told = Row(step=0, values={"optimizer/beta1": 0.9, "optimizer/beta2": 0.999})
        >>> rec = suggest_beta2_from_run(Run(rows=(told,)), num_steps=600)
        >>> rec.value, rec.evidence["active bound"]
        (0.995, 'a third of the training')
    """
    record = run.run if isinstance(run, Monitor) else run
    if not isinstance(record, Run):
        raise InvalidArgumentError(
            f"run is a {type(run).__name__}: what is read here is a Run or a Monitor. A file is read by "
            "dyntune.load_run; a model is measured by dyntune.suggest_beta2."
        )
    groups = _groups(record)
    settings = Beta2Evidence(
        present=0.5,
        beta1=None,
        num_steps=num_steps,
        tokens_per_step=tokens_per_step,
        tokens=half_life,
        known=known,
        lr=_highest_rate(record),
        weight_rms=weight_rms,
    )
    looks = _looks(record)
    noise = _noise(record)
    common = [*_length(record, groups[0]), _spikes(record, looks), _said(noise), NO_SCORE]
    found = [_recommend(settings, group, looks, noise, tuple(filter(None, common)), record) for group in groups]
    others: dict[str, Estimate | float | str | None] = {}
    for group, rec in zip(groups[1:], found[1:], strict=True):
        others[f"group {group.index}"] = rec.value
        for name in ("present value", "active bound", SHARE, LARGEST):
            if name in rec.evidence:
                others[f"group {group.index}, {name}"] = rec.evidence[name]
    return replace(found[0], evidence={**found[0].evidence, **others}) if others else found[0]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """One parameter group as the record has it last.

    Args:
        index: In the optimizer.
        beta1: None for RMSprop.
        beta2: Or alpha.
        since: First step at which it had this beta2.
        tensors: Names of its parameters; None for all but those `elsewhere`.
        elsewhere: Names of parameters of groups with a beta1 or beta2 of their own.
        apart: Whether the record says whose each parameter is.
    """

    index: int
    beta1: float | None
    beta2: float
    since: int
    tensors: frozenset[str] | None
    elsewhere: frozenset[str]
    apart: bool


@dataclass(frozen=True, kw_only=True)
class _Looks:
    """Staleness at the steps that were looked at tensor by tensor.

    Args:
        steps: Shape (looks,), ascending.
        names: Of the tensors.
        values: Shape (looks, tensors); NaN where there is none.
    """

    steps: NDArray[np.int64]
    names: tuple[str, ...]
    values: Array


def _groups(run: Run) -> list[_Group]:
    """The first group, and those whose beta1 or beta2 is another."""
    # Settings are told together, in one row for each change: what it lacks of a group is as in the first one.
    rows = Rows.of(run.rows)
    told = rows.where(rows.has(BETA2))
    if not len(told):
        raise InvalidArgumentError(
            f"the run has no column {BETA2!r}: there is no beta2 to judge. A Monitor records betas, or RMSprop's "
            "alpha, that are plain numbers (of tensors it does not: reading them would wait for the device). "
            "suggest_beta2 takes the model and the optimizer instead."
        )
    own = [re.fullmatch(r"optimizer/beta[12]/(\d{1,6})", name) for name in told.names if told.has(name)[-1]]
    others = sorted({int(match[1]) for match in own if match} - {0})
    tensors = {index: _tensors(rows, index) for index in others}
    elsewhere = frozenset().union(*(names or frozenset() for names in tensors.values()))
    apart = all(tensors.values())
    groups = []
    for index in (0, *others):
        betas = _of_group(told, BETA2, index)
        beta2 = float(betas[-1])
        if not 0 < beta2 < 1:
            raise InvalidArgumentError(
                f"the run says {BETA2}={beta2} of parameter group {index}: the factor of a running average lies "
                "between 0 and 1."
            )
        changed = np.flatnonzero(betas != beta2)
        groups.append(
            _Group(
                index=index,
                beta1=float(_of_group(told, BETA1, index)[-1]) if BETA1 in told.names else None,
                beta2=beta2,
                since=int(told.steps[changed[-1] + 1 if changed.size else 0]),
                tensors=(tensors[index] if index else None) if apart else None,
                elsewhere=elsewhere if apart and not index else frozenset(),
                apart=apart,
            )
        )
    return groups


def _of_group(told: Rows, name: str, index: int) -> Array:
    first = told.column(name)
    return np.where(told.has(f"{name}/{index}"), told.column(f"{name}/{index}"), first) if index else first


def _tensors(rows: Rows, index: int) -> frozenset[str] | None:
    """Names of a group's parameters; None where the record does not have all of them."""
    said = [text for text in rows.label(f"group/{index}") if text]
    names = frozenset(said[-1].split("\n")) if said else frozenset()
    return names if 0 < len(names) < NAMED else None


def _looks(run: Run) -> _Looks:
    rows = Rows.of(run.rows)
    columns = [name for name in run.names if name.startswith(STALENESS)]
    looked = np.zeros(len(rows), dtype=np.bool_)
    for name in columns:
        looked |= rows.has(name)
    order = np.argsort(rows.steps[looked], kind="stable")
    values = [rows.column(name)[looked][order] for name in columns]
    return _Looks(
        steps=rows.steps[looked][order],
        names=tuple(name.removeprefix(STALENESS) for name in columns),
        values=np.stack(values, axis=1) if values else np.zeros((0, 0)),
    )


def _recommend(
    settings: Beta2Evidence,
    group: _Group,
    looks: _Looks,
    noise: Estimate | None,
    common: tuple[str, ...],
    run: Run,
) -> Recommendation:
    measured, said = _stale(group, looks, looked=any(name.startswith(LOOKED) for name in run.names))
    if noise is not None:
        measured["gradient noise scale"] = noise
    measured["steps so far"] = float(run.steps.max() + 1)
    found = beta2_rule(
        replace(
            settings,
            present=group.beta2,
            beta1=group.beta1,
            knob="alpha" if group.beta1 is None else "beta2",
            checks=(common[0], said, *common[1:]),
        )
    )
    return replace(found, evidence={**found.evidence, **measured}, series=_over_time(group, looks))


def _of_tensors(group: _Group, looks: _Looks) -> tuple[NDArray[np.int64], Array]:
    """Steps, and the staleness of the group's tensors at those that have any."""
    wanted = [
        name in group.tensors if group.tensors is not None else name not in group.elsewhere for name in looks.names
    ]
    values = looks.values[:, wanted]
    some = (~np.isnan(values)).any(axis=1)
    return looks.steps[some], values[some]


def _over_time(group: _Group, looks: _Looks) -> dict[str, tuple[float, ...]]:
    """Largest and median staleness of the group's tensors at every look, for the plot."""
    steps, values = _of_tensors(group, looks)
    if not values.size:
        return {}
    return {
        "staleness_step": tuple(float(step) for step in steps),
        "staleness_largest": tuple(np.nanmax(values, axis=1).tolist()),
        "staleness_median": tuple(np.nanmedian(values, axis=1).tolist()),
    }


def _stale(group: _Group, looks: _Looks, *, looked: bool) -> tuple[dict[str, Estimate | float | str | None], str]:
    """How often the group's tensors were stale at its present beta2: for the evidence, and in words."""
    if not looks.names:
        return {}, (
            "tensors were looked at and had no staleness: the optimizer keeps no second moment of every entry, or not "
            "as Adam and RMSprop do, and its beta2 may be another thing"
            if looked
            else "no tensor was looked at: nothing is known of staleness"
        )
    ceiling = 1 / math.sqrt(1 - group.beta2)
    if ceiling <= STALE:
        return {}, (
            f"at {group.beta2:.4g} staleness cannot exceed {ceiling:.3g}, whose step's gradient is in the second "
            f"moment: a threshold of {STALE} says nothing"
        )
    steps, values = _of_tensors(group, looks)
    values = values[steps >= group.since]
    if not values.size:
        return {}, f"no look at its tensors since step {group.since}, when {group.beta2:.4g} was set"
    known = ~np.isnan(values)
    pairs, above = known.sum(axis=1), (values > STALE).sum(axis=1)
    share, count = float(above.sum() / pairs.sum()), len(values)
    rest = above - share * pairs  # of a ratio of sums over looks
    spread = math.sqrt(float((rest**2).sum()) * count / max(1, count - 1)) / float(pairs.sum())
    low, high = share_interval(share, int(pairs.sum()), spread=spread, together=float(pairs.mean()))
    largest = float(values[known].max())
    estimate = Estimate(
        value=share,
        low=low,
        high=high,
        level=0.95,
        unit="1",
        method=f"{int(above.sum())} of {int(pairs.sum())} tensors in {count} looks at {group.beta2:.4g}, looks taken "
        "as independent",
        covers="sampling",
        status=Status.UNCERTAIN,
        reason=f"neither the threshold {STALE} nor a share that is too much has been calibrated",
    )
    of, looks_of = "" if group.apart else " of all groups", "look" if count == 1 else "looks"
    said = (
        f"staleness at {group.beta2:.4g}: above {STALE} in {100 * share:.3g}% ({100 * low:.3g} .. {100 * high:.3g}) of "
        f"tensors{of} in {count} {looks_of}, at most {short_number(largest)}; that threshold is not calibrated and "
        "moves nothing"
    )
    return {SHARE: estimate, LARGEST: largest}, said


def _length(run: Run, group: _Group) -> list[str]:
    steps, memory = int(run.steps.max()) + 1, 1 / (1 - group.beta2)
    found = [f"read from a record of {steps} steps, {len(run)} rows; nothing was measured for this"]
    if steps < MEMORIES * memory:
        found.append(
            f"{steps} steps are {short_number(steps / memory, 2)} memories of {short_number(memory)} steps: so far the "
            "second moment is more a mean of all steps than a running average"
        )
    return found


def _spikes(run: Run, looks: _Looks) -> str:
    """Whether spikes of the loss followed high staleness, in words; empty where nothing can be said."""
    name = first_column(run, LOSS)
    if name is None or not looks.names:
        return ""
    at, losses = run.series(name)
    order = np.argsort(at, kind="stable")
    at, losses = at[order], losses[order]
    counts = {True: [0, 0], False: [0, 0]}  # looks, and those of them that a spike followed
    for step, row in zip(looks.steps.tolist(), looks.values, strict=True):
        if np.isnan(row).all():
            continue
        first, end = np.searchsorted(at, [step + 1, step + LEAD + 1]).tolist()
        before = losses[max(0, first - WINDOW) : first]
        before = before[np.isfinite(before)]
        if end - first < LEAD or len(before) < LEAST:
            continue
        level = float(np.median(before))
        scale = MAD_TO_SD * float(np.median(np.abs(before - level)))
        after = losses[first:end]
        spiked = bool((~np.isfinite(after) | (after > level + SIGMAS * scale)).any())
        count = counts[bool(np.nanmax(row) > STALE)]
        count[0] += 1
        count[1] += spiked
    (stale, hits), (fresh, others) = counts[True], counts[False]
    if not stale:
        return f"no look above {STALE} has the losses around it that would show whether a spike followed"
    return (
        f"a spike of the loss came within {LEAD} steps after {hits} of {stale} looks above {STALE}, and after {others} "
        f"of {fresh} others"
    )


def _highest_rate(run: Run) -> float | None:
    """Of the first group; None where none was recorded."""
    name = first_column(run, LEARNING_RATE)
    rates = run.series(name)[1] if name is not None else np.array([])
    rates = rates[np.isfinite(rates) & (rates > 0)]
    return float(rates.max()) if rates.size else None


def _noise(run: Run) -> Estimate | None:
    """The last gradient noise scale; None where none was recorded."""
    if NOISE not in run:
        return None
    values = run.series(NOISE)[1]
    low, high = run.interval(NOISE)
    column = run.columns.get(NOISE, Column(name=NOISE))
    known = np.flatnonzero(np.isfinite(values) & (values > 0))
    if not known.size:
        rows = Rows.of(run.rows)
        status = rows[int(np.flatnonzero(rows.has(NOISE))[-1])].status.get(NOISE)
        reason = status[1] if status and status[1] else "no positive number was recorded"
        return Estimate.refused(reason, unit="rows", method="as recorded")
    last = known[-1]
    value = float(values[last])
    ends = (float(low[last]), float(high[last]))
    if not ends[0] <= value <= ends[1]:  # without an interval, or with one that is none
        ends = (-math.inf, math.inf)
    bounded = ends != (-math.inf, math.inf)
    return Estimate(
        value=value,
        low=ends[0],
        high=ends[1],
        level=column.level if bounded else None,
        unit=column.unit or "rows",
        method=f"as recorded at step {run.series(NOISE)[0][last]}",
        covers="sampling",
        status=Status.OK if bounded else Status.UNCERTAIN,
        reason="" if bounded else "recorded without an interval",
    )


def _said(noise: Estimate | None) -> str:
    if noise is not None and noise.value is None:
        return f"gradient noise scale not established: {noise.reason}"
    if noise is None:
        return "the gradient noise scale was not recorded: a Monitor with the loss measures it from half-batches"
    return f"gradient noise scale: {noise}; it moves nothing"
