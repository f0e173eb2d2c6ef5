"""A principal submatrix of an operator: rows and columns of parts of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dyntune.errors import HVPUnsupportedError, InvalidArgumentError
from dyntune.numerics.operator import LinearOperator, Product
from dyntune.numerics.vectors import Vector, VectorSpace

__all__ = ["Submatrix", "Window"]


@dataclass(frozen=True)
class Window:
    """Consecutive slices of one tensor of a vector.

    Args:
        index: Which tensor.
        start: First slice.
        stop: One past the last.
        dim: Along which dimension.
    """

    index: int
    start: int
    stop: int
    dim: int = 0

    def of(self, vector: Sequence[torch.Tensor]) -> torch.Tensor:
        """The part of a vector; a view."""
        return vector[self.index].narrow(self.dim, self.start, self.stop - self.start)


class Submatrix(LinearOperator):
    """What an operator does within some windows, everything else held still.

    Its vectors are as large as the windows. None of its eigenvalues lies beyond the whole operator's (interlacing).

    Args:
        whole: Any operator of one process.
        windows: Parts of its tensors; they do not overlap.

    Raises:
        InvalidArgumentError: No window, windows that overlap, or one outside its tensor.
        HVPUnsupportedError: The operator's vectors are spread over several processes.

    Cost:
        A product of the whole operator per product.

    Example:
        >>> from dyntune.numerics.operator import DenseOperator
        >>> whole = DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 5.0]]))
        >>> Submatrix(whole, [Window(0, 1, 2)]).to_dense()
        tensor([[5.]])
    """

    def __init__(self, whole: LinearOperator, windows: Sequence[Window]) -> None:
        space = whole.space
        if space.spread is not None:
            raise HVPUnsupportedError(
                "the operator's vectors are spread over processes: rows of a tensor that is cut elsewhere cannot be "
                "picked. Measure the block on an unsharded copy of the model."
            )
        self.whole, self.windows = whole, tuple(windows)
        _check(space, self.windows)
        shapes = [w.of([torch.empty(s, device="meta") for s in space.shapes]).shape for w in self.windows]
        kinds = [(space.dtypes[w.index], space.devices[w.index]) for w in self.windows]
        super().__init__(VectorSpace(shapes, [dtype for dtype, _ in kinds], [device for _, device in kinds]))

    @property
    def method(self) -> str:
        """How products are made."""
        return str(getattr(self.whole, "method", "exact products"))

    @contextmanager
    def session(self) -> Iterator[Product]:
        """The whole operator's session, with zeros outside the windows."""
        space = self.whole.space
        # What is outside the windows is never written, so that zeroing it once is enough.
        padded = [
            torch.zeros(shape, dtype=dtype, device=device)
            for shape, dtype, device in zip(space.shapes, space.dtypes, space.devices, strict=True)
        ]
        with self.whole.session() as product:

            def within(vector: Sequence[torch.Tensor]) -> Vector:
                for window, part in zip(self.windows, vector, strict=True):
                    window.of(padded).copy_(part)
                result = product(padded)
                return [window.of(result).clone() for window in self.windows]

            yield within


def _check(space: VectorSpace, windows: Sequence[Window]) -> None:
    if not windows:
        raise InvalidArgumentError("windows is empty: a submatrix has at least one row.")
    taken = [torch.zeros(shape, dtype=torch.bool) for shape in space.shapes]
    for window in windows:
        shape = space.shapes[window.index] if 0 <= window.index < len(space.shapes) else ()
        if not (window.dim < len(shape) and 0 <= window.start < window.stop <= shape[window.dim]):
            raise InvalidArgumentError(f"{window} does not lie in tensor {window.index}, of shape {tuple(shape)}.")
        part = window.of(taken)
        if bool(part.any()):
            raise InvalidArgumentError(f"{window} overlaps another: a row can be taken once only.")
        part.fill_(True)
