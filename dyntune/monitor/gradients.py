"""The gradients that an optimizer is about to use: named, of this process, without a scaler's factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dyntune.monitor.pending import Number
from dyntune.objective.context import unwrap
from dyntune.objective.dtensor import is_distributed_tensor, local
from dyntune.objective.parameters import named_parameters

__all__ = ["Gradients", "gradient_norm", "own_gradients", "parameter_names", "read_gradients", "real"]


@dataclass(frozen=True)
class Gradients:
    """What an optimizer holds at a step, in the order of its groups.

    Args:
        names: Clean names of the parameters that have a gradient.
        parameters: Those parameters, as the optimizer holds them.
        tensors: Their gradients: this process's shards, dense, unscaled; complex ones as pairs of real numbers.
        offsets: Where each shard begins in its flattened whole.
    """

    names: tuple[str, ...]
    parameters: tuple[torch.Tensor, ...]
    tensors: tuple[torch.Tensor, ...]
    offsets: tuple[int, ...]


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Clean names by the identity of the parameter; what the model does not know is named by its place."""
    names = {id(p): name for name, p in named_parameters(unwrap(model)).items()}
    for index, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            names.setdefault(id(p), f"group{index}.{place}")
    return names


def read_gradients(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Gradients:
    """Read the gradients before a step; nothing is written to, and there is no device synchronisation.

    A fused optimizer under ``torch.amp.GradScaler`` is given scaled gradients and divides within its kernel; here they
    are divided into copies.
    """
    held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    parts = [local(p.grad.detach()) for p in held]
    parts = [real(g.to_dense() if g.layout != torch.strided else g) for g in parts]
    scale = getattr(optimizer, "grad_scale", None)
    if isinstance(scale, torch.Tensor):
        inverse = 1.0 / scale
        parts = [g * inverse.to(g.device, non_blocking=True) for g in parts]
    return Gradients(
        names=tuple(names.get(id(p), "unnamed") for p in held),
        parameters=tuple(held),
        tensors=tuple(parts),
        offsets=tuple(_offset(p) for p in held),
    )


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as pairs of real ones, shape (..., 2), which is what optimizers make of them; others as is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def own_gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """This process's gradients as the optimizer holds them, without names; shorter than :func:`read_gradients`."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if all(type(g) is torch.Tensor and not g.is_sparse for g in grads):
        return grads
    return [g.coalesce().values() if g.is_sparse else local(g) for g in grads]


def gradient_norm(gradients: Sequence[torch.Tensor]) -> Number:
    """Length of all of them together, squares added up in double precision; no device synchronisation."""
    with torch.no_grad():
        norms = torch._foreach_norm(list(gradients))
        if all(norm.is_cpu for norm in norms):  # two thirds of the time that two more kernels take for six tensors
            squares = [norm * norm for norm in [norm.item() for norm in norms]]
            return math.sqrt(sum(squares))
        wide = None if norms[0].device.type == "mps" else torch.float64  # which that device does not have
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), dtype=wide)
        return total


def _offset(parameter: torch.Tensor) -> int:
    """Where this process's shard begins; exact for one that is cut along its first dimension, as FSDP2 does."""
    if not is_distributed_tensor(parameter):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        parameter.shape,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
    )
    rows = offset[0] if offset else 0
    return int(rows) * math.prod(parameter.shape[1:])
