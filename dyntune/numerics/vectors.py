"""Vectors shaped like parameters, and the orthonormal basis that Lanczos keeps of them.

A vector is a list of tensors at the boundary. Inside, consecutive tensors of one dtype and device are packed into
*segments*, and the basis holds one preallocated buffer ``[rows, numel]`` per segment; the operator reads *views* of a
row, so nothing is copied on the way in.

Sums run over blocks of columns and are combined in float64. Why: in float32 a flat norm is 1.1% off at 1e8 elements
on the CPU (torch 2.13), while blocks keep it near 1e-7; the extra cost is a few microseconds a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from dyntune.errors import HVPUnsupportedError, ShapeMismatchError
from dyntune.numerics.random import normal_like
from dyntune.numerics.spread import Spread

__all__ = ["Basis", "Vector", "VectorSpace", "dot", "norm"]

Vector = list[torch.Tensor]

# Small tensors are packed together until a segment holds this many elements: enough to make one matrix product worth
# its call, small enough that a model of many layers never needs one contiguous allocation of its whole size.
SEGMENT_NUMEL = 1_000_000
# Elements summed in the storage dtype before the partial sums meet in float64. On the CPU the relative error of a norm
# was measured as 2e-8 for 2^15 terms, 1e-7 for 2^16, 1e-6 for 2^18 and 7e-6 for 2^20 (torch 2.13, float32); on a GPU
# reductions are trees and launches dear.
BLOCK_NUMEL_CPU = 1 << 16
BLOCK_NUMEL_GPU = 1 << 22


def _block_numel(device: torch.device) -> int:
    return BLOCK_NUMEL_CPU if device.type == "cpu" else BLOCK_NUMEL_GPU


def dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """Inner product of two vectors, accumulated in float64 (one synchronisation per device)."""
    totals: dict[torch.device, torch.Tensor] = {}
    for x, y in zip(a, b, strict=True):
        total = totals.setdefault(x.device, torch.zeros((), dtype=torch.float64, device=x.device))
        step = _block_numel(x.device)
        for i, j in zip(torch.split(x.reshape(-1), step), torch.split(y.reshape(-1), step), strict=True):
            total += torch.dot(i, j).to(total)
    return sum(float(total) for total in totals.values())


def norm(a: Sequence[torch.Tensor]) -> float:
    """Euclidean norm of a vector, accurate to about 1e-6 in float32 at 1e8 elements."""
    return math.sqrt(dot(a, a))


@dataclass(frozen=True)
class _Segment:
    """A run of consecutive tensors stored side by side."""

    first: int
    offsets: tuple[int, ...]  # len = tensors + 1
    dtype: torch.dtype
    device: torch.device
    weight: float  # of its entries in inner products

    @property
    def numel(self) -> int:
        return self.offsets[-1]

    def blocks(self) -> Iterator[slice]:
        step = _block_numel(self.device)
        return (slice(i, min(i + step, self.numel)) for i in range(0, self.numel, step))


class VectorSpace:
    """The shapes, dtypes and devices that every vector of an operator has.

    Args:
        shapes: One shape per tensor: of this process's part, where vectors are spread over several.
        dtypes: One floating dtype per tensor.
        devices: One device per tensor.
        spread: How vectors are spread over the processes of a job; None for one process alone.

    The attribute ``numel`` is the dimension of whole vectors, ``numels`` the sizes of the tensors held here.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        dtypes: Sequence[torch.dtype],
        devices: Sequence[torch.device],
        *,
        spread: Spread | None = None,
    ) -> None:
        self.shapes = tuple(torch.Size(s) for s in shapes)
        self.dtypes = tuple(dtypes)
        self.devices = tuple(devices)
        self.spread = spread
        self.numels = tuple(math.prod(s) for s in self.shapes)
        self.numel = sum(self.numels) if spread is None else sum(math.prod(s) for s in spread.shapes)
        self.segments = tuple(self._pack())

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> VectorSpace:
        """The space in which `tensors` is a vector."""
        return cls([t.shape for t in tensors], [t.dtype for t in tensors], [t.device for t in tensors])

    @property
    def dtype(self) -> torch.dtype:
        """The least precise dtype: what limits the accuracy of anything computed with these vectors."""
        return max(self.dtypes, key=lambda d: torch.finfo(d).eps)

    @property
    def device(self) -> torch.device:
        """Device of the first tensor."""
        return self.devices[0]

    @property
    def nbytes(self) -> int:
        """Bytes of one vector: of the largest part that any process holds, where it is spread."""
        if self.spread is not None:
            return self.spread.nbytes
        return sum(n * d.itemsize for n, d in zip(self.numels, self.dtypes, strict=True))

    @property
    def cut(self) -> bool:
        """Whether this process holds only parts of vectors."""
        return self.spread is not None and self.spread.cut

    def _pack(self) -> Iterator[_Segment]:
        weights = [1.0] * len(self.numels) if self.spread is None else self.spread.weights
        kinds = list(zip(self.dtypes, self.devices, weights, strict=True))
        first, offsets = 0, [0]
        for i, n in enumerate(self.numels):
            if i > first and not (offsets[-1] + n <= SEGMENT_NUMEL and kinds[i] == kinds[first]):
                yield _Segment(first, tuple(offsets), *kinds[first])
                first, offsets = i, [0]
            offsets.append(offsets[-1] + n)
        yield _Segment(first, tuple(offsets), *kinds[first])

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over this process's entries, made those over all entries (in place)."""
        return sums if self.spread is None else self.spread.total(sums)

    def agree(self, numbers: torch.Tensor) -> torch.Tensor:
        """The same bits on all processes (in place): decisions are taken on these."""
        return numbers if self.spread is None else self.spread.agree(numbers)

    def dot(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
        """Inner product of two whole vectors, accumulated in float64 (one synchronisation per device)."""
        if self.spread is None:
            return dot(a, b)
        parts = zip(self.spread.weights, a, b, strict=True)
        local = sum(weight * dot([x], [y]) for weight, x, y in parts)
        return float(self.agree(self.total(torch.tensor([local], dtype=torch.float64, device=self.device))))

    def norm(self, a: Sequence[torch.Tensor]) -> float:
        """Euclidean norm of a whole vector."""
        return math.sqrt(self.dot(a, a))

    def squared_norms(self, vector: Sequence[torch.Tensor]) -> list[float]:
        """Squared length of every tensor of a whole vector."""
        weights = [1.0] * len(vector) if self.spread is None else self.spread.weights
        sums = [weight * dot([t], [t]) for weight, t in zip(weights, vector, strict=True)]
        found: list[float] = self.total(torch.tensor(sums, dtype=torch.float64, device=self.device)).tolist()
        return found

    @property
    def whole_shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of whole tensors, however they are spread."""
        return self.shapes if self.spread is None else self.spread.shapes

    def normal(self, *key: int) -> Vector:
        """Standard normal vector that depends on `key` only, tensor by tensor, however vectors are spread."""
        specs = enumerate(zip(self.dtypes, self.devices, strict=True))
        if self.spread is None:
            return [normal_like(self.shapes[i], t, d, key=(*key, i)) for i, (t, d) in specs]
        whole, part = self.spread.shapes, self.spread.part
        return [part(i, normal_like(whole[i], t, d, key=(*key, i))).clone() for i, (t, d) in specs]

    def zeros(self) -> Vector:
        """The zero vector."""
        specs = zip(self.shapes, self.dtypes, self.devices, strict=True)
        return [torch.zeros(s, dtype=t, device=d) for s, t, d in specs]

    def check(self, vector: Sequence[torch.Tensor], *, name: str = "vector") -> Vector:
        """Return `vector` as a list of this process's parts in this space's dtypes and devices.

        Raises:
            ShapeMismatchError: Another number of tensors, or a tensor of another shape.
        """
        if self.spread is not None and len(vector) == len(self.shapes):
            vector = [self.spread.part(i, t) for i, t in enumerate(vector)]
        found = [tuple(t.shape) for t in vector]
        if found != [tuple(s) for s in self.shapes]:
            raise ShapeMismatchError(
                f"{name} has tensors of shape {_short(found)}, the operator needs {_short(self.shapes)}. "
                "Pass one tensor per parameter, in the operator's order."
            )
        specs = zip(vector, self.dtypes, self.devices, strict=True)
        return [t.detach().to(device=d, dtype=dt) for t, dt, d in specs]

    def present(self, vector: Sequence[torch.Tensor]) -> Vector:
        """A vector as the user knows it: DTensors where the parameters are."""
        if self.spread is None:
            return list(vector)
        return [self.spread.present(i, t) for i, t in enumerate(vector)]

    def unflatten(self, flat: torch.Tensor) -> Vector:
        """Split a flat tensor of `numel` elements into this space's tensors (views where dtype and device agree)."""
        self.refuse_flat()
        if flat.numel() != self.numel:
            raise ShapeMismatchError(
                f"a flat vector has {flat.numel()} elements, the operator needs {self.numel}: "
                "give one element per selected parameter entry."
            )
        parts = torch.split(flat.reshape(-1), list(self.numels))
        return self.check([p.view(s) for p, s in zip(parts, self.shapes, strict=True)])

    def refuse_flat(self) -> None:
        """Raise where no process holds whole vectors."""
        if self.cut:
            raise HVPUnsupportedError(
                "the parameters are sharded over processes, so none of them holds a flat vector. Pass and take lists "
                "of DTensors, one per parameter."
            )


def _short(shapes: Sequence[Sequence[int]], limit: int = 6) -> str:
    shown = ", ".join(str(tuple(s)) for s in shapes[:limit])
    return f"[{shown}{', ...' if len(shapes) > limit else ''}] ({len(shapes)} tensors)"


class Basis:
    """Rows of orthonormal vectors in preallocated buffers.

    Memory: `rows` vectors, no temporary larger than ``rows x block``.

    Args:
        space: Where the vectors live.
        rows: How many of them there is room for.
    """

    def __init__(self, space: VectorSpace, rows: int) -> None:
        self.space = space
        self.rows = rows
        self.buffers = [torch.empty((rows, s.numel), dtype=s.dtype, device=s.device) for s in space.segments]
        self._scalars_on = space.device if len(set(space.devices)) == 1 else torch.device("cpu")

    def views(self, row: int) -> Vector:
        """Row `row` as tensors of the space's shapes, without a copy."""
        views: Vector = []
        for segment, buffer in zip(self.space.segments, self.buffers, strict=True):
            shapes = self.space.shapes[segment.first : segment.first + len(segment.offsets) - 1]
            spans = pairwise(segment.offsets)
            views += [buffer[row, a:b].view(s) for (a, b), s in zip(spans, shapes, strict=True)]
        return views

    def load(self, row: int, vector: Sequence[torch.Tensor]) -> None:
        """Copy `vector` into row `row`."""
        torch._foreach_copy_(self.views(row), list(vector))

    def _blocks(self) -> Iterator[torch.Tensor]:
        for block, _ in self._weighted_blocks():
            yield block

    def _weighted_blocks(self) -> Iterator[tuple[torch.Tensor, float]]:
        for segment, buffer in zip(self.space.segments, self.buffers, strict=True):
            for columns in segment.blocks():
                yield buffer[:, columns], segment.weight

    def project(self, count: int, row: int) -> torch.Tensor:
        """Inner products of rows ``0..count-1`` with row `row`: a float64 tensor (count,), not synchronised."""
        total = torch.zeros(count, dtype=torch.float64, device=self._scalars_on)
        for block, weight in self._weighted_blocks():
            total.add_(torch.mv(block[:count], block[row]).to(total), alpha=weight)
        return self.space.total(total)

    def subtract(self, count: int, row: int, coefficients: torch.Tensor) -> None:
        """row -= coefficients @ rows ``0..count-1``, in place."""
        for block in self._blocks():
            block[row].addmv_(block[:count].T, coefficients.to(block), alpha=-1)

    def norm(self, row: int) -> torch.Tensor:
        """Euclidean norm of row `row`: a float64 scalar, not synchronised."""
        total = torch.zeros((), dtype=torch.float64, device=self._scalars_on)
        for block, weight in self._weighted_blocks():
            total.add_(torch.dot(block[row], block[row]).to(total), alpha=weight)
        return self.space.total(total).sqrt()

    def scale(self, row: int, factor: torch.Tensor) -> None:
        """row *= factor, in place."""
        for buffer in self.buffers:
            buffer[row].mul_(factor.to(buffer))

    def orthogonalise(self, count: int, row: int) -> torch.Tensor:
        """Remove rows ``0..count-1`` from row `row` by two passes of classical Gram-Schmidt; return the coefficients.

        Two passes keep orthogonality at rounding level whenever the vector is not numerically in the span
        (Giraud, Langou and Rozloznik 2005, "twice is enough").
        """
        total = torch.zeros(count, dtype=torch.float64, device=self._scalars_on)
        for _ in range(2 if count else 0):
            coefficients = self.project(count, row)
            self.subtract(count, row, coefficients)
            total += coefficients
        return total

    def rotate(self, first: int, count: int, rotation: torch.Tensor) -> None:
        """Replace rows ``first..first+l-1`` by ``rotation.T @ rows[first:first+count]``, rotation (count, l)."""
        width = rotation.shape[1]
        for block in self._blocks():
            block[first : first + width] = rotation.T.to(block) @ block[first : first + count]

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        for buffer in self.buffers:
            buffer[target].copy_(buffer[source])

    def release(self, rows: Sequence[int]) -> list[Vector]:
        """Give up the buffers and return the chosen rows, segment by segment, so that memory does not peak."""
        kept = []
        for i, buffer in enumerate(self.buffers):
            kept.append(buffer[list(rows)])
            self.buffers[i] = buffer[:0]
        self.buffers = kept
        return [self.views(i) for i in range(len(rows))]
