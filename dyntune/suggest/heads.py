"""A number of attention heads, with the learning rate that goes with it: :func:`suggest_heads`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.numerics.random import stream_seed
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.pilot.optimizers import OptimizerLike
from dyntune.suggest.heads_measure import head_dim_of, seeded
from dyntune.suggest.heads_rule import MARGIN, HeadCourse, HeadEvidence, Heads, heads_rule
from dyntune.suggest.lr import num_drawn
from dyntune.suggest.progress import ProgressLike
from dyntune.suggest.variants import Found, Variants, check_request, measure

__all__ = ["suggest_heads"]


def suggest_heads(
    model_factory: Callable[[int], nn.Module],
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    head_counts: Sequence[int],
    optimizer: OptimizerLike = "adamw",
    criterion: Criterion | None = None,
    min_head_dim: int | None = None,
    margin: float = MARGIN,
    seeds: int = 3,
    probe_steps: int = 100,
    curvature: bool = True,
    per_head: bool = False,
    max_gradients: int = 200,
    workers: int = 0,
    seed: int = 0,
    progress: ProgressLike = None,
    strict: bool = False,
) -> Heads:
    """Suggest a number of attention heads with a learning rate, and say whether the number matters for stability.

    For every head count and seed: a learning rate and the rate at which training is expected to fail, by the pilot of
    :func:`dyntune.suggest_lr`; then, after 20 steps at a common low rate, attention and curvature with their growth,
    before the edge of stability, where the eigenvalue would only echo the learning rate; then a short training at the
    suggested rate. All on the same batches in the same order. The pure rule is
    ``dyntune.suggest.heads_rule.heads_rule``: it never ranks by stability alone.

    Expect "equivalent" or "undecided": on small GPTs the failing rate hardly moved with the number of heads.

    Args:
        model_factory: Called with a number of heads, makes a new model; its random numbers come from a fixed seed of
            torch's, so that head counts share what does not depend on them.
        batches: As for :func:`dyntune.suggest_lr`.
        loss_fn: As for :func:`dyntune.suggest_lr`.
        head_counts: Numbers of heads, one or more.
        optimizer: A name as for :func:`dyntune.suggest_lr`, or a function ``params -> Optimizer``.
        criterion: As for :func:`dyntune.suggest_lr`.
        min_head_dim: Narrowest head that may be chosen; None: 4, with a warning below 32.
        margin: Factor within which critical rates count as equal.
        seeds: Models of each head count, 1 or more; intervals take two, and a verdict hardly comes with fewer than
            three.
        probe_steps: Steps of the short training, at least 20.
        curvature: Whether to measure eigenvalues: of the whole, some 60 products on four batches; of queries, keys,
            values, outputs, MLP and embeddings, some 100 products on one.
        per_head: Whether to measure the largest eigenvalue of every head's queries and keys, too: a dozen products or
            two for each, on one batch.
        max_gradients: Budget of each pilot.
        workers: Processes of one thread each; 0 for none but this one. With processes the factory, the loss and the
            batches have to be picklable: functions of a module that can be imported. Times per step are then those of
            so many trainings side by side.
        seed: Of everything.
        progress: As for :func:`dyntune.suggest_lr`: a bar, or a function that is called with what was done, the
            gradients spent so far, and the learning rate that was found or used.
        strict: Raise when the status is not OK.

    Returns:
        ``value``, ``lr``, the ``table`` and the ``verdict``: "different", "equivalent" or "undecided". The status is
        never better than UNCERTAIN: the choice has not been judged against brute force.

    Raises:
        InvalidArgumentError: A head count that the factory cannot build, with those that it can; an Optimizer, whose
            parameters would be those of one model; a number outside its range.
        DyntuneError: As :func:`dyntune.suggest_lr`; a process that failed.
        RefusedError, NotConvergedError: With ``strict=True``.

    Cost:
        For each head count and seed: `max_gradients`, 20 and `probe_steps` gradients and, with `curvature`, some 700
        more.
    Assumes:
        The first steps speak for the training to come; the models of the factory are nobody else's.
    Source:
        See ``dyntune.suggest.heads_rule``; Cohen et al. (2021), arXiv:2103.00065 (the edge of stability); Zhai et al.
        (2023), arXiv:2303.06296, and Wortsman et al. (2023), arXiv:2309.14322 (entropy and logits before divergence).

    Example:
        >>> import torch
        >>> def make(heads):
        ...     layer = nn.TransformerEncoderLayer(8, heads, 16, batch_first=True)
        ...     return nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3))
        >>> g = torch.Generator().manual_seed(0)
        >>> data = [(torch.randn(8, 4, 8, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(20)]
        >>> found = suggest_heads(
        ...     make,
        ...     data,
        ...     criterion=nn.CrossEntropyLoss(),
        ...     head_counts=[1, 2],
        ...     seeds=2,
        ...     probe_steps=20,
        ...     max_gradients=60,
        ...     curvature=False,
        ... )
        >>> found.value in (1, 2), len(found.table)
        (True, 2)
    """
    counts = _checked(head_counts, optimizer, seeds=seeds, probe_steps=probe_steps)
    models = _built(model_factory, counts, stream_seed(seed, 0))
    first = Objective(
        next(iter(models.values())),
        batches,
        loss_fn,
        criterion=criterion,
        num_batches=max(num_drawn(max_gradients), probe_steps),
        num_checked=1,
        widen=False,
        seed=seed,
    )
    checks = [f"models measured in {first.mode} mode; loss: {first.rule.assumed}"]
    shapes = {
        heads: (*head_dim_of(model), sum(p.numel() for p in model.parameters())) for heads, model in models.items()
    }
    for heads, (_, found, _) in shapes.items():
        if found and found != {heads}:
            checks.append(f"the model for {heads} heads has attention modules with {sorted(found)}")
    variants = Variants(
        factory=model_factory,
        variants=tuple(counts),
        names=tuple(f"{heads} heads" for heads in counts),
        batches=tuple(first.batches),
        loss_fn=loss_fn,
        criterion=criterion,
        optimizer=optimizer,
        probe_steps=probe_steps,
        curvature=curvature,
        per_head=per_head,
        max_gradients=max_gradients,
        seed=seed,
    )
    del models, first
    measured, said, cost = measure(variants, seeds=seeds, workers=workers, progress=progress)
    if workers:
        checks.append(f"times per step were taken with {workers} trainings side by side")
    evidence = [
        _evidence(heads, head_dim, parameters, each)
        for (heads, (head_dim, _, parameters)), each in zip(shapes.items(), measured, strict=True)
    ]
    result = heads_rule(evidence, margin=margin, min_head_dim=min_head_dim, checks=(*checks, *said), cost=cost)
    return result.require() if strict else result


def _evidence(heads: int, head_dim: int | None, parameters: int, each: Found) -> HeadEvidence:
    seeds = len(each.lr)
    return HeadEvidence(
        heads=heads,
        head_dim=head_dim,
        parameters=parameters,
        lr=tuple(each.lr),
        max_stable=tuple(each.max_stable),
        start=tuple(each.start),
        loss=tuple(each.loss),
        step_seconds=tuple(each.step_seconds),
        flops=each.flops,
        saved_bytes=each.saved_bytes,
        measured={name: tuple(v) for name, v in each.measured.items() if len(v) == seeds},
        by_head={
            name: {m: _means([told[m] for told in v]) for m in v[0]}
            for name, v in each.by_head.items()
            if len(v) == seeds
        },
        course=None if each.course is None else _course(each.course),
        curvature=_curvature(each, seeds),
    )


def _curvature(each: Found, seeds: int) -> tuple[float, ...]:
    """In the optimizer's scale where it has one; empty unless it was measured for every seed."""
    for name in ("preconditioned lambda_max", "lambda_max"):
        if name in each.measured:
            found = each.measured[name]
            return tuple(found) if len(found) == seeds else ()
    return ()


def _means(seeds: list[list[float]]) -> tuple[float, ...]:
    return tuple(np.mean(np.array(seeds), axis=0).tolist())


def _course(told: Mapping[str, Any]) -> HeadCourse:
    return HeadCourse(
        steps=tuple(told["steps"]),
        max_logit=tuple(tuple(row) for row in told["logits"]),
        relative_entropy=tuple(tuple(row) for row in told["entropy"]),
    )


def _checked(head_counts: Sequence[int], optimizer: OptimizerLike, *, seeds: int, probe_steps: int) -> list[int]:
    counts = list(dict.fromkeys(head_counts))
    if not counts or any(not isinstance(h, int) or h < 1 for h in counts):
        raise InvalidArgumentError(f"head_counts={head_counts!r}: numbers of heads, 1 or more each.")
    check_request(optimizer, seeds=seeds, probe_steps=probe_steps, each="head count")
    return counts


def _built(factory: Callable[[int], nn.Module], counts: Sequence[int], seed: int) -> dict[int, nn.Module]:
    """A model for every count, from the same random numbers."""
    models: dict[int, nn.Module] = {}
    failed: dict[int, Exception] = {}
    for heads in counts:
        try:
            with seeded(seed):
                model = factory(heads)
        except Exception as raised:  # whatever the user's factory raises is told with what it can build
            failed[heads] = raised
            continue
        if not isinstance(model, nn.Module):
            raise InvalidArgumentError(f"model_factory({heads}) returned a {type(model).__name__}, not a torch module.")
        models[heads] = model
    if failed:
        heads, error = next(iter(failed.items()))
        can = ", ".join(map(str, models)) or "none of them"
        raise InvalidArgumentError(
            f"model_factory({heads}) raised {type(error).__name__}: {error}. Of head_counts={list(counts)} it builds: "
            f"{can}. Most libraries ask that the number of heads divides the width of the model."
        ) from error
    return models
