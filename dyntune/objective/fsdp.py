"""FSDP2 (``fully_shard``): its modules, its hooks, and gradients by its own backward pass."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dyntune.errors import HVPUnsupportedError
from dyntune.numerics.vectors import Vector
from dyntune.objective.dtensor import is_distributed_tensor, local
from dyntune.objective.precision import LOW_PRECISION
from dyntune.objective.state import BorrowedBuffers, undone

if TYPE_CHECKING:
    from dyntune.objective.objective import Objective

__all__ = [
    "backward_gradient",
    "fsdp_modules",
    "lent_group",
    "moved_shards",
    "recover",
    "refuse_low_precision",
    "refuse_old_fsdp",
    "reshard",
    "without_fsdp_hooks",
]


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was applied to."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Let every FSDP module give up its whole parameters; the next forward pass gathers them again."""
    for module in fsdp_modules(model):
        module.reshard()


@contextmanager
def without_fsdp_hooks(model: nn.Module) -> Iterator[None]:
    """Forward passes that FSDP does not see."""
    touched = []
    try:
        for module in fsdp_modules(model):
            state = module._get_fsdp_state()
            for name, handle in (
                ("_forward_pre_hooks", state._pre_forward_hook_handle),
                ("_forward_hooks", state._post_forward_hook_handle),
            ):
                hooks = getattr(module, name)
                if handle.id in hooks:
                    kept = type(hooks)((key, hook) for key, hook in hooks.items() if key != handle.id)
                    touched.append((module, name, hooks))
                    setattr(module, name, kept)
        yield
    finally:
        for module, name, hooks in reversed(touched):
            setattr(module, name, hooks)


def refuse_old_fsdp(model: nn.Module) -> None:
    """Raise HVPUnsupportedError for FSDP1."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None and any(isinstance(m, module.FullyShardedDataParallel) for m in model.modules()):
        raise HVPUnsupportedError(
            "the model uses FullyShardedDataParallel (FSDP1), whose flat parameters have lost their names and shapes. "
            "Use FSDP2: torch.distributed.fsdp.fully_shard(model)."
        )


def _parameter_groups(model: nn.Module) -> list[Any]:
    groups = []
    for module in fsdp_modules(model):
        state = module._get_fsdp_state()
        several = getattr(state, "_fsdp_param_groups", None)
        groups += [state._fsdp_param_group] if several is None else list(several)
    return [group for group in groups if group is not None]


def recover(model: nn.Module) -> None:
    """After a pass that was broken off, FSDP believes to be in the middle of one: let it begin anew."""
    for module in fsdp_modules(model):
        if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):
            module.reset_iter_state()


@contextmanager
def lent_group(model: nn.Module, group: Any) -> Iterator[None]:
    """Let FSDP and DTensor operations communicate by `group`, of the same processes, instead of the user's."""
    places: list[tuple[Any, str, Any]] = []
    for held in _parameter_groups(model):
        names = ("shard_process_group", "reduce_scatter_process_group")
        places += [(held.mesh_info, name, group) for name in names if getattr(held.mesh_info, name, None) is not None]
        if held.post_forward_mesh_info is not None:  # resharded to fewer processes, which is another group
            places.append((held, "post_forward_mesh_info", held.mesh_info))
    meshes = {id(p.device_mesh): p.device_mesh for p in model.parameters() if is_distributed_tensor(p)}  # type: ignore[attr-defined]
    places += [(mesh, "_dim_group_names", [group.group_name]) for mesh in meshes.values()]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, lent in places:
            setattr(owner, name, lent)
        yield
    finally:
        for owner, name, held in reversed(before):
            setattr(owner, name, held)


# What gradient accumulation and custom scaling switch, and what a backward pass of ours needs.
_NEUTRAL = {
    "reduce_grads": True,
    "all_reduce_grads": True,
    "reshard_after_backward": True,
    "unshard_in_backward": True,
    "gradient_divide_factor": None,
}


@contextmanager
def plain_reduction(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Backward passes that average gradients over the processes and trigger nothing of the user's.

    Optimizers that step within the backward pass hang on the parameters' post-accumulate hooks. Gradients that are
    accumulated without synchronisation lie in FSDP's own whole parameters; it would reduce them with ours.
    """
    groups = _parameter_groups(model)
    places: list[tuple[Any, str, Any]] = [(g, name, value) for g in groups for name, value in _NEUTRAL.items()]
    for held in (p for group in groups for p in group.fsdp_params):
        places.append((held, "unsharded_accumulated_grad", None))
        if (whole := getattr(held, "_unsharded_param", None)) is not None:
            places.append((whole, "grad", None))
    places += [(p, "_post_accumulate_grad_hooks", None) for p in parameters]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places if hasattr(owner, name)]
    try:
        for owner, name, value in places:
            if hasattr(owner, name):
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, held in before:
            setattr(owner, name, held)


def refuse_low_precision(model: nn.Module) -> None:
    """Raise where FSDP itself computes or reduces in half precision: differences of such gradients are noise.

    Raises:
        HVPUnsupportedError: By its policy, or because that is what parameters are stored in.
    """
    found = [
        (d, "FSDP's MixedPrecisionPolicy computes or reduces") for d in _policy_dtypes(model) if d in LOW_PRECISION
    ]
    found += [(p.dtype, "parameters are stored") for p in model.parameters() if p.dtype in LOW_PRECISION]
    if found:
        dtype, what = found[0]
        raise HVPUnsupportedError(
            f"{what} in {dtype}, and finite differences of such gradients are noise. Measure exactly (method='exact', "
            "which gathers whole float32 parameters on every process), or a float32 copy of the model sharded without "
            "a policy."
        )


def _policy_dtypes(model: nn.Module) -> list[torch.dtype | None]:
    policies = [module._get_fsdp_state()._mp_policy for module in fsdp_modules(model)]
    return [dtype for policy in policies for dtype in (policy.param_dtype, policy.reduce_dtype)]


def backward_gradient(objective: Objective, buffers: BorrowedBuffers) -> Vector:
    """This process's parts of the gradient over all processes' data, by FSDP's own backward pass.

    FSDP averages over the processes; each loss is scaled so that this becomes the mean by count.
    """
    team = objective.layout.team
    assert team is not None
    parameters = list(objective.parameters.values())
    with plain_reduction(objective.model, list(objective.model.parameters())):
        try:
            for index in range(len(objective.batches)):
                loss = objective.batch_loss(index, buffers)
                scale = team.size * objective.layout.share * objective.batch_share(loss.weight)
                torch.autograd.backward(loss.value * scale)
            parts = [
                torch.zeros_like(local(p)) if p.grad is None else local(p.grad).detach().clone() for p in parameters
            ]
        finally:
            for p in objective.model.parameters():
                p.grad = None
    return parts


@contextmanager
def moved_shards(parameters: Iterable[nn.Parameter], vector: Sequence[torch.Tensor], shift: float) -> Iterator[None]:
    """``x + shift * vector`` in the shards x, whose bits are put back at the end.

    FSDP gathers from the shards themselves: nothing can stand in for them. ``.data`` leaves their version counters
    alone, and so a graph that the user holds stays valid.
    """
    shards = [local(p.detach()).data for p in parameters]
    saved = [s.clone() for s in shards]

    def undo() -> None:
        for shard, before in zip(shards, saved, strict=True):
            shard.copy_(before)

    with undone(undo):
        for shard, before, v in zip(shards, saved, vector, strict=True):
            torch.add(before, v, alpha=shift, out=shard)
        yield
