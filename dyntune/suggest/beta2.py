"""A beta2 from what is known beforehand, bounded by a short pilot: :func:`suggest_beta2`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dyntune.dynamics.ema_bank import STALE
from dyntune.dynamics.ema_reading import BankReading, read_bank
from dyntune.dynamics.trace import Correlogram, trace_correlograms
from dyntune.errors import InvalidArgumentError
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.pilot.optimizers import OptimizerLike
from dyntune.pilot.probe import MIN_GRADIENTS
from dyntune.pilot.twin import FORWARD_COST, Training, Twin
from dyntune.records import Estimate, Recommendation
from dyntune.suggest.beta2_decay import DECAY, as_exponent, check_length, last_factor
from dyntune.suggest.beta2_pilot import Followed, follow
from dyntune.suggest.beta2_probe import check_probe, longest_probe
from dyntune.suggest.beta2_rule import HALF_LIFE, TOLERANCE, Beta2Evidence, beta2_rule
from dyntune.suggest.beta2_trial import probe_beta2
from dyntune.suggest.lr import num_drawn
from dyntune.suggest.progress import ProgressLike, reporting

__all__ = ["suggest_beta2"]

# Optimizers with a running average of squared gradients, and what they call its factor.
KNOBS: Mapping[type[torch.optim.Optimizer], str] = {
    torch.optim.Adam: "beta2",
    torch.optim.AdamW: "beta2",
    torch.optim.NAdam: "beta2",
    torch.optim.RMSprop: "alpha",
    torch.optim.Adafactor: DECAY,
}


def suggest_beta2(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    optimizer: OptimizerLike,
    lr: float | None = None,
    criterion: Criterion | None = None,
    num_steps: int | None = None,
    tokens_per_step: float | None = None,
    half_life: float = HALF_LIFE,
    known: tuple[float, float] | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    max_gradients: int = 200,
    probe: int | None = None,
    seed: int = 0,
    progress: ProgressLike = None,
    strict: bool = False,
) -> Recommendation:
    """Suggest Adam's beta2 (RMSprop's alpha), with what bounds it and what was measured of it.

    The value is ``1 - lr / (20 R)``, with R the root mean square of the weights: Adam moves a weight by at most about
    lr a step, and so by at most 20 R within the memory. A good value at another batch size that the user knows goes
    before it, and a half-life in tokens where that is shorter. Bounds move it: ``beta1 < sqrt(beta2)``, a memory of at
    most a third of the training, and, where the pilot identifies it, the range that predicts squared gradients within
    0.1 nats of the best. The pilot trains a *twin* (cloned parameters, an optimizer rebuilt from the user's type,
    groups and state) at that learning rate. The pure rule is ``dyntune.suggest.beta2_rule.beta2_rule``.

    What was judged, by training at eight values of beta2, is on the results page on beta2. The pilot's measurements
    seldom move the value. The beta2 that predicts squared gradients best was not the one with the lowest loss on a
    small network (0.98 to 0.99, and 0.9999): that is why it is a bound only. And it binds rarely: it takes a stretch
    without a trend that is fifty times as long as the gradients' scale remembers, which a pilot of 200 steps next to
    never is. The result says which bound decided.

    The user's model, optimizer, gradients, buffers and random states are bit-identical afterwards.

    Args:
        model: As for :func:`dyntune.suggest_lr`.
        batches: As for :func:`dyntune.suggest_lr`; of the size that will be used.
        loss_fn: As for :func:`dyntune.suggest_lr`.
        optimizer: A torch Adam, AdamW, NAdam, RMSprop or Adafactor on the model's parameters, a function
            ``params -> Optimizer``, or ``"adam"`` or ``"adamw"`` with `lr`.
        lr: Learning rate of the training to come at its highest, and of the pilot; default the optimizer's own. The
            other groups' keep their ratio to the first's.
        criterion: As for :func:`dyntune.suggest_lr`.
        num_steps: Optimizer steps of the training to come. Adafactor needs it: its ``beta2_decay`` c is suggested so
            that the last step's factor, ``1 - num_steps^c``, is the one that was found.
        tokens_per_step: Tokens of one optimizer step, over all processes and accumulated batches; None for data without
            tokens.
        half_life: Half-life of the second moment in tokens, default ten million.
        known: A beta2 that is known to be good, and this training's batch size over that one's. Goes before tokens.
        clip_norm: As for :func:`dyntune.suggest_lr`; gradients are seen as clipped.
        accumulate: As for :func:`dyntune.suggest_lr`.
        autocast: As for :func:`dyntune.suggest_lr`.
        max_gradients: Budget of the pilot in gradient-equivalents, at least 60 times `accumulate`; a step of the pilot
            costs one for each accumulated batch.
        probe: Gradient-equivalents for short trainings from here with the suggested value, the present one and those of
            a tenth and ten times the memory, as far as bounds admit them: the same batches and masks for all, five
            orders. Another value is taken if the 95% interval of its paired difference of last losses, for all
            comparisons at once, lies below zero. Memories above a third of the steps are not told apart. Groups with
            the first one's factor take part, others keep theirs. None for no probe.
        seed: Seed of dropout, of the sampled coordinates and of the bootstrap.
        progress: As for :func:`dyntune.suggest_lr`.
        strict: Raise when the status is not OK.

    Returns:
        The recommendation for the first parameter group; other groups' values are in its evidence. The range is half to
        twice the path where that decided, and else what no bound excludes. OK for Adam and AdamW with beta1 = 0.9 at
        learning rates over R that were judged, UNCERTAIN otherwise.

    Raises:
        InvalidArgumentError: An optimizer without a running average of squared gradients, a name without `lr`, or a
            number outside its range.
        OptimizerMismatchError: The optimizer holds other parameters than the model.
        DyntuneError: As :func:`dyntune.hessian`.
        RefusedError, NotConvergedError: With ``strict=True``.

    Cost:
        `max_gradients`, and `probe`; memory of one twin and of some ten million numbers per parameter group.
    Assumes:
        The pilot's steps speak for the training to come.
    Source:
        See ``Recommendation.sources``.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> g = torch.Generator().manual_seed(0)
        >>> data = [(torch.randn(16, 4, generator=g), torch.randn(16, 1, generator=g)) for _ in range(8)]
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> rec = suggest_beta2(
        ...     model, data, optimizer=optimizer, criterion=torch.nn.MSELoss(), num_steps=600, max_gradients=60
        ... )
        >>> rec.value, rec.evidence["active bound"], rec.status.name
        (0.995, 'a third of the training', 'OK')
    """
    _check(optimizer, lr, accumulate, clip_norm, max_gradients)
    # Raises before anything is measured.
    settings = Beta2Evidence(
        present=0.5, beta1=None, num_steps=num_steps, tokens_per_step=tokens_per_step, tokens=half_life, known=known
    )
    beta2_rule(settings)
    if probe is not None:
        check_probe(probe, accumulate)
    training = Training(optimizer, clip_norm=clip_norm, accumulate=accumulate, autocast=autocast)
    objective = Objective(
        model,
        batches,
        loss_fn,
        criterion=criterion,
        num_batches=num_drawn(max(max_gradients, longest_probe(probe))),
        num_checked=1,
        widen=False,  # as for suggest_lr: what is rounded in training is rounded here
        seed=seed,
    )
    with reporting(progress, limit=max_gradients) as (meter, tell), objective.measuring() as buffers:
        meter.charge(FORWARD_COST)
        twin = Twin(objective, training, buffers, meter, seed=seed)
        name = KNOBS[_kind(twin.optimizer)]
        if name == DECAY:
            check_length(num_steps)
            if probe is not None:
                raise InvalidArgumentError(
                    f"probe={probe} with Adafactor, whose beta2 grows along training: a probe of its start says "
                    "nothing of its end. Give probe=None."
                )
        sizes = _weight_rms(twin.optimizer)
        first, fresh = dict(twin.optimizer.param_groups[0]), not twin.optimizer.state
        rate = float(twin.optimizer.param_groups[0]["lr"]) if lr is None else lr
        followed, stopped = follow(
            twin, meter, rate, seed=seed, tell=None if tell is None else _stage(tell, "following squared gradients")
        )
        found = []
        for group, kept, size, ratio in zip(twin.optimizer.param_groups, followed, sizes, twin.ratios, strict=True):
            told = replace(settings, knob=name, weight_rms=size, lr=rate * ratio)
            found.append(_recommend(told, group, kept, twin, rate, stopped, seed=seed))
    result = _joined(found)
    if probe is not None:
        with reporting(progress, limit=probe) as (meter, tell):
            result = probe_beta2(
                result,
                objective,
                loss_fn,
                criterion,
                training,
                probe=probe,
                rate=rate,
                group=first,
                fresh=fresh,
                seed=seed,
                meter=meter,
                tell=None if tell is None else _stage(tell, "training with each"),
            )
    return result.require() if strict else result


def _check(
    optimizer: OptimizerLike, lr: float | None, accumulate: int, clip_norm: float | None, max_gradients: int
) -> None:
    if accumulate < 1:
        raise InvalidArgumentError(f"accumulate={accumulate}: a step averages at least one batch.")
    if clip_norm is not None and not clip_norm > 0:
        raise InvalidArgumentError(f"clip_norm={clip_norm}: gradients are clipped to a positive norm; None for none.")
    if lr is not None and not 0 < lr < math.inf:
        raise InvalidArgumentError(f"lr={lr}: the pilot trains at a positive learning rate.")
    if isinstance(optimizer, str) and lr is None:
        raise InvalidArgumentError(
            f"optimizer={optimizer!r} is a name and says no learning rate, which decides how gradients change from "
            "step to step: give lr (suggest_lr finds one), or a torch Optimizer."
        )
    if max_gradients < MIN_GRADIENTS * accumulate:
        raise InvalidArgumentError(
            f"max_gradients={max_gradients} leaves no room for a pilot (accumulate={accumulate}): give at least "
            f"{MIN_GRADIENTS * accumulate}."
        )


def _kind(optimizer: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    for kind in (type(optimizer), *KNOBS):  # AdamW is an Adam
        if kind in KNOBS and isinstance(optimizer, kind):
            return kind
    raise InvalidArgumentError(
        f"a {type(optimizer).__name__} has no running average of squared gradients with one factor that this function "
        "knows: beta2 is a setting of Adam, AdamW and NAdam, alpha of RMSprop, beta2_decay of Adafactor."
    )


def _weight_rms(optimizer: torch.optim.Optimizer) -> list[float | None]:
    """Root mean square of each group's matrices; of all groups' where one has none, None where there are none at all.

    Vectors are left out: they are biases and scales, which begin at 0 and 1 whatever the learning rate fits.
    """
    groups = [[p for p in group["params"] if p.dim() > 1 and p.numel()] for group in optimizer.param_groups]
    everything = [p for group in groups for p in group]
    found: list[float | None] = []
    for tensors in groups:
        chosen = tensors or everything
        total = sum(float(torch.linalg.vector_norm(p.detach(), dtype=_accurate(p))) ** 2 for p in chosen)
        count = sum(p.numel() for p in chosen)
        found.append(math.sqrt(total / count) if count else None)
    return found


def _accurate(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _stage(tell: Any, name: str) -> Any:
    return lambda spent: tell(name, spent, None)


def _recommend(
    settings: Beta2Evidence,
    group: Mapping[str, Any],
    followed: Followed | None,
    twin: Twin,
    rate: float,
    stopped: str | None,
    *,
    seed: int,
) -> Recommendation:
    adam = "betas" in group
    grows = settings.knob == DECAY
    present = _present(group, settings.num_steps)
    reading = None if followed is None else read_bank(followed.bank, seed=seed)
    evidence = replace(
        settings,
        weight_rms=1.0 if grows else settings.weight_rms,  # Adafactor's rate is relative to the weights
        present=present,
        optimizer=_kind(twin.optimizer).__name__,
        beta1=float(group["betas"][0]) if adam else None,
        checks=_checks(twin, rate, reading, stopped, present, group),
        cost=twin.meter.spent,
    )
    if reading is None or followed is None:
        return _as_knob(beta2_rule(evidence), evidence)
    stale = reading.staleness(present)
    measured: dict[str, Estimate] = {"memory of the scale": reading.memory}
    if stale is not None:
        measured["share of tensors above 2.3"] = stale
    gradient, squared = trace_correlograms(followed.gradients(), seed=seed)
    for name, found in (("gradients", gradient), ("squared gradients", squared)):
        if found is not None:
            measured[f"autocorrelation time of {name}"] = found.time
    evidence = replace(
        evidence,
        measured=measured,
        best=reading.best,
        local_level=reading.local_level,
        admitted=reading.within(TOLERANCE),
        sure=reading.within(TOLERANCE, sure=True),
        scored=reading.steps,
        hit_rate=reading.hit_rate,
        series={
            "score_beta2": reading.betas if reading.excess else (),
            "score_excess": reading.excess,
            "score_margin": reading.margin,
            "stale_beta2": reading.betas if reading.stale else (),
            "stale_share": reading.stale,
            "stale_low": reading.stale_low,
            "stale_high": reading.stale_high,
            **_curves(gradient, squared),
        },
    )
    return _as_knob(beta2_rule(evidence), evidence)


def _as_knob(found: Recommendation, evidence: Beta2Evidence) -> Recommendation:
    return as_exponent(found, check_length(evidence.num_steps)) if evidence.knob == DECAY else found


def _present(group: Mapping[str, Any], num_steps: int | None) -> float:
    """The factor that a group has; Adafactor's at its last step."""
    if DECAY in group:
        return last_factor(float(group[DECAY]), check_length(num_steps))
    return float(group["betas"][1] if "betas" in group else group["alpha"])


