"""Peak, warm-up and decay of the learning rate from a short pilot: :func:`suggest_schedule`."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.pilot.optimizers import OptimizerLike
from dyntune.stability.scales import group_ratios
from dyntune.suggest.lr import suggest_lr
from dyntune.suggest.progress import ProgressLike
from dyntune.suggest.schedule_rule import Schedule, Shape, peak_ratios

__all__ = ["suggest_schedule"]

RATIO_TOLERANCE = 8 * 2.0**-23  # a few roundings of a rate held in float32


def suggest_schedule(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    criterion: Criterion | None = None,
    optimizer: OptimizerLike = "adamw",
    num_steps: int,
    schedule: Shape = "cosine",
    final: float | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    method: Literal["auto", "forward", "sweep"] = "auto",
    max_gradients: int = 200,
    workers: int = 0,
    storage: Any = None,
    seed: int = 0,
    progress: ProgressLike = None,
    strict: bool = False,
) -> Schedule:
    """Suggest peak, warm-up and decay of the learning rate, ready to drive an optimizer.

    Measures as :func:`dyntune.suggest_lr` does, whose value is the peak and whose warm-up the one used;
    :meth:`Schedule.of` is the pure rule that makes the schedule from it. The shape is the caller's choice: it is not
    measured. Nothing of the user's changes until ``Schedule.scheduler(optimizer)`` is called.

    Args:
        model: As for :func:`dyntune.suggest_lr`.
        batches: As for :func:`dyntune.suggest_lr`.
        loss_fn: As for :func:`dyntune.suggest_lr`.
        criterion: As for :func:`dyntune.suggest_lr`.
        optimizer: As for :func:`dyntune.suggest_lr`; best the one that the schedule will drive, whose groups are then
            measured at the ratios that it keeps.
        num_steps: Optimizer steps of the training to come, > 0.
        schedule: ``"cosine"``, ``"linear"``, ``"wsd"`` (warm-up, stable, decay over the last fifth) or ``"constant"``.
            `suggest_lr` means its value as the peak of a schedule that decays.
        final: Where the decay ends, as a share of the peak, in [0, 1]; default 0.
        clip_norm: As for :func:`dyntune.suggest_lr`.
        accumulate: As for :func:`dyntune.suggest_lr`.
        autocast: As for :func:`dyntune.suggest_lr`.
        method: As for :func:`dyntune.suggest_lr`; ``"sweep"`` trains with the schedule, but not with ``"wsd"``.
        max_gradients: As for :func:`dyntune.suggest_lr`.
        workers: As for :func:`dyntune.suggest_lr`.
        storage: As for :func:`dyntune.suggest_lr`.
        seed: As for :func:`dyntune.suggest_lr`.
        progress: As for :func:`dyntune.suggest_lr`.
        strict: Raise when the status is not OK; the error carries the schedule as ``partial``.

    Returns:
        The schedule; refused where the learning rate is, so that its ``scheduler()`` raises.

    Raises:
        InvalidArgumentError: A number outside its range, an unknown shape, or an optimizer in the middle of another
            schedule whose groups no longer have the ratios of their ``initial_lr``; before anything is measured.
        DyntuneError: As :func:`dyntune.suggest_lr`.
        RefusedError, NotConvergedError: With ``strict=True``.

    Cost:
        That of :func:`dyntune.suggest_lr`: at most `max_gradients`.
    Assumes:
        As :func:`dyntune.suggest_lr`; that the peak suits the shape is not verified.
    Source:
        Warm-up: Goyal et al. (2017), arXiv:1706.02677, and Ma and Yarats (2019), arXiv:1910.04209, for Adam's length.
        Cosine: Loshchilov and Hutter (2017), arXiv:1608.03983. Linear, and zero as the end: Bergsma et al.
        (2025), arXiv:2502.15938. Warm-up, stable, decay: Hu et al. (2024), arXiv:2404.06395; its last fifth: Haegele et
        al. (2024), arXiv:2405.18392, whose code decays for 10 to 20% of the steps.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> g = torch.Generator().manual_seed(0)
        >>> data = [(torch.randn(16, 4, generator=g), torch.randn(16, 1, generator=g)) for _ in range(8)]
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> found = suggest_schedule(
        ...     model, data, criterion=torch.nn.MSELoss(), optimizer=optimizer, num_steps=300, max_gradients=100
        ... )
        >>> scheduler = found.scheduler(optimizer)
        >>> optimizer.param_groups[0]["lr"] == found.rate(0) > 0
        True
    """
    Schedule.of(1.0, num_steps=num_steps, schedule=schedule, final=final)  # raises before anything is measured
    if isinstance(optimizer, torch.optim.Optimizer):
        _check_ratios(optimizer)
    lr = suggest_lr(
        model,
        batches,
        loss_fn,
        criterion=criterion,
        optimizer=optimizer,
        num_steps=num_steps,
        schedule=schedule,
        clip_norm=clip_norm,
        accumulate=accumulate,
        autocast=autocast,
        method=method,
        max_gradients=max_gradients,
        workers=workers,
        storage=storage,
        seed=seed,
        progress=progress,
    )
    result = Schedule.of(lr, num_steps=num_steps, schedule=schedule, final=final)
    return result.require() if strict else result


def _check_ratios(optimizer: torch.optim.Optimizer) -> None:
    """Raise where the ratios that are measured, of the present rates, are not those that the scheduler keeps."""
    kept, measured = peak_ratios(optimizer), group_ratios(optimizer)
    if not all(math.isclose(a, b, rel_tol=RATIO_TOLERANCE) for a, b in zip(kept, measured, strict=True)):
        raise InvalidArgumentError(
            f"the parameter groups have rates in the ratios {measured} now and {kept} in their initial_lr, which the "
            "schedule would keep: it would drive another training than the one measured. Set each group's lr to its "
            "initial_lr first."
        )
