"""Layouts whose parameters are DTensors: FSDP2 gathered or as it trains, and tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dyntune.errors import DyntuneError, HVPUnsupportedError, InvalidArgumentError
from dyntune.numerics.spread import Spread
from dyntune.numerics.vectors import Vector, VectorSpace
from dyntune.objective.dtensor import is_distributed_tensor, like, local, part_of, shard_of
from dyntune.objective.fsdp import (
    fsdp_modules,
    lent_group,
    recover,
    refuse_low_precision,
    refuse_old_fsdp,
    reshard,
    without_fsdp_hooks,
)
from dyntune.objective.groups import is_broken_off
from dyntune.objective.layout import KINDS, Alone, Layout, Replicas, failure_report
from dyntune.objective.precision import FullPrecision, measured_dtype
from dyntune.objective.team import InterruptedPassError, Team

__all__ = ["Gathered", "Parallel", "ProcessGroupLike", "Sharded", "layout_of"]

# What a gathered product holds at once: the whole parameters, their gradient, v, H v, and H v on its way to the other
# processes (tests/distributed/test_cost.py counts them).
GATHERED_COPIES = 5
# "auto", None, a torch ProcessGroup, or a Team; torch's own type is opaque to type checkers.
ProcessGroupLike = Any


class _Shards(Layout):
    """Vectors are lists of this process's parts."""

    team: Team

    def __init__(self, model: nn.Module, team: Team) -> None:
        super().__init__(model, team)
        self.selected: list[nn.Parameter] = []

    def settle(self) -> None:
        """What an earlier forward pass left whole is a plain parameter; sharded it is the one that is trained."""
        reshard(self.model)

    def space(self, parameters: Sequence[nn.Parameter]) -> VectorSpace:
        """See :class:`Layout`."""
        self.selected = selected = list(parameters)
        parts = [local(p) for p in selected]
        dtypes = [measured_dtype(p.dtype) for p in selected]
        nbytes = sum(t.numel() * d.itemsize for t, d in zip(parts, dtypes, strict=True))
        rank, size = self.team.rank, self.team.size
        spread = Spread(
            shapes=tuple(p.shape for p in selected),
            weights=tuple(1.0 / self._holders(p) for p in selected),
            nbytes=int(self.worst([float(nbytes)])[0]),
            total=self.team.total,
            part=lambda i, t: part_of(selected[i], t, rank=rank, size=size),
            present=lambda i, t: like(selected[i], t),
            cut=True,
        )
        return VectorSpace([t.shape for t in parts], dtypes, [t.device for t in parts], spread=spread)

    def _holders(self, parameter: torch.Tensor) -> int:
        """How many of the team's processes hold the same entries."""
        if not is_distributed_tensor(parameter):
            return self.team.size
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        return math.prod(mesh.size(d) for d, placement in enumerate(placements) if placement.is_replicate())


class _Native(_Shards):
    """The model's own distributed forward and backward passes run, on a group of ours that is lent to it.

    A process that fails in mid-pass closes that group: the others' collectives end with an error there and then, and
    all hear the cause by the team's other group.
    """

    native = True

    def __init__(self, model: nn.Module, team: Team) -> None:
        super().__init__(model, team)
        self._lending = ExitStack()

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model communicates by our group."""
        with ExitStack() as self._lending:
            self._lending.enter_context(lent_group(self.model, self.team.group_for_passes()))
            yield

    def left(self, failure: BaseException) -> BaseException:
        """See :class:`Layout`."""
        self._lending.close()  # a group is closed when nothing refers to it any more
        self.team.leave_pass()
        if not is_broken_off(failure) or isinstance(failure, DyntuneError):
            return failure
        return InterruptedPassError(
            f"a collective of the model's own did not come to its end ({str(failure).strip().splitlines()[0][:200]}): "
            f"another process was killed, or did not make the same pass within {self.team.timeout:g} s. All ranks have "
            "to measure at the same step."
        )

    def check_batches(self, counts: Sequence[int]) -> None:
        """Every pass is a collective of the model's own.

        Raises:
            InvalidArgumentError: The processes hold different numbers of batches.
        """
        if len(set(counts)) > 1:
            raise InvalidArgumentError(
                f"the processes hold {list(counts)} batches, and every forward pass of a sharded model is a "
                "collective: some would wait for ever. Give every process as many batches (they may differ in rows)."
            )

    def told(self, failure: BaseException | None) -> None:
        """After every product of the model's own: all go on, or all raise."""
        if (verdict := self.shared_failure(failure)) is not None:
            raise verdict

    def inner_norm(self, space: VectorSpace) -> Callable[[Sequence[torch.Tensor]], float]:
        """See :class:`Layout`."""
        return lambda vector: space.norm([local(t) for t in vector])


