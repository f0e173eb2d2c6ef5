"""The loss on the straight line between two sets of weights: :func:`loss_path`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dyntune.curvature.hessian import Method
from dyntune.curvature.slices import LossSlice, Progress, expansion, leaf, loss_at, rounding_of
from dyntune.errors import CheckpointError, InvalidArgumentError
from dyntune.numerics.vectors import norm
from dyntune.objective.context import unwrap
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.objective.parameters import clean_name
from dyntune.objective.stored import (
    Stored,
    StoredState,
    lent,
    lent_buffers,
    match_state,
    read_checkpoint,
    state_of,
    weights_in,
)

__all__ = ["loss_path"]


def loss_path(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    end: Stored,
    start: Stored | None = None,
    num_points: int = 21,
    beyond: float = 0.25,
    buffers: Literal["refuse", "interpolate"] = "refuse",
    criterion: Criterion | None = None,
    num_batches: int | Literal["all"] = 16,
    method: Method = "auto",
    seed: int = 0,
    progress: Progress = None,
) -> LossSlice:
    """The loss on the straight line from one set of weights (t = 0) to another (t = 1), and a bit beyond.

    All parameters move, frozen ones too if the two states differ there. The ends are the states themselves: the
    losses at t = 0 and t = 1 are those of the checkpoints, to the last bit.

    Buffers: in training mode a BatchNorm uses the statistics of the batch, and its running ones do not matter. In
    evaluation mode it uses the running ones, and *those in between do not belong to the weights in between*: averaged
    statistics are not the statistics of the averaged network, which alone can make a wall in the loss. So where
    buffers that the forward pass reads differ between the ends, the path is refused; put the model into training mode,
    or only its normalisation layers.

    Args:
        model: As for :func:`dyntune.hessian`, like the next two, `criterion`, `num_batches` and `method`. Its own
            weights are neither read (unless `start` is None) nor written.
        batches: See there.
        loss_fn: See there.
        end: The weights at t = 1: a state dict or a checkpoint file (see :func:`dyntune.trace_checkpoints`).
        start: The weights at t = 0; default the model's present ones.
        num_points: Points from t = 0 to t = 1, both included, >= 3.
        beyond: How far the grid goes on beyond both ends, >= 0, in t.
        buffers: ``"interpolate"``: move floating-point buffers along with the weights all the same, others switch
            half way; the prediction is then left out, as derivatives do not know of them.
        criterion: See :func:`dyntune.hessian`.
        num_batches: See there.
        method: See there; of the one product.
        seed: Seed of dropout masks and other randomness of the forward pass.
        progress: Called with (points so far, loss).

    Returns:
        The losses, what gradient and curvature at t = 0 predict, and :attr:`LossSlice.barrier`.

    Raises:
        CheckpointError: A file that cannot be read, a state that does not fit the model, or buffers that differ.
        InvalidArgumentError: A grid out of range, or two ends that are the same.
        DyntuneError: As :func:`dyntune.hessian`, at the start; a loss that is not finite elsewhere is kept.

    Cost:
        One forward pass per point and batch, one gradient, one product; memory of one more copy of the weights.
    Source:
        Goodfellow, Vinyals and Saxe (2015), arXiv:1412.6544 (interpolation); Frankle et al. (2020), arXiv:1912.05671
        (the barrier).

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.eye(2), torch.zeros(2, 1))
        >>> zero, one = ({"weight": torch.full((1, 2), value)} for value in (0.0, 1.0))
        >>> path = loss_path(model, batch, criterion=torch.nn.MSELoss(), start=zero, end=one, num_points=3, beyond=0.0)
        >>> path.losses.tolist(), path.predicted.tolist()
        ([0.0, 0.25, 1.0], [0.0, 0.25, 1.0])
    """
    if num_points < 3:
        raise InvalidArgumentError(f"num_points={num_points}: give at least 3, the ends and one between.")
    if not 0 <= beyond < math.inf:
        raise InvalidArgumentError(f"beyond={beyond}: how far to go on beyond the ends, 0 or more.")
    if buffers not in ("refuse", "interpolate"):
        raise InvalidArgumentError(f'buffers={buffers!r}: choose "refuse" or "interpolate".')
    model = unwrap(model)
    first = state_of(model) if start is None else _state(model, start, "start")
    last = _state(model, end, "end")
    moving = _moving(first, last)
    changing = _changing_buffers(model, first, last)
    if changing and buffers == "refuse":
        raise CheckpointError(
            f"buffers that the forward pass reads differ between the ends ({len(changing)}, the first is "
            f"{changing[0]!r}): in between they would not belong to the weights. For BatchNorm put the model, or only "
            'its normalisation layers, into train mode; or pass buffers="interpolate" and mind the trap.'
        )
    steps = num_points - 1
    extra = round(beyond * steps)
    distances = np.arange(-extra, steps + extra + 1) / steps
    losses = np.empty(distances.size)
    with lent(model, first, trainable=moving):
        objective = Objective(model, batches, loss_fn, criterion=criterion, num_batches=num_batches, seed=seed)
        ends = _ends(objective, first, last)
        for i, t in enumerate(distances.tolist()):
            point = {name: leaf(_between(a, b, t)) for name, (a, b) in ends.items()}
            with lent_buffers(model, _buffers_between(first, last, t, changing)):
                losses[i] = loss_at(objective, lambda _, point=point: point)  # type: ignore[misc]
            if progress is not None:
                progress(i + 1, float(losses[i]))
        vector = [(b.double() - a.double()).to(a.dtype) for a, b in ends.values()]
        at_start = None if changing else expansion(objective, vector, method)
        moved = f"{len(changing)} of the buffers that it reads move along" if changing else "those of the start"
        return LossSlice(
            kind="path",
            direction=f"the line from {first.source} to {last.source}",
            distances=distances,
            losses=losses,
            loss=float(losses[extra]),
            slope=None if at_start is None else at_start.slope,
            curvature=None if at_start is None else at_start.curvature,
            length=norm(vector),
            unit="share of the way from start to end",
            rounding=rounding_of(objective, float(losses[extra])),
            num_products=0 if at_start is None else 1,
            record=objective.describe()
            | {
                "products": "none" if at_start is None else at_start.method,
                "buffers": moved,
                "seed": seed,
                "converted": sorted({*first.dtypes, *last.dtypes}),
            },
        )


def _state(model: nn.Module, stored: Stored, name: str) -> StoredState:
    if isinstance(stored, Mapping):
        return match_state(model, weights_in(stored), source=f"the state dict {name!r}")
    return match_state(model, weights_in(read_checkpoint(stored)), source=f"checkpoint {Path(stored).name!r}")


def _moving(first: StoredState, last: StoredState) -> list[str]:
    """Names of the parameters that differ."""
    moving = [name for name, p in first.parameters.items() if not torch.equal(p, last.parameters[name])]
    if not moving:
        raise InvalidArgumentError("start and end have the same parameters: there is no line between them.")
    whole = [name for name in moving if not first.parameters[name].is_floating_point()]
    if whole:
        raise InvalidArgumentError(
            f"parameter {whole[0]!r} differs between the ends and is stored as {first.parameters[whole[0]].dtype}: "
            "there is nothing in between."
        )
    return moving


def _changing_buffers(model: nn.Module, first: StoredState, last: StoredState) -> list[str]:
    """Names of the buffers that differ and that the forward pass may read.

    Running statistics are not read by a normalisation layer in training mode, the count of its batches never.
    """
    unread = set()
    for path, module in model.named_modules():
        if isinstance(module, _NormBase):
            names = ("running_mean", "running_var", "num_batches_tracked")[0 if module.training else 2 :]
            unread |= {f"{path}.{name}" if path else name for name in names}
    return [name for name, b in first.buffers.items() if name not in unread and not torch.equal(b, last.buffers[name])]


def _ends(objective: Objective, first: StoredState, last: StoredState) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The two ends of every parameter that the objective speaks of, by its name there."""
    named: dict[str, str] = {}
    for name in first.parameters:
        clean = clean_name(name)
        named[name if clean in named else clean] = name
    ends = {}
    for name, dtype in zip(objective.parameters, objective.space.dtypes, strict=True):  # float32 where stored in less
        ends[name] = (first.parameters[named[name]].to(dtype), last.parameters[named[name]].to(dtype))
    return ends


def _buffers_between(
    first: StoredState, last: StoredState, t: float, changing: Sequence[str]
) -> Mapping[str, torch.Tensor]:
    if not changing:
        return first.buffers
    return {name: _between(b, last.buffers[name], t) for name, b in first.buffers.items()}


def _between(start: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
    """Exactly `start` at 0 and exactly `end` at 1."""
    if t in (0.0, 1.0) or not start.is_floating_point():
        return end if t >= 0.5 else start
    return ((1 - t) * start.double() + t * end.double()).to(start.dtype)
