"""Stable learning rates of several architectures, side by side: :func:`suggest_architecture`."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.random import stream_seed
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.pilot.optimizers import OptimizerLike
from dyntune.records import Estimate
from dyntune.suggest.heads_measure import seeded
from dyntune.suggest.heads_rule import MARGIN, Verdict, estimate_text, geometric, paired_effects, seeds_loss
from dyntune.suggest.lr import num_drawn
from dyntune.suggest.progress import ProgressLike
from dyntune.suggest.variants import Found, Variants, check_request, measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Architecture", "Architectures", "suggest_architecture"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A row of the table.

    Args:
        choice: The value of every knob.
        parameters: Of the model.
        lr: Suggested learning rate, the geometric mean over seeds with Student's interval.
        critical_lr: Rate at which training is expected to fail, likewise.
        loss: After the short training at the suggested rate.
        step_seconds: Time of one of its steps.
        flops: Of one step's forward and backward pass.
        saved_bytes: Of activations that one step holds for its backward pass.
        measured: More, by name: means over seeds.
        dominated: Whether another row has a lower mean loss and takes no longer.
    """

    choice: Mapping[str, Any]
    parameters: int
    lr: Estimate
    critical_lr: Estimate
    loss: Estimate
    step_seconds: float
    flops: int | None
    saved_bytes: int | None
    measured: Mapping[str, float]
    dominated: bool

    @property
    def name(self) -> str:
        """The choice in words."""
        return ", ".join(f"{knob}={value}" for knob, value in self.choice.items())


