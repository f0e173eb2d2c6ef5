"""Every replay that an alarm calls for: :func:`investigate`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dyntune.replay.changes import (
    Beta2,
    Change,
    Clip,
    Drop,
    Eps,
    Freeze,
    FreshMoments,
    FullPrecision,
    GroupLr,
    NoDecay,
    ScaleLr,
    SettingsHeld,
)
from dyntune.replay.replaying import Recipe, Replayed, Stage, replay, survey
from dyntune.replay.ring import losses_of
from dyntune.replay.snapshot import stepped_parameters
from dyntune.replay.verdict import AGREES, Judge, Verdict, agreement, outliers

__all__ = ["Replays", "candidates", "investigate"]

# A memory of 20 steps: what most windows hold several times, and the smallest that recipes use (GPT-3, Llama: 0.95).
SHORT_BETA2, LONG_BETA2 = 0.95, 0.999
# By which eps grows: gradients whose root mean square has fallen to a thousandth no longer take whole steps.
EPS_FACTOR = 1e3
LR_DIVISORS = (2.0, 4.0, 16.0)
GROUP_DIVISOR = 16.0
# By how much the learning rate has to have risen in the window for the rise to be a suspect.
RISEN = 1.2
NUM_FROZEN = 2
# A norm that was clipped is the limit to this share: torch divides by the norm + 1e-6, and float32 sums agree to 1e-6.
SAME_NORM = 1e-5


@dataclass(frozen=True)
class Replays:
    """What the replays of a window showed.

    Args:
        verdict: In short.
        reason: Why there is no answer; empty where there is one.
        step: The window's last.
        num_steps: Of the window.
        agreement: Largest relative difference between the unchanged replay's losses and the recorded ones.
        margin: Largest healthy rise of the loss over the window.
        unchanged: How it came out.
        rise: Of the loss, unchanged.
        tried: Each change with its rise and whether it averts, from the smallest change on.
        spent: Gradients that were computed, in batches.
    """

    verdict: Verdict
    reason: str = ""
    step: int = -1
    num_steps: int = 0
    agreement: float = math.nan
    margin: float = math.nan
    unchanged: Replayed | None = None
    rise: float = math.nan
    tried: tuple[tuple[Change, float, bool], ...] = ()
    spent: int = 0

    @property
    def averting(self) -> tuple[Change, ...]:
        """Changes that avert it, the smallest first."""
        return tuple(change for change, _, averts in self.tried if averts)


def investigate(stage: Stage, *, changes: Sequence[Change] | None = None) -> Replays:
    """Replay a window unchanged, and, where it is the training itself and did harm, with one change after another.

    Args:
        stage: The window, and the user's model, optimizer and loss.
        changes: What to try; default :func:`candidates`.

    Raises:
        InvalidArgumentError, OptimizerMismatchError, AmbiguousLossError: See :func:`replay`.

    Cost:
        Two windows of gradients where nothing was wrong, else one more for each change, some ten.
    """
    window = stage.window
    told = losses_of(window.steps)
    last, count = window.steps[-1].number, len(window.steps)
    stage, unchanged, gap, spent = _reproduced(stage, told)
    if not gap <= AGREES:
        why = (
            "no loss was told to compare with" if math.isnan(gap) else f"its losses differ by up to {gap:.2g} of theirs"
        )
        return Replays(
            Verdict.NOT_REPRODUCED,
            reason=f"{why}; something acts on the training that the replay does not know: clipping (clip_norm=), mixed "
            "precision (autocast=), hooks on parameters, gradients that are not cleared, or another optimizer.",
            step=last,
            num_steps=count,
            agreement=gap,
            unchanged=unchanged,
            spent=spent,
        )
    surveyed = survey(stage)
    spent += count
    bad = outliers(surveyed, window.history)
    judge = Judge.of(surveyed, window.history, without=frozenset(bad))
    # A loss that is no number at parameters that never saw the batch, and nothing after it that could be undone.
    broken = not all(map(math.isfinite, surveyed.losses))
    if judge is None or (broken and not judge.harmed(unchanged)):
        listed = ", ".join(map(str, sorted(bad)[:4])) + (", ..." if len(bad) > 4 else "")
        those = "That of step" if len(bad) == 1 else "Those of steps"
        return Replays(
            Verdict.BATCHES if bad else Verdict.TOO_SHORT,
            reason=f"{those} {listed}: damaged rows, labels that moved, or another source of data."
            if bad
            else f"{count} steps, of which too few come after the first half with a loss that is finite.",
            step=last,
            num_steps=count,
            agreement=gap,
            unchanged=unchanged,
            spent=spent,
        )
    rise = judge.rise(unchanged)
    found: list[tuple[Change, float, bool]] = []
    if judge.harmed(unchanged):
        for change in candidates(stage, surveyed, unchanged) if changes is None else changes:
            changed = replay(stage, change)
            spent += count
            found.append((change, judge.rise(changed), judge.averts(changed, unchanged)))
        verdict = Verdict.AVERTED if any(averts for _, _, averts in found) else Verdict.NOTHING_AVERTS
    else:
        verdict = Verdict.NOTHING_TO_AVERT
    found.sort(key=lambda row: row[0].size)
    return Replays(
        verdict,
        step=last,
        num_steps=count,
        agreement=gap,
        margin=judge.margin,
        unchanged=unchanged,
        rise=rise,
        tried=tuple(found),
        spent=spent,
    )


def _reproduced(stage: Stage, told: Sequence[float]) -> tuple[Stage, Replayed, float, int]:
    """The unchanged replay; where it is not the training, once more with the clipping that the norms tell of."""
    unchanged = replay(stage)
    gap, spent = agreement(unchanged, told), len(told)
    guess = _clip_norm(stage.window.norms)
    if gap == 0.0 or stage.recipe.clip_norm is not None or guess is None:
        return stage, unchanged, gap, spent
    clipped = stage.made_by(Recipe(guess, stage.recipe.autocast))
    again = replay(clipped)
    smaller = agreement(again, told)
    if smaller < gap or (math.isnan(gap) and not math.isnan(smaller)):
        return clipped, again, smaller, 2 * spent
    return stage, unchanged, gap, 2 * spent


def _clip_norm(norms: Sequence[float]) -> float | None:
    """The round number that a norm is equal to: what gradients are clipped to. A guess, tried by replaying.

    Of numbers with two significant digits there is one in 1,000 norms by chance, to 1e-5.
    """
    rounded = [(norm, float(f"{norm:.2g}")) for norm in norms if math.isfinite(norm) and norm > 0]
    likely = Counter(near for norm, near in rounded if abs(norm - near) < SAME_NORM * near)
    return max(likely, key=lambda norm: likely[norm], default=None)


def candidates(stage: Stage, surveyed: Replayed, unchanged: Replayed) -> list[Change]:
    """Changes that apply to a training, the smallest first."""
    first, last = stage.window.steps[0].settings, stage.window.steps[-1].settings
    names = _names_by_group(stage)
    found: list[Change] = []
    if stage.recipe.autocast is not None:
        found.append(FullPrecision())
    bad = outliers(surveyed, stage.window.history)
    found += [Drop(frozenset(bad[:1]))] if bad else []
    found += [Drop(frozenset(bad))] if len(bad) > 1 else []
    if any(float(after["lr"]) > RISEN * float(before["lr"]) for before, after in zip(first, last, strict=True)):
        found.append(SettingsHeld())
    found += [NoDecay(i, names[i]) for i, group in enumerate(last) if group.get("weight_decay", 0) > 0]
    found += _of_moments(last)
    if len(last) > 1:
        found += [GroupLr(i, GROUP_DIVISOR, names[i]) for i in range(len(last)) if names[i]]
    found += _freezes(unchanged)
    # Before harm was done: the norms at the window's first parameters.
    norms = [norm for norm in surveyed.norms if math.isfinite(norm) and norm > 0]
    if norms:
        found.append(Clip(float(np.median(norms))))
    return sorted([*found, *map(ScaleLr, LR_DIVISORS)], key=lambda change: change.size)


def _of_moments(settings: Sequence[dict[str, object]]) -> list[Change]:
    """Other second moments, of optimizers that have one."""
    found: list[Change] = []
    group = settings[0]
    betas = group.get("betas")
    memory = betas[1] if isinstance(betas, (tuple, list)) else group.get("alpha") if "centered" in group else None
    if isinstance(memory, torch.Tensor):
        memory = float(memory)
    if isinstance(memory, float):
        found.append(Beta2(SHORT_BETA2, shorter=True) if memory > SHORT_BETA2 else Beta2(LONG_BETA2, shorter=False))
        found.append(FreshMoments())
        eps = group.get("eps")
        if isinstance(eps, float) and eps > 0:
            found.append(Eps(EPS_FACTOR * eps))
    return found


def _names_by_group(stage: Stage) -> list[tuple[str, ...]]:
    names = {id(p): name for name, p in stepped_parameters(stage.model, stage.optimizer).items()}
    groups = stage.optimizer.param_groups
    return [tuple(names[id(p)] for p in group["params"] if id(p) in names) for group in groups]


def _freezes(unchanged: Replayed) -> list[Change]:
    """The layers that moved most, relative to their size."""
    layers: dict[str, list[str]] = {}
    for name in unchanged.updates:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    if len(layers) < 2:
        return []

    def moved(layer: str) -> float:
        update = max(unchanged.updates[name] for name in layers[layer])
        return update if math.isfinite(update) else math.inf

    most = sorted(layers, key=lambda layer: -moved(layer))[:NUM_FROZEN]
    return [Freeze(layer, tuple(layers[layer])) for layer in most]
