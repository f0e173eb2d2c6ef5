"""DTensors: parts, wholes and cuts, without loading what defines them before a model has some."""

from __future__ import annotations

import sys

import torch

from dyntune.errors import HVPUnsupportedError

__all__ = ["is_distributed_tensor", "like", "local", "part_of", "shard_of"]


def is_distributed_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, when it has arrived."""
    part: torch.Tensor = tensor.to_local() if is_distributed_tensor(tensor) else tensor  # type: ignore[attr-defined]
    module = sys.modules.get("torch.distributed._functional_collectives")
    if module is not None and isinstance(part, module.AsyncCollectiveTensor):
        part = part.trigger_wait()
    return part


def like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A part as the DTensor that the parameter is."""
    if not is_distributed_tensor(parameter):
        return part
    from torch.distributed.tensor import DTensor

    wrapped: torch.Tensor = DTensor.from_local(
        part,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return wrapped


def shard_of(parameter: torch.Tensor, size: int) -> tuple[int | None, list[int]]:
    """Along which dimension a DTensor on a one-dimensional mesh is cut, and into which lengths.

    Raises:
        HVPUnsupportedError: The mesh has several dimensions, or the cut is none of torch.chunk's.
    """
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1 or mesh.size() != size:
        raise HVPUnsupportedError(
            f"parameters on a mesh of {mesh.ndim} dimensions {tuple(mesh.shape)} (HSDP, or FSDP with tensor "
            "parallelism) are not supported yet: their shards would have to be put together along each. Measure a "
            "one-dimensional FSDP2 or tensor-parallel model."
        )
    placement = placements[0]
    if placement.is_replicate():
        return None, []
    if not placement.is_shard():
        raise HVPUnsupportedError(f"parameters placed as {placement} cannot be measured: use Shard or Replicate.")
    dim = placement.dim % parameter.dim()
    length = parameter.shape[dim]
    step = -(-length // size)  # torch.chunk: equal pieces, the last ones shorter or empty
    pieces = [max(0, min(step, length - step * rank)) for rank in range(size)]
    return dim, pieces


def part_of(parameter: torch.Tensor, tensor: torch.Tensor, *, rank: int, size: int) -> torch.Tensor:
    """The part of `tensor` (a DTensor, or a plain one of the whole shape) that goes with this process's parameter."""
    if is_distributed_tensor(tensor):
        return local(tensor.redistribute(placements=parameter.placements))  # type: ignore[attr-defined]
    if tensor.shape != parameter.shape or not is_distributed_tensor(parameter):
        return tensor
    dim, pieces = shard_of(parameter, size)
    return tensor if dim is None else torch.split(tensor, pieces, dim)[rank]