def _curves(gradient: Correlogram | None, squared: Correlogram | None) -> dict[str, tuple[float, ...]]:
    found: dict[str, tuple[float, ...]] = {}
    for name, curve in (("gradient", gradient), ("squared", squared)):
        if curve is not None:
            found["autocorrelation_lag"] = curve.lags
            found[f"autocorrelation_{name}"] = curve.values
            found[f"autocorrelation_{name}_low"] = curve.low
            found[f"autocorrelation_{name}_high"] = curve.high
    return found


def _checks(
    twin: Twin,
    rate: float,
    reading: BankReading | None,
    stopped: str | None,
    present: float,
    group: Mapping[str, Any],
) -> tuple[str, ...]:
    found = [
        f"model measured in {twin.objective.mode} mode; loss: {twin.objective.rule.assumed}",
        f"trained {twin.steps} steps at {rate:.2e}",
    ]
    if reading is not None:
        found.append(
            f"{reading.steps} steps of {reading.size} coordinates scored, of which {100 * reading.dense:.3g}% have a "
            f"gradient in most steps and {100 * reading.dead:.3g}% in none"
        )
        stale = reading.staleness(present)
        if stale is not None:
            found.append(
                f"staleness above {STALE} at {present:g} in {100 * float(stale):.2g}% of tensors and steps; that "
                "threshold is not calibrated and moves nothing"
            )
    count = len(twin.objective.batches)
    if twin.steps * twin.training.accumulate > count:
        found.append(f"the {count} batches were seen more than once: their noise repeats")
    if "alpha" in group:
        found.append("RMSprop's average starts at zero without correction; it was scored with one")
    if DECAY in group:
        found.append("Adafactor keeps sums of squares over rows and columns; single squares were followed")
    if stopped is not None:
        found.append(stopped)
    return tuple(found)


def _joined(found: Sequence[Recommendation]) -> Recommendation:
    """The first group's recommendation, with the others' values in its evidence."""
    others: dict[str, Estimate | float | str | None] = {}
    for i, rec in enumerate(found[1:], start=1):
        others[f"group {i}"] = rec.value
        others[f"group {i}, active bound"] = str(rec.evidence["active bound"])
    return replace(found[0], evidence={**found[0].evidence, **others}) if others else found[0]
