"""How a model lies on the processes of a job, and what that makes of a product, a loss and a gradient.

============== ======================================= ===================================================
layout         which models                            one product
============== ======================================= ===================================================
alone          no job, or `process_group=None`         nothing is sent
replicas       DDP, or plain copies with a group       one flat all-reduce
gathered       FSDP2, exact                            one all-gather of v, one reduce-scatter of H v
sharded        FSDP2, finite differences               FSDP's own collectives, four gradients
parallel       tensor-parallel DTensors                those of the model's own operations
============== ======================================= ===================================================

Averages over processes are weighted by count, as those over batches are: unequal shards of the data give the Hessian of
all data together (DDP's own gradient is the mean of the processes' means, which differs when shards are unequal).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dyntune.errors import DistributedError, HVPUnsupportedError, InvalidArgumentError
from dyntune.numerics.operator import Product
from dyntune.numerics.spread import Spread
from dyntune.numerics.vectors import Vector, VectorSpace, norm
from dyntune.objective.dtensor import local
from dyntune.objective.precision import FullPrecision, measured_dtype
from dyntune.objective.team import InterruptedPassError, Team

__all__ = ["KINDS", "Alone", "Layout", "Replicas", "failure_report", "kind_of_failure"]

# What a process reports of a failure, by position: the first follows from another process's failure, the next two can
# be met by another way of making products.
INTERRUPTED, UNSUPPORTED, OUT_OF_MEMORY, OTHER = KINDS = range(4)

# Sums and norms of replicas' parameters, relative to the norm: float64 sums of equal bits agree to 1e-13, one step of
# training apart differs by 1e-3 and more; drift of replicas on unlike hardware, where it is harmless, stays below.
SAME_POINT = 1e-5


def kind_of_failure(error: BaseException) -> int:
    """Which of INTERRUPTED, UNSUPPORTED, OUT_OF_MEMORY and OTHER an error is."""
    from dyntune.objective.hvp import is_unsupported
    from dyntune.objective.memory import is_out_of_memory

    if isinstance(error, InterruptedPassError):
        return INTERRUPTED
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return UNSUPPORTED if is_unsupported(error) else OTHER


def failure_report(failure: BaseException | None, like: torch.Tensor) -> torch.Tensor:
    """Entries to be added up over the processes: how many failed, by kind."""
    report = torch.zeros(len(KINDS), dtype=like.dtype, device=like.device)
    if failure is not None:
        report[kind_of_failure(failure)] = 1
    return report


class Layout(ABC):
    """Where parameters and data lie; see the module's docstring.

    Args:
        model: The unwrapped model.
        team: Who measures together; None for this process alone.

    The attributes are ``share``, the weight of this process's loss in the whole, ``first_batch``, the number of batches
    that earlier processes hold, and the totals ``num_batches`` and ``num_rows``.
    """

    name: str
    splits_data = True  # whether every process has data of its own
    native = False  # whether the model's own distributed forward pass runs

    def __init__(self, model: nn.Module, team: Team | None) -> None:
        self.model = model
        self.team = team
        self.share = 1.0
        self.first_batch = 0
        self.num_batches = 0
        self.num_rows = 0

    @property
    def device(self) -> torch.device:
        """Where this process computes, and its collectives run."""
        return next(local(p).device for p in self.model.parameters())

    def precision(self) -> FullPrecision:
        """What stands in for parameters while measuring."""
        return FullPrecision(self.model)

    @abstractmethod
    def space(self, parameters: Sequence[nn.Parameter]) -> VectorSpace:
        """Vectors shaped like this process's parts of the parameters."""

    def settle(self) -> None:  # noqa: B027 - nothing to do is a fine answer
        """Bring the parameters into the state in which they are named and selected."""

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The scope of forward passes of ours."""
        yield

    # -- agreeing ------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """All processes leave this block well, or all raise."""
        if self.team is None:
            yield
            return
        try:
            with self.team.together(what, self.device):
                try:
                    yield
                except BaseException as error:
                    failure = self.left(error)
                    if failure is error:
                        raise
                    raise failure from error
        except BaseException as error:
            self.left(error)  # of another process's: what was shared with it is over here, too
            raise

    def left(self, failure: BaseException) -> BaseException:
        """Called when a failure leaves a pass: what it is to be reported as."""
        return failure

    def worst(self, values: Sequence[float]) -> list[float]:
        """Elementwise maximum over the processes."""
        if self.team is None:
            return list(values)
        return [max(column) for column in zip(*self.team.all_numbers(values, self.device), strict=True)]

    def shared_failure(self, failure: BaseException | None) -> BaseException | None:
        """What this process has to raise, given how its own step went; a collective."""
        if self.team is None:
            return failure
        failure = None if failure is None else self.left(failure)
        if isinstance(failure, DistributedError) and self.team.broken:
            return failure
        counts = self.team.total(failure_report(failure, torch.zeros(0, device=self.device)))
        return self.verdict(counts.tolist(), failure)

    def verdict(self, counts: Sequence[float], failure: BaseException | None) -> BaseException | None:
        """All processes answer a failure alike: with the same fallback, or by giving up. Another collective then."""
        assert self.team is not None
        if not any(counts):
            return None
        worst = max(kind for kind in KINDS if counts[kind])
        causes = self.team.causes(failure, self.device)
        if failure is None or kind_of_failure(failure) != worst:
            if worst == UNSUPPORTED:
                failure = HVPUnsupportedError(f"an operation is not implemented for double backward ({causes}).")
            elif worst == OUT_OF_MEMORY:
                failure = torch.OutOfMemoryError(f"out of memory ({causes})")
            else:
                failure = DistributedError(f"measuring together failed on {causes}")
        return self.left(failure)

    def everybody(self, values: Sequence[float]) -> list[float]:
        """The values of all processes, in order; they may differ in number."""
        if self.team is None or not self.splits_data:
            return list(values)
        most = int(self.worst([float(len(values))])[0])
        rows = self.team.all_numbers([float(len(values)), *values, *[0.0] * (most - len(values))], self.device)
        return [value for count, *row in rows for value in row[: int(count)]]

    def refuse_native(self, what: str) -> None:
        """Raise where the model's own distributed passes run: `what` needs whole gradients on every process."""
        if self.native:
            raise HVPUnsupportedError(
                f"{what} needs whole gradients on every process, and this model is measured as it lies on several "
                f"({self.name}). Under FSDP2 pass method='exact', with room for the whole model on every process; "
                "under tensor parallelism measure an unsharded copy."
            )

    # -- the whole from the parts --------------------------------------------------------------------------------

    def place(self, *, num_batches: int, num_rows: int, signature: str) -> None:
        """Find out where this process's batches come among all; a collective.

        Args:
            num_batches: How many this process holds.
            num_rows: Rows in them.
            signature: What has to be the same on all processes.

        Raises:
            InvalidArgumentError: The processes measure different things.
        """
        self.num_batches, self.num_rows = num_batches, num_rows
        if self.team is None:
            return
        digest = int.from_bytes(hashlib.sha256(signature.encode()).digest()[:6], "big")  # float64 holds 53 bits
        everybody = self.team.all_numbers([num_batches, num_rows, digest, *self.position()], self.device)
        if any(numbers[2] != everybody[0][2] for numbers in everybody):
            raise InvalidArgumentError(
                "the processes measure different things (names, shapes, dtypes or selection of the parameters, train "
                f"or eval mode, or seed): this one {signature[:200]}. Make the same call on every rank."
            )
        self.check_position([numbers[3:] for numbers in everybody])
        counts = [int(numbers[0]) for numbers in everybody]
        self.check_batches(counts)
        if self.splits_data:
            self.first_batch = sum(counts[: self.team.rank])
            self.num_batches, self.num_rows = sum(counts), int(sum(numbers[1] for numbers in everybody))

    def weigh(self, weight: float, *, adds_up: bool) -> None:
        """Fix this process's share in the whole; a collective."""
        if self.team is not None and self.splits_data:
            weights = [numbers[0] for numbers in self.team.all_numbers([weight], self.device)]
            self.share = 1.0 if adds_up else weight / sum(weights)

    def position(self) -> list[float]:
        """Numbers that tell where in parameter space this process is, if all have to be at the same place."""
        return []

    def check_position(self, everybody: Sequence[Sequence[float]]) -> None:  # noqa: B027
        """Raise where the processes are not at the same place."""

    def check_batches(self, counts: Sequence[int]) -> None:  # noqa: B027
        """Raise where the processes hold numbers of batches with which they cannot compute."""

    def whole_loss(self, value: float) -> float:
        """The loss over all processes' data, from this one's."""
        if self.team is None or not self.splits_data:
            return value
        number = torch.tensor([value * self.share], dtype=torch.float64, device=self.device)
        return float(self.team.total(number))

    def across(self, product: Product) -> Product:
        """The product of the whole on this layout's vectors, from one on this process's data.

        A failure on one process reaches the others with the collective that would have brought its part.
        """

        def whole(vector: Sequence[torch.Tensor]) -> Vector:
            failure: BaseException | None = None
            spread = self.spread_out(vector)
            try:
                own = list(product(spread))
            except BaseException as error:
                if self.team is None:
                    raise
                failure, own = error, [torch.zeros_like(t) for t in spread]
            return self.collect(own, failure)

        return whole

    @abstractmethod
    def spread_out(self, vector: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """A vector as products on this process's data take it."""

    def parts(self, vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What products on this process's data return, as plain tensors."""
        return list(vector)

    @abstractmethod
    def collect(self, own: Sequence[torch.Tensor], failure: BaseException | None = None) -> Vector:
        """This layout's vector from what every process has found on its data; raises if one of them failed."""

    def inner_norm(self, space: VectorSpace) -> Callable[[Sequence[torch.Tensor]], float]:  # noqa: ARG002
        """The norm of vectors as products on this process's data take them."""
        return norm

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return {} if self.team is None else {"layout": self.name, "num_processes": self.team.size}


class Alone(Layout):
    """One process, all parameters."""

    name = "alone"

    def space(self, parameters: Sequence[nn.Parameter]) -> VectorSpace:
        """See :class:`Layout`."""
        dtypes = [measured_dtype(p.dtype) for p in parameters]
        return VectorSpace([p.shape for p in parameters], dtypes, [p.device for p in parameters])

    def across(self, product: Product) -> Product:
        """Nothing to do."""
        return product

    def spread_out(self, vector: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """See :class:`Layout`."""
        return vector

    def collect(self, own: Sequence[torch.Tensor], failure: BaseException | None = None) -> Vector:
        """See :class:`Layout`."""
        if failure is not None:
            raise failure
        return list(own)


class Replicas(Layout):
    """The same parameters on every process, other data on each."""

    name = "replicas"
    team: Team

    def space(self, parameters: Sequence[nn.Parameter]) -> VectorSpace:
        """See :class:`Layout`."""
        dtypes = [measured_dtype(p.dtype) for p in parameters]
        shapes = tuple(p.shape for p in parameters)
        spread = Spread(
            shapes=shapes,
            weights=(1.0,) * len(shapes),
            nbytes=sum(s.numel() * d.itemsize for s, d in zip(shapes, dtypes, strict=True)),
            agree=self.team.agree,
        )
        return VectorSpace(shapes, dtypes, [p.device for p in parameters], spread=spread)

    def position(self) -> list[float]:
        """Sum and norm of all parameters."""
        filled = [p.detach() for p in self.model.parameters() if p.numel()]
        sums = torch.stack([p.sum(dtype=torch.float64).to(self.device) for p in filled])
        norms = torch.stack([torch.linalg.vector_norm(p, dtype=torch.float64).to(self.device) for p in filled])
        return [float(sums.sum()), float(torch.linalg.vector_norm(norms))]

    def check_position(self, everybody: Sequence[Sequence[float]]) -> None:
        """Replicas drift by rounding where the hardware differs, and by everything else where nothing keeps them equal.

        Raises:
            InvalidArgumentError: They differ by more than rounding.
        """
        total, length = everybody[0]
        apart = max(max(abs(t - total), abs(n - length)) for t, n in everybody)
        if apart > SAME_POINT * length:
            raise InvalidArgumentError(
                f"the processes' parameters differ (sum or norm by {apart / length:.1g} of the norm): a mean of "
                "Hessians at different points is the Hessian of nothing. Broadcast the parameters first, or measure "
                "each process alone: process_group=None."
            )

    def spread_out(self, vector: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """See :class:`Layout`."""
        return vector

    def collect(self, own: Sequence[torch.Tensor], failure: BaseException | None = None) -> Vector:
        """One flat all-reduce: this process's share, and in a few more entries how it went."""
        dtype = max((t.dtype for t in own), key=lambda d: torch.finfo(d).bits)
        pieces = [t.detach().reshape(-1).to(self.device, dtype) for t in own]
        flat = torch.cat([*pieces, failure_report(failure, pieces[0])])
        flat[: -len(KINDS)] *= self.share
        *parts, counts = torch.split(self.team.total(flat), [*(t.numel() for t in own), len(KINDS)])
        if bool(counts.any()) and (verdict := self.verdict(counts.tolist(), failure)) is not None:
            raise verdict
        return [p.view(t.shape).to(t) for p, t in zip(parts, own, strict=True)]
