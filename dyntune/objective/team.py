"""Processes that measure together: a process group of our own, collectives that are counted, errors that all hear of.

A collective that one process misses leaves the others waiting, so every block in which a process may fail ends with
an exchange of how it went, and then all go on or all raise. What no exchange can reach (a process that was killed, or
does not come) ends with the group's timeout, which is ours: the user's own groups are not used and not harmed.

A model that communicates in its own forward pass is lent a second group. A process that fails in such a pass closes
it, the others' collectives end at once, and the first group is still there to say what happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dyntune.errors import DistributedError, InvalidArgumentError
from dyntune.objective.groups import give_up, own_group

__all__ = ["InterruptedPassError", "Team"]

# Seconds until a process that does not answer is given up: what NCCL's own groups have by default in torch.
TIMEOUT = 600.0
# Error messages travel between processes in this many bytes.
MESSAGE_BYTES = 512

# torch 2.13 renamed it, and warns at every call by the old name.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class InterruptedPassError(DistributedError):
    """A collective of the model's own ended because another process left or did not come: no cause of this one's."""


class Team:
    """The processes of a ``torch.distributed`` job that measure together.

    Every process has to make the same calls in the same order, as with any collective. The group is made at the first
    use and shared by all teams of the same processes and timeout.

    Args:
        process_group: Whose processes; default all of the job's.
        timeout: Seconds after which a process that does not answer is given up, > 0.

    The attributes ``num_collectives`` and ``num_bytes`` count what this process has sent since.

    Raises:
        InvalidArgumentError: No process group is initialised, this process is not in it, or ``timeout <= 0``.

    Example:
        >>> import torch.distributed as dist
        >>> dist.is_initialized()  # Team() needs a job: torchrun, then dist.init_process_group()
        False
    """

    def __init__(self, process_group: Any = None, *, timeout: float = TIMEOUT) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidArgumentError(
                "no torch.distributed job is running in this process: call dist.init_process_group() first, or leave "
                "process_group out."
            )
        if not timeout > 0:
            raise InvalidArgumentError(f"timeout={timeout}: give seconds, > 0.")
        self.ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(process_group or dist.group.WORLD))
        if dist.get_rank() not in self.ranks:
            raise InvalidArgumentError(
                f"this process (rank {dist.get_rank()}) is not in the process group {self.ranks}."
            )
        self.rank = self.ranks.index(dist.get_rank())
        self.size = len(self.ranks)
        self.timeout = timeout
        self.num_collectives = 0
        self.num_bytes = 0
        self.renew()

    def renew(self) -> None:
        """Begin a new measurement: with a new group, where an earlier failure was the end of the old one.

        Raises:
            DistributedError: Not all processes came within the timeout.
        """
        self.broken = ""
        self._group = self._own_group("agreeing")

    def _own_group(self, purpose: str) -> Any:
        with self._reaching("a process group could not be made"):
            return own_group(self.ranks, self.timeout, purpose)

    def group_for_passes(self) -> Any:
        """The group that is lent to models which communicate; all processes ask for it together."""
        return self._own_group("passes")

    def leave_pass(self) -> None:
        """Close the group for passes: a collective in which others wait for this process ends there with an error."""
        give_up(self.ranks, self.timeout, "passes")

    # -- collectives ---------------------------------------------------------------------------------------------

    @contextmanager
    def _reaching(self, failure: str) -> Iterator[None]:
        if self.broken:
            raise DistributedError(
                f"measuring together ended with an earlier failure: {self.broken}. Make a new operator."
            )
        try:
            yield
        except RuntimeError as error:  # DistBackendError, timeouts and closed connections of gloo alike
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.broken = f"{failure} ({lines[0][:200]})"
            give_up(self.ranks, self.timeout, "agreeing")
            raise DistributedError(
                f"{self.broken}. Another process failed, was killed, or did not make the same call within "
                f"{self.timeout:g} s; all ranks have to measure at the same step. Training is not affected, and "
                "a new measurement that all ranks make tries again."
            ) from error

    def _count(self, tensor: torch.Tensor) -> None:
        self.num_collectives += 1
        self.num_bytes += tensor.numel() * tensor.element_size()

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place; the same bits everywhere."""
        with self._reaching("an all-reduce failed"):
            dist.all_reduce(tensor, group=self._group)
        self._count(tensor)
        return tensor

    def agree(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first process's numbers, in place."""
        with self._reaching("a broadcast failed"):
            dist.broadcast(tensor, src=self.ranks[0], group=self._group)
        self._count(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """One row per process: the shape of `tensor` behind a dimension of length `size`."""
        rows = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        with self._reaching("an all-gather failed"):
            dist.all_gather(list(rows.unbind()), tensor.contiguous(), group=self._group)
        self._count(tensor)
        return rows

    def scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's row of the sum of `rows`, shape (size, n), over the processes."""
        mine = torch.empty_like(rows[0])
        with self._reaching("a reduce-scatter failed"):
            _reduce_scatter(mine, rows.reshape(-1), group=self._group)
        self._count(rows)
        return mine

    # -- agreeing ------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, what: str, device: torch.device) -> Iterator[None]:
        """All processes leave this block well, or all raise.

        Args:
            what: What is being done, for the message of those that were well.
            device: Where collectives run.

        Raises:
            DistributedError: Another process raised; that one raises its own error.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        if isinstance(failure, DistributedError) and self.broken:
            raise failure
        causes = self.failures(failure, device)
        if failure is not None and not isinstance(failure, InterruptedPassError):
            raise failure
        if causes:
            raise DistributedError(f"{what} failed on {causes}") from failure
        if failure is not None:
            raise failure

    def failures(self, failure: BaseException | None, device: torch.device) -> str:
        """Which ranks failed and why, "" if none did; a collective, and a second one if any did."""
        flags = torch.zeros(1, device=device)
        flags += failure is not None
        return self.causes(failure, device) if float(self.total(flags)) else ""

    def causes(self, failure: BaseException | None, device: torch.device) -> str:
        """What failed where, in words; "" if nothing did but waiting for others. A collective."""
        said = failure is not None and not isinstance(failure, InterruptedPassError)
        text = f"{type(failure).__name__}: {failure}" if said else ""
        raw = text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
        rows = self.gather(torch.tensor(list(raw), dtype=torch.uint8, device=device)).cpu()
        texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
        return "; ".join(f"rank {rank}: {text}" for rank, text in zip(self.ranks, texts, strict=True) if text)

    def all_numbers(self, numbers: Sequence[float], device: torch.device) -> list[list[float]]:
        """Everybody's numbers (as many from each), in float64."""
        rows = self.gather(torch.tensor(list(numbers), dtype=torch.float64, device=device))
        return [[float(x) for x in row] for row in rows.tolist()]

    def __repr__(self) -> str:
        return f"Team({self.size} processes, {self.num_collectives} collectives, {self.num_bytes / 2**20:.1f} MiB sent)"