@dataclass(frozen=True, kw_only=True)
class Architectures:
    """What :func:`suggest_architecture` found.

    Args:
        table: A row for each choice that could be built, in the order of the knobs.
        effects: By knob and value, the factor by which it moves the critical rate, the other knobs' parts taken off.
        verdicts: By knob, whether it moves the critical rate.
        margin: Factor either way within which critical rates count as equal.
        skipped: Choices that could not be built, with the reason.
        checks: What was verified, in words.
        cost: Gradient-equivalents spent.
    """

    table: tuple[Architecture, ...]
    effects: Mapping[str, Mapping[Any, Estimate]]
    verdicts: Mapping[str, Verdict]
    margin: float
    skipped: Mapping[str, str]
    checks: tuple[str, ...]
    cost: float

    def __str__(self) -> str:
        said = ", ".join(f"{knob}: {verdict}" for knob, verdict in self.verdicts.items())
        return f"{len(self.table)} architectures; critical rates: {said}"

    def explain(self) -> str:
        """The table, the effects and the checks, in words."""
        lines = [str(self)]
        lines += [
            f"  {row.name}: lr {estimate_text(row.lr)}; critical {estimate_text(row.critical_lr)}; "
            f"loss {estimate_text(row.loss)}; "
            f"{1e3 * row.step_seconds:.3g} ms a step; {row.parameters} parameters"
            f"{'; another is as fast and ends lower' if row.dominated else ''}"
            for row in self.table
        ]
        for knob, values in self.effects.items():
            lines.append(f"{knob}: critical rate over the mean ({self.verdicts[knob]} within {self.margin:g})")
            lines += [f"  {value}: {estimate_text(effect)}" for value, effect in values.items()]
        lines += [f"not built: {name}: {why}" for name, why in self.skipped.items()]
        lines += [f"check: {check}" for check in self.checks]
        return "\n".join([*lines, f"cost: {self.cost:.0f} gradient-equivalents"])

    def plot_map(self, outcomes: Mapping[str, Mapping[float, float]], ax: Axes | None = None) -> Axes:
        """Draw a brute force with the measured edge over it (needs matplotlib, imported here only).

        Args:
            outcomes: A row's `name` -> learning rate -> final loss; infinite for a run that failed.
            ax: Where to draw.
        """
        from dyntune.plots import plot_stability_map

        return plot_stability_map(
            dict(outcomes),
            critical={row.name: row.critical_lr for row in self.table},
            suggested={row.name: row.lr for row in self.table},
            title="What training came to, and where it was expected to fail",
            ax=ax,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; values of knobs as text where they are none, NaN and infinity as None."""
        return {
            "table": [
                {
                    "choice": {knob: _plain(value) for knob, value in row.choice.items()},
                    "parameters": row.parameters,
                    "lr": row.lr.to_dict(),
                    "critical_lr": row.critical_lr.to_dict(),
                    "loss": row.loss.to_dict(),
                    "step_seconds": row.step_seconds if math.isfinite(row.step_seconds) else None,
                    "flops": row.flops,
                    "saved_bytes": row.saved_bytes,
                    "measured": {name: v if math.isfinite(v) else None for name, v in row.measured.items()},
                    "dominated": row.dominated,
                }
                for row in self.table
            ],
            "effects": {
                knob: {str(value): effect.to_dict() for value, effect in values.items()}
                for knob, values in self.effects.items()
            },
            "verdicts": dict(self.verdicts),
            "margin": self.margin,
            "skipped": dict(self.skipped),
            "checks": list(self.checks),
            "cost": self.cost,
        }

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.explain())}</pre>"


def suggest_architecture(
    model_factory: Callable[..., nn.Module],
    knobs: Mapping[str, Sequence[Any]],
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    optimizer: OptimizerLike = "adamw",
    criterion: Criterion | None = None,
    margin: float = MARGIN,
    seeds: int = 2,
    probe_steps: int = 100,
    curvature: bool = False,
    max_gradients: int = 200,
    max_choices: int = 64,
    workers: int = 0,
    seed: int = 0,
    progress: ProgressLike = None,
) -> Architectures:
    r"""Measure the stable learning rate of every combination of architecture knobs, and what each knob does to it.

    The machinery of :func:`dyntune.suggest_heads`: for every combination and seed a learning rate and the rate at which
    training is expected to fail, attention and curvature before the edge, a short training at the suggested rate, all
    on the same batches in the same order. The effect of a knob's value is its part in

    .. math:: \log_2 \eta_{c,s} = m_s + \sum_k a_{k, c_k, s} , \qquad \sum_v a_{k,v,s} = 0 ,

    fitted by least squares for each seed s; intervals and verdicts are over seeds, as those of head counts. Nothing is
    recommended: a wider model has a lower loss and costs more, which is yours to weigh; rows that another one beats in
    both are marked.

    Args:
        model_factory: Called with the knobs as keywords, ``model_factory(heads=4, width=64)``, makes a new model; its
            random numbers come from a fixed seed of torch's.
        knobs: By name, the values to try; every combination is. Those that cannot be built are left out and told.
        batches: As for :func:`dyntune.suggest_lr`.
        loss_fn: As for :func:`dyntune.suggest_lr`.
        optimizer: A name as for :func:`dyntune.suggest_lr`, or a function ``params -> Optimizer``.
        criterion: As for :func:`dyntune.suggest_lr`.
        margin: Factor within which critical rates count as equal.
        seeds: Models of each combination; intervals take two.
        probe_steps: Steps of the short training, at least 20.
        curvature: Whether to measure eigenvalues, too.
        max_gradients: Budget of each pilot.
        max_choices: More combinations are refused: what they cost is easily underrated.
        workers: As for :func:`dyntune.suggest_heads`.
        seed: Of everything.
        progress: As for :func:`dyntune.suggest_lr`: a bar, or a function that is called with what was done, the
            gradients spent so far, and the learning rate that was found or used.

    Raises:
        InvalidArgumentError: No knob, a knob without values, too many combinations, none that can be built, an
            Optimizer in the place of a function.
        DyntuneError: As :func:`dyntune.suggest_lr`; a process that failed.

    Cost:
        For each combination and seed `max_gradients`, 20 and `probe_steps` gradients; with `curvature` some 700 more.
    Assumes:
        Effects of knobs multiply. The first steps speak for the training to come.

    Example:
        >>> import torch
        >>> def make(*, width, depth):
        ...     hidden = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
        ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), *hidden, nn.Linear(width, 3))
        >>> g = torch.Generator().manual_seed(0)
        >>> data = [(torch.randn(16, 4, generator=g), torch.randint(3, (16,), generator=g)) for _ in range(20)]
        >>> found = suggest_architecture(
        ...     make, {"width": [8, 16], "depth": [1]}, data, criterion=nn.CrossEntropyLoss(), probe_steps=20, seeds=1
        ... )
        >>> [row.name for row in found.table]
        ['width=8, depth=1', 'width=16, depth=1']
    """
    choices = _choices(knobs, optimizer, max_choices=max_choices, seeds=seeds, probe_steps=probe_steps)
    built, sizes, skipped = _built(model_factory, choices, stream_seed(seed, 0))
    first = Objective(
        built[0],
        batches,
        loss_fn,
        criterion=criterion,
        num_batches=max(num_drawn(max_gradients), probe_steps),
        num_checked=1,
        widen=False,
        seed=seed,
    )
    kept = [choice for choice in choices if _name(choice) in sizes]
    variants = Variants(
        factory=_ByKeyword(model_factory),
        variants=tuple(kept),
        names=tuple(map(_name, kept)),
        batches=tuple(first.batches),
        loss_fn=loss_fn,
        criterion=criterion,
        optimizer=optimizer,
        probe_steps=probe_steps,
        curvature=curvature,
        per_head=False,
        max_gradients=max_gradients,
        seed=seed,
    )
    checks = [f"models measured in {first.mode} mode; loss: {first.rule.assumed}"]
    del built, first
    found, said, cost = measure(variants, seeds=seeds, workers=workers, progress=progress)
    if workers:
        checks.append(f"times per step were taken with {workers} trainings side by side")
    effects, verdicts = _effects(kept, found, margin)
    return Architectures(
        table=_table(kept, found, sizes),
        effects=effects,
        verdicts=verdicts,
        margin=margin,
        skipped=skipped,
        # A network without attention is no news here.
        checks=(*checks, *(line for line in said if not line.startswith(("attention was", "norms of", "no spectra")))),
        cost=cost,
    )


@dataclass(frozen=True)
class _ByKeyword:
    """The user's factory, told its knobs by name."""

    factory: Callable[..., nn.Module]

    def __call__(self, choice: Mapping[str, Any]) -> nn.Module:
        return self.factory(**choice)