class Gathered(_Shards):
    """FSDP2 with whole parameters on every process while measuring: exact products of the plain model.

    The shards are gathered once per session, and FSDP's hooks set aside; nothing of FSDP runs, so no process can be
    left waiting in a collective of the user's group.
    """

    name = "gathered"

    def precision(self) -> FullPrecision:
        """Whole copies of all sharded parameters."""
        return _WholeCopies(self)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """FSDP's hooks set aside."""
        with without_fsdp_hooks(self.model):
            yield

    def spread_out(self, vector: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Whole vectors from everybody's parts."""
        return self.gather(self.selected, vector)

    def gather(self, parameters: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> Vector:
        """Whole tensors from every process's parts, in one collective."""
        cuts = self._cuts(parameters)
        sharded = [i for i, (dim, _) in enumerate(cuts) if dim is not None]
        if not sharded:
            return list(parts)
        dtype = max((parts[i].dtype for i in sharded), key=lambda d: torch.finfo(d).bits)
        shapes = [[self._shape(parameters[i], *cuts[i], rank) for i in sharded] for rank in range(self.team.size)]
        numels = [[math.prod(shape) for shape in row] for row in shapes]
        longest = max(map(sum, numels))
        mine = torch.zeros(longest, dtype=dtype, device=self.device)
        flat = torch.cat([parts[i].reshape(-1).to(dtype) for i in sharded])
        mine[: flat.numel()] = flat
        rows = [torch.split(row[: sum(n)], n) for row, n in zip(self.team.gather(mine), numels, strict=True)]
        whole = list(parts)
        for place, i in enumerate(sharded):
            pieces = [row[place].view(shape[place]) for row, shape in zip(rows, shapes, strict=True)]
            whole[i] = torch.cat(pieces, int(cuts[i][0] or 0)).to(parts[i].dtype)
        return whole

    def collect(self, own: Sequence[torch.Tensor], failure: BaseException | None = None) -> Vector:
        """One reduce-scatter: everybody's share of this process's parts, and in a few more entries how it went."""
        size, cuts, told = self.team.size, self._cuts(self.selected), len(KINDS)
        dtype = max((t.dtype for t in own), key=lambda d: torch.finfo(d).bits)
        pieces = [
            [t.detach()] * size if dim is None else list(torch.split(t.detach(), lengths, dim))
            for t, (dim, lengths) in zip(own, cuts, strict=True)
        ]
        numels = [[p[rank].numel() for p in pieces] for rank in range(size)]
        rows = torch.zeros(size, told + max(map(sum, numels)), dtype=dtype, device=self.device)
        for rank, row in enumerate(rows):
            row[:told] = failure_report(failure, row)
            torch.cat([p[rank].reshape(-1).to(dtype) for p in pieces], out=row[told : told + sum(numels[rank])])
        rows[:, told:] *= self.share
        mine = self.team.scatter(rows)
        if bool(mine[:told].any()) and (verdict := self.verdict(mine[:told].tolist(), failure)) is not None:
            raise verdict
        numel = numels[self.team.rank]
        parts = torch.split(mine[told : told + sum(numel)], numel)
        return [part.view(local(p).shape).to(t.dtype) for part, p, t in zip(parts, self.selected, own, strict=True)]

    def _cuts(self, parameters: Sequence[torch.Tensor]) -> list[tuple[int | None, list[int]]]:
        return [shard_of(p, self.team.size) if is_distributed_tensor(p) else (None, []) for p in parameters]

    def _shape(self, parameter: torch.Tensor, dim: int | None, lengths: Sequence[int], rank: int) -> list[int]:
        shape = list(parameter.shape)
        assert dim is not None
        shape[dim] = lengths[rank]
        return shape


class _WholeCopies(FullPrecision):
    """Whole copies of sharded parameters, in the precision in which they are measured."""

    def __init__(self, layout: Gathered) -> None:
        super().__init__(layout.model)
        self._layout = layout
        self._note = super().note
        self._stored = list(layout.model.parameters())

    def __bool__(self) -> bool:
        return bool(self._note)

    @property
    def note(self) -> str:
        """See :class:`FullPrecision`."""
        return self._note

    def copies_of(self, stored: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """One collective for all."""
        parts = [local(p.detach()) for p in stored]
        whole = self._layout.gather(stored, parts)
        return [t.to(measured_dtype(t.dtype), copy=t is part) for t, part in zip(whole, parts, strict=True)]


class Parallel(_Native):
    """Tensor-parallel DTensors: autograd through the model's own collectives; all processes see the same data."""

    name = "parallel"
    splits_data = False

    def spread_out(self, vector: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Parts as DTensors."""
        return [like(p, v) for p, v in zip(self.selected, vector, strict=True)]

    def collect(self, own: Sequence[torch.Tensor], failure: BaseException | None = None) -> Vector:
        """The parts; the model's own collectives have done the rest."""
        self.told(failure)
        return self.parts(own)

    def parts(self, vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """DTensors as parts: torch takes no list of both kinds."""
        rank, size = self.team.rank, self.team.size
        return [part_of(p, t.detach(), rank=rank, size=size) for p, t in zip(self.selected, vector, strict=True)]


class Sharded(_Native):
    """FSDP2 as it trains: no process ever holds the whole, gradients come from FSDP's own backward pass."""

    name = "sharded"

    def __init__(self, model: nn.Module, team: Team) -> None:
        super().__init__(model, team)
        refuse_low_precision(model)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Sharded before and after: what an earlier forward pass left whole would stand still when the shards move."""
        reshard(self.model)
        try:
            with super().prepared():
                yield
        except BaseException:
            recover(self.model)
            raise
        finally:
            reshard(self.model)

    def spread_out(self, vector: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """See :class:`Layout`."""
        return vector

    def collect(self, own: Sequence[torch.Tensor], failure: BaseException | None = None) -> Vector:
        """FSDP's reduction has done it."""
        self.told(failure)
        return list(own)


def layout_of(model: nn.Module, plain: nn.Module, process_group: ProcessGroupLike, *, gather_limit: float) -> Layout:
    """The layout of a model.

    Args:
        model: As the user gave it, perhaps wrapped in DDP.
        plain: The same without wrappers.
        process_group: ``"auto"``: that of DDP, or of the DTensors' mesh, else none; None: this process alone; a process
            group or a :class:`Team`: its processes.
        gather_limit: Bytes that the whole parameters of a model sharded by FSDP may take on each process.

    Raises:
        InvalidArgumentError: The model is sharded and `process_group` is None.
        HVPUnsupportedError: FSDP1, several meshes, a mesh of several dimensions, or DDP around shards.
    """
    refuse_old_fsdp(plain)
    reshard(plain)
    ddp = _ddp_group(model)
    meshes = {p.device_mesh for p in plain.parameters() if is_distributed_tensor(p)}  # type: ignore[attr-defined]
    if process_group is None and meshes:
        raise InvalidArgumentError(
            "the model's parameters are sharded over several processes, and this call measures one alone. Where it "
            "takes process_group, leave it out and make the same call on every rank; elsewhere measure an unsharded "
            "copy."
        )
    if process_group is None or (process_group == "auto" and not meshes and ddp is None):
        return Alone(plain, None)
    given = process_group if isinstance(process_group, Team) else None
    if given is not None:
        given.renew()
    if not meshes:
        return Replicas(plain, given or Team(ddp if process_group == "auto" else process_group))
    if len(meshes) > 1 or ddp is not None or (mesh := meshes.pop()).ndim != 1:
        raise HVPUnsupportedError(
            "the model combines kinds of parallelism (HSDP, FSDP with tensor parallelism, DDP around shards, or "
            "several device meshes), which is not supported yet. Measure a model with one-dimensional FSDP2 or tensor "
            "parallelism."
        )
    team = given or Team(mesh.get_group())
    if not fsdp_modules(plain):
        return Parallel(plain, team)
    size = sum(p.numel() * measured_dtype(p.dtype).itemsize for p in plain.parameters())
    layout = Gathered(plain, team)
    return Sharded(plain, team) if layout.worst([GATHERED_COPIES * size - gather_limit])[0] > 0 else layout


def _ddp_group(model: nn.Module) -> Any:
    """The process group of DDP, if the model is wrapped in it."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model.process_group
