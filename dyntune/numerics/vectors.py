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

from dyntune.errors import ShapeMismatchError
from dyntune.numerics.random import normal_like

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

    @property
    def numel(self) -> int:
        return self.offsets[-1]

    def blocks(self) -> Iterator[slice]:
        step = _block_numel(self.device)
        return (slice(i, min(i + step, self.numel)) for i in range(0, self.numel, step))


class VectorSpace:
    """The shapes, dtypes and devices that every vector of an operator has.

    Args:
        shapes: One shape per tensor.
        dtypes: One floating dtype per tensor.
        devices: One device per tensor.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype], devices: Sequence[torch.device]
    ) -> None:
        self.shapes = tuple(torch.Size(s) for s in shapes)
        self.dtypes = tuple(dtypes)
        self.devices = tuple(devices)
        self.numels = tuple(math.prod(s) for s in self.shapes)
        self.numel = sum(self.numels)
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
        """Bytes of one vector."""
        return sum(n * d.itemsize for n, d in zip(self.numels, self.dtypes, strict=True))

    def _pack(self) -> Iterator[_Segment]:
        first, offsets = 0, [0]
        for i, (n, dtype, device) in enumerate(zip(self.numels, self.dtypes, self.devices, strict=True)):
            fits = offsets[-1] + n <= SEGMENT_NUMEL
            if i > first and not (fits and dtype == self.dtypes[first] and device == self.devices[first]):
                yield _Segment(first, tuple(offsets), self.dtypes[first], self.devices[first])
                first, offsets = i, [0]
            offsets.append(offsets[-1] + n)
        yield _Segment(first, tuple(offsets), self.dtypes[first], self.devices[first])

    def normal(self, *key: int) -> Vector:
        """Standard normal vector that depends on `key` only, tensor by tensor."""
        specs = zip(self.shapes, self.dtypes, self.devices, strict=True)
        return [normal_like(s, t, d, key=(*key, i)) for i, (s, t, d) in enumerate(specs)]

    def zeros(self) -> Vector:
        """The zero vector."""
        specs = zip(self.shapes, self.dtypes, self.devices, strict=True)
        return [torch.zeros(s, dtype=t, device=d) for s, t, d in specs]

    def check(self, vector: Sequence[torch.Tensor], *, name: str = "vector") -> Vector:
        """Return `vector` as a list in this space's dtypes and devices.

        Raises:
            ShapeMismatchError: Another number of tensors, or a tensor of another shape.
        """
        found = [tuple(t.shape) for t in vector]
        if found != [tuple(s) for s in self.shapes]:
            raise ShapeMismatchError(
                f"{name} has tensors of shape {_short(found)}, the operator needs {_short(self.shapes)}. "
                "Pass one tensor per parameter, in the operator's order."
            )
        specs = zip(vector, self.dtypes, self.devices, strict=True)
        return [t.detach().to(device=d, dtype=dt) for t, dt, d in specs]

    def unflatten(self, flat: torch.Tensor) -> Vector:
        """Split a flat tensor of `numel` elements into this space's tensors (views where dtype and device agree)."""
        if flat.numel() != self.numel:
            raise ShapeMismatchError(
                f"a flat vector has {flat.numel()} elements, the operator needs {self.numel}: "
                "give one element per selected parameter entry."
            )
        parts = torch.split(flat.reshape(-1), list(self.numels))
        return self.check([p.view(s) for p, s in zip(parts, self.shapes, strict=True)])


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
        for segment, buffer in zip(self.space.segments, self.buffers, strict=True):
            for columns in segment.blocks():
                yield buffer[:, columns]

    def project(self, count: int, row: int) -> torch.Tensor:
        """Inner products of rows ``0..count-1`` with row `row`: a float64 tensor (count,), not synchronised."""
        total = torch.zeros(count, dtype=torch.float64, device=self._scalars_on)
        for block in self._blocks():
            total += torch.mv(block[:count], block[row]).to(total)
        return total

    def subtract(self, count: int, row: int, coefficients: torch.Tensor) -> None:
        """row -= coefficients @ rows ``0..count-1``, in place."""
        for block in self._blocks():
            block[row].addmv_(block[:count].T, coefficients.to(block), alpha=-1)

    def norm(self, row: int) -> torch.Tensor:
        """Euclidean norm of row `row`: a float64 scalar, not synchronised."""
        total = torch.zeros((), dtype=torch.float64, device=self._scalars_on)
        for block in self._blocks():
            total += torch.dot(block[row], block[row]).to(total)
        return total.sqrt()

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