def _choices(
    knobs: Mapping[str, Sequence[Any]], optimizer: OptimizerLike, *, max_choices: int, seeds: int, probe_steps: int
) -> list[dict[str, Any]]:
    if not knobs:
        raise InvalidArgumentError('knobs is empty: give at least one, such as {"depth": [2, 4]}.')
    for knob, values in knobs.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InvalidArgumentError(f"knobs[{knob!r}]={values!r}: give a list of one value or more.")
    number = math.prod(len(values) for values in knobs.values())
    if number > max_choices:
        raise InvalidArgumentError(
            f"knobs has {number} combinations, more than max_choices={max_choices}; each costs hundreds of gradients "
            "for each seed. Try fewer values, or raise max_choices."
        )
    check_request(optimizer, seeds=seeds, probe_steps=probe_steps, each="architecture")
    return [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]


def _built(
    factory: Callable[..., nn.Module], choices: Sequence[dict[str, Any]], seed: int
) -> tuple[list[nn.Module], dict[str, int], dict[str, str]]:
    """The first model that can be built, the size of each, and why others cannot."""
    first: list[nn.Module] = []
    sizes: dict[str, int] = {}
    skipped: dict[str, str] = {}
    error: Exception | None = None
    for choice in choices:
        try:
            with seeded(seed):
                model = factory(**choice)
        except Exception as raised:  # whatever the user's factory raises is told
            skipped[_name(choice)], error = f"{type(raised).__name__}: {raised}", raised
            continue
        if not isinstance(model, nn.Module):
            raise InvalidArgumentError(
                f"model_factory({_name(choice)}) returned a {type(model).__name__}, not a torch module."
            )
        sizes[_name(choice)] = sum(p.numel() for p in model.parameters())
        first = first or [model]
    if not first:
        name, why = next(iter(skipped.items()))
        raise InvalidArgumentError(
            f"model_factory({name}) raised {why}, and no other combination of knobs can be built either."
        ) from error
    return first, sizes, skipped


def _name(choice: Mapping[str, Any]) -> str:
    return ", ".join(f"{knob}={value}" for knob, value in choice.items())


def _table(
    choices: Sequence[Mapping[str, Any]], found: Sequence[Found], sizes: Mapping[str, int]
) -> tuple[Architecture, ...]:
    losses = [float(np.mean(each.loss)) for each in found]
    seconds = [float(np.median(each.step_seconds)) for each in found]
    return tuple(
        Architecture(
            choice=choice,
            parameters=sizes[_name(choice)],
            lr=geometric(each.lr),
            critical_lr=geometric(each.max_stable),
            loss=seeds_loss(each.loss),
            step_seconds=second,
            flops=each.flops,
            saved_bytes=each.saved_bytes,
            measured={name: float(np.mean(v)) for name, v in each.measured.items() if len(v) == len(each.lr)},
            dominated=any(a < loss and b <= second for a, b in zip(losses, seconds, strict=True)),
        )
        for choice, each, loss, second in zip(choices, found, losses, seconds, strict=True)
    )


def _effects(
    choices: Sequence[Mapping[str, Any]], found: Sequence[Found], margin: float
) -> tuple[dict[str, dict[Any, Estimate]], dict[str, Verdict]]:
    """Parts of the knobs' values in log2 of the critical rate, seed by seed, and what follows."""
    known = [i for i, each in enumerate(found) if all(math.isfinite(x) and x > 0 for x in each.max_stable)]
    effects: dict[str, dict[Any, Estimate]] = {}
    verdicts: dict[str, Verdict] = {}
    # Values are told apart by what they print: a knob's value need not be hashable.
    columns = [(knob, value) for knob in choices[0] for value in dict.fromkeys(str(choices[i][knob]) for i in known)]
    if known:
        logs = np.log2(np.array([found[i].max_stable for i in known]))  # (choices, seeds)
        design = np.array([[str(choices[i][knob]) == value for knob, value in columns] for i in known], dtype=float)
        # The smallest solution of min |design a - y| splits a mean evenly: centring each knob makes it unique.
        parts = np.linalg.lstsq(design, logs - logs.mean(axis=0), rcond=None)[0]
    for knob in choices[0]:
        rows = [j for j, (name, _) in enumerate(columns) if name == knob]
        if len(rows) < 2:
            verdicts[knob], effects[knob] = "undecided", {}
            continue
        own = parts[rows] - parts[rows].mean(axis=0)
        apart = {columns[j][1]: d.tolist() for j, d in zip(rows, own, strict=True)}
        effects[knob], verdicts[knob] = paired_effects(apart, margin)
    return effects, verdicts


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
