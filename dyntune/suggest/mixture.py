"""Sampling proportions of several sources of data from how noisy their gradients are: :func:`suggest_mixture`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import nn

from dyntune.dynamics.sources import blended_moments, source_moments
from dyntune.errors import InvalidArgumentError
from dyntune.numerics.water_filling import checked_floors
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.parameters import ParameterSelection
from dyntune.suggest.mixture_changed import ChangedMixture
from dyntune.suggest.mixture_held_out import HELD_OUT, held_out_mixture
from dyntune.suggest.mixture_measure import measure_gradients, metric_of, parts_of
from dyntune.suggest.mixture_rule import (
    Mixture,
    MixtureEvidence,
    Sampling,
    checked_weights,
    default_floors,
    mixture_rule,
)

__all__ = ["suggest_mixture"]

GRAM_BYTES = 1 << 28  # a quarter of a gigabyte: 64 gradients of a million parameters


@overload
def suggest_mixture(
    sources: Mapping[str, Any] | Sequence[Any],
    weights: Sequence[float] | None = None,
    floors: Sequence[float] | None = None,
    costs: Sequence[float] | None = None,
    *,
    model: nn.Module,
    loss_fn: LossFunction | None = None,
    criterion: Criterion | None = None,
    params: ParameterSelection = None,
    optimizer: torch.optim.Optimizer | None = None,
    objective: Literal["same"] = "same",
    held_out: None = None,
    lr: None = None,
    sampling: Sampling = "stratified",
    rows: int = 1,
    num_gradients: int = 32,
    num_batches: int | Literal["all"] = 16,
    previous: Mixture | None = None,
    memory: float = 4.0,
    shrink: bool = True,
    gram_bytes: int = GRAM_BYTES,
    seed: int = 0,
    strict: bool = False,
) -> Mixture: ...


@overload
def suggest_mixture(
    sources: Mapping[str, Any] | Sequence[Any],
    weights: Sequence[float] | None = None,
    floors: Sequence[float] | None = None,
    costs: None = None,
    *,
    model: nn.Module,
    loss_fn: LossFunction | None = None,
    criterion: Criterion | None = None,
    params: ParameterSelection = None,
    optimizer: torch.optim.Optimizer | None = None,
    objective: Literal["held-out"],
    held_out: Any,
    lr: float,
    sampling: Sampling = "stratified",
    rows: int = 1,
    num_gradients: int = 32,
    num_batches: int | Literal["all"] = 16,
    previous: None = None,
    memory: float = 4.0,
    shrink: bool = True,
    gram_bytes: int = GRAM_BYTES,
    seed: int = 0,
    strict: bool = False,
) -> ChangedMixture: ...


def suggest_mixture(
    sources: Mapping[str, Any] | Sequence[Any],
    weights: Sequence[float] | None = None,
    floors: Sequence[float] | None = None,
    costs: Sequence[float] | None = None,
    *,
    model: nn.Module,
    loss_fn: LossFunction | None = None,
    criterion: Criterion | None = None,
    params: ParameterSelection = None,
    optimizer: torch.optim.Optimizer | None = None,
    objective: Literal["same", "held-out"] = "same",
    held_out: Any = None,
    lr: float | None = None,
    sampling: Sampling = "stratified",
    rows: int = 1,
    num_gradients: int = 32,
    num_batches: int | Literal["all"] = 16,
    previous: Mixture | None = None,
    memory: float = 4.0,
    shrink: bool = True,
    gram_bytes: int = GRAM_BYTES,
    seed: int = 0,
    strict: bool = False,
) -> Mixture | ChangedMixture:
    """Say from which source how large a share of the rows should come, so that the gradient is least noisy.

    The objective stays the weighted mean of the sources' losses: rows are weighted by ``importance``, as
    :class:`dyntune.training.mixture_sampler.MixtureSampler` does. It is for the present parameters: measure again as
    training goes on, with ``previous=``.

    Args:
        sources: By name (or in order): each a batch, a list of batches or a DataLoader of rows in random order.
        weights: What each counts in the objective; adds up to one. Default equal. With ``objective="held-out"``:
            what is compared with.
        floors: Least share of rows of each. Default a tenth of its weight.
        costs: What one row of each costs, in any unit; the variance is then the least for a budget. Default equal.
        model: The model, at present.
        loss_fn: ``(model, batch) -> mean loss``.
        criterion: ``(outputs, targets) -> mean loss``.
        params: Globs or predicate on parameter names; default all trainable ones.
        optimizer: The model's, which has stepped: lengths are measured in its metric. Default Euclidean, as SGD's.
        objective: ``"same"``: only the variance changes. ``"held-out"``: choose *another* objective, the mean over
            sources with the shares as weights whose next step lowers the loss on `held_out` most; draw without
            importance weights then.
        held_out: Batches of the loss that is meant, for ``objective="held-out"``.
        lr: Learning rate of that step.
        sampling: ``"stratified"``: each batch has its share of rows of each source. ``"multinomial"``: the source is
            drawn anew for each row, so that sources whose means differ add noise.
        rows: Rows in one measured gradient: more than one where the loss couples rows, as BatchNorm in training does.
        num_gradients: Measured of each source, at most.
        num_batches: Drawn from a loader.
        previous: An earlier answer about the same sources, to average with.
        memory: Looks that count in that average.
        shrink: Whether to move noisy measurements towards each other.
        gram_bytes: Memory for gradients; larger models are sketched (a 1% error of inner products).
        seed: Which rows are measured, dropout, and the bootstrap.
        strict: Raise when the status is not OK.

    Returns:
        ``proportions`` with intervals, ``importance``, and the variance relative to equal shares and to shares like the
        weights. OK says that the variance is lower than with shares like the weights, not that steps are saved. With
        ``objective="held-out"`` a :class:`~dyntune.suggest.mixture_changed.ChangedMixture`.

    Raises:
        InvalidArgumentError: Weights that do not add up to one, floors that add up to more, costs that are not
            positive, or fewer than two parts of a source.
        EmptyBatchError: A source without rows.
        NonFiniteError: A loss or a gradient is NaN or infinite.
        OptimizerMismatchError: An optimizer of other parameters.
        RefusedError, NotConvergedError: With ``strict=True``.

    Accuracy:
        Moments are unbiased; ``tests/suggest/test_mixture.py`` compares the predicted ratio with the measured variance
        of drawn batches.
    Cost:
        One forward and backward pass for each gradient, 32 a source as a rule.
    Assumes:
        Rows of a source in random order; parameters and second moments as they are now.
    Source:
        See ``dyntune.suggest.mixture_rule``.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> x = torch.randn(64, 3, generator=rng)
        >>> noise = torch.randn(64, 1, generator=rng)
        >>> found = suggest_mixture(
        ...     {"clean": (x, 0.1 * noise), "noisy": (x, 3 * noise)},
        ...     model=nn.Linear(3, 1),
        ...     criterion=nn.MSELoss(),
        ... )
        >>> found.proportions[1] > 0.5, found.to_uniform.value < 1
        (True, True)
    """
    named = _named(sources)
    w = checked_weights(weights, len(named))
    f = default_floors(w) if floors is None else tuple(checked_floors(floors, len(named)).tolist())
    if rows < 1 or num_gradients < 2:
        raise InvalidArgumentError(
            f"rows={rows}, num_gradients={num_gradients}: a gradient is of one row at least, and noise is told "
            "from two gradients of each source."
        )
    options = {"loss_fn": loss_fn, "criterion": criterion, "params": params, "seed": seed}
    parts = {
        name: parts_of(source, name, rows=rows, most=num_gradients, num_batches=num_batches, seed=seed)
        for name, source in named.items()
    }
    short = [name for name, each in parts.items() if len(each) < 2]
    if short:
        raise InvalidArgumentError(
            f"source {short[0]!r} has rows for one gradient of {rows}: noise is told from two. Give it more rows, or "
            "make rows smaller."
        )
    if objective == "held-out":
        if held_out is None or lr is None or not 0 < lr < math.inf or costs is not None or previous is not None:
            raise InvalidArgumentError(
                f'objective="held-out" with lr={lr}: it asks for held_out=... and a positive lr=..., as a step has a '
                "length, and knows neither costs nor an earlier answer."
            )
        held = parts_of(held_out, HELD_OUT, rows=rows, most=num_gradients, num_batches=num_batches, seed=seed)
        changed = held_out_mixture(
            model,
            parts,
            held,
            lr=lr,
            floors=f,
            present=w,
            optimizer=optimizer,
            rows=rows,
            memory=gram_bytes,
            seed=seed,
            objective_options=options,
        )
        return changed.require() if strict else changed
    if objective != "same" or held_out is not None or lr is not None:
        raise InvalidArgumentError(
            f'objective={objective!r}: it is "same" or "held-out", and held_out= and lr= belong to "held-out" alone.'
        )
    scale_of, metric = metric_of(optimizer)
    found = measure_gradients(model, parts, rows=rows, scale_of=scale_of, memory=gram_bytes, objective_options=options)
    moments = source_moments(found.gram, found.counts, rows=rows, seed=seed)
    if previous is not None:
        if previous.names != tuple(named):
            raise InvalidArgumentError(f"previous= is about {previous.names}, not about {tuple(named)}.")
        moments = blended_moments(previous.evidence.moments, moments, memory=memory)
    result = mixture_rule(
        MixtureEvidence(
            names=tuple(named),
            weights=w,
            floors=f,
            costs=None if costs is None else tuple(float(t) for t in costs),
            sampling=sampling,
            moments=moments,
            metric=metric + (", inner products from sketches" if found.sketched else ""),
            rows=rows,
            shrink=shrink,
            cost=float(sum(found.counts)),
        )
    )
    return result.require() if strict else result


def _named(sources: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """By name; those without one are called source 0, source 1 and so on."""
    if isinstance(sources, Mapping):
        named = {str(name): source for name, source in sources.items()}
    elif isinstance(sources, (list, tuple)) and not any(isinstance(s, torch.Tensor) for s in sources):
        named = {f"source {i}": source for i, source in enumerate(sources)}
    else:
        raise InvalidArgumentError(
            f"sources is a {type(sources).__name__}: give a mapping from names to batches, or a list with one entry "
            "for each source."
        )
    if not named:
        raise InvalidArgumentError("sources is empty: there is nothing to mix.")
    return named
