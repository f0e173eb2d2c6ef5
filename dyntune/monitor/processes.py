"""Which process of a job this is, and what it can measure without talking to the others: :func:`place_of`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from torch import nn

from dyntune.objective.dtensor import is_distributed_tensor

__all__ = ["Place", "place_of"]

# Of this process, since it joined its job: all processes of a job are taken to make theirs in the same order, but what
# each did before is its own matter.
_made: dict[int, Iterator[int]] = {}


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process.

    Args:
        rank: Of the job.
        world: Processes of the job.
        run_id: What names the run on all of them; None: to be drawn.
        scope: What the numbers are of, in words.
        bursts: Whether gradients are looked at here.
        no_curvature: Why curvature is not measured here; empty where it is.
    """

    rank: int = 0
    world: int = 1
    run_id: str | None = None
    scope: str = "the whole model"
    bursts: bool = True
    no_curvature: str = ""


def place_of(model: nn.Module) -> Place:
    """Where we are. No collective is called: a monitor on some of the processes, or at other steps, holds up nobody.

    Replicas (DDP) have the same gradients everywhere, so rank 0 alone looks at them, and measures curvature on its own
    part of the data. Shards (FSDP2, tensor parallelism) differ: every process records those of its own, and curvature,
    which would take all of them at the same moment, is left to :func:`dyntune.sharpness`.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Place()
    rank, world = dist.get_rank(), dist.get_world_size()
    run_id = _shared_id()
    if any(is_distributed_tensor(p) for p in model.parameters()):
        return Place(
            rank=rank,
            world=world,
            run_id=run_id,
            scope=f"the shards of rank {rank} of {world}",
            no_curvature="the parameters are sharded, and the monitor calls no collective: call dyntune.sharpness(...) "
            "on all ranks at the same step",
        )
    return Place(
        rank=rank,
        world=world,
        run_id=run_id,
        scope=f"gradients as rank {rank} of {world} has them, curvature of its part of the data",
        bursts=rank == 0,
        no_curvature="" if rank == 0 else "rank 0 measures it",
    )


def _shared_id() -> str | None:
    """A name that whoever comes first to the job's store leaves there; it is not waited for."""
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store()
    if id(store) not in _made:
        _made.clear()
        _made[id(store)] = count()
    key = f"dyntune/run/{next(_made[id(store)])}"
    try:
        return store.compare_set(key, "", uuid.uuid4().hex).decode()
    except (RuntimeError, ValueError, NotImplementedError):  # a store that cannot compare and set
        return None
