"""What a symmetric linear operator is to dyntune: products with vectors of given shapes, and nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch

from dyntune.errors import InvalidArgumentError, NonFiniteError, ShapeMismatchError, UnsupportedDtypeError
from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.numerics.vectors import Vector, VectorSpace

__all__ = ["CallableOperator", "DenseOperator", "LinearOperator", "OperatorLike", "Product", "as_operator"]

Product: TypeAlias = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


class LinearOperator(ABC):
    """A real symmetric operator.

    A Hessian, a Gauss-Newton matrix and a dense test matrix are interchangeable behind this class. Subclasses
    implement :meth:`session`; everything else follows.

    Args:
        space: Shapes, dtypes and devices of the vectors it acts on.
        flat: Whether users hand in and receive flat tensors ``(numel,)`` instead of lists of tensors.
    """

    def __init__(self, space: VectorSpace, *, flat: bool = False) -> None:
        self.space = space
        self.flat = flat

    @property
    def numel(self) -> int:
        """Dimension n: the operator is an n x n matrix."""
        return self.space.numel

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.numel, self.numel)

    @property
    def dtype(self) -> torch.dtype:
        """The least precise dtype among the tensors of a vector."""
        return self.space.dtype

    @property
    def device(self) -> torch.device:
        """Device of the first tensor of a vector."""
        return self.space.device

    @abstractmethod
    @contextmanager
    def session(self) -> Iterator[Product]:
        """Open the operator for many products at one parameter point; yields the product function.

        The product takes one tensor per shape and returns as many. A session may keep a graph alive; none outlives it.
        """

    def matvec(self, vector: Sequence[torch.Tensor]) -> Vector:
        """One product A v.

        Args:
            vector: One tensor per shape of the space.

        Returns:
            A v, in the same shapes.

        Raises:
            ShapeMismatchError: The vector has other shapes.
        """
        checked = self.space.check(vector)
        with plain_arithmetic(self.device), self.session() as product:
            return self.space.present([t.detach() for t in product(checked)])

    def __matmul__(self, vector: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor | Vector:
        """``A @ v``: flat in, flat out; list in, list out."""
        if isinstance(vector, torch.Tensor):
            return self.flatten(self.matvec(self.space.unflatten(vector)))
        return self.matvec(vector)

    def flatten(self, vector: Sequence[torch.Tensor]) -> torch.Tensor:
        """Concatenate a vector into one flat tensor (numel,) on the operator's device."""
        self.space.refuse_flat()
        return torch.cat([t.reshape(-1).to(self.device, self.dtype) for t in vector])

    def to_dense(self) -> torch.Tensor:
        """The full matrix (n, n) from n products: for tests and small problems only."""
        with plain_arithmetic(self.device), self.session() as product:
            identity = torch.eye(self.numel, dtype=self.dtype, device=self.device)
            columns = [self.flatten(product(self.space.unflatten(e))) for e in identity]
        return torch.stack(columns, dim=1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.numel}, dtype={self.dtype}, device={self.device})"


class CallableOperator(LinearOperator):
    """A callable on flat tensors, with its dimension.

    Args:
        matvec: Maps a tensor (n,) to a tensor (n,); must be linear and symmetric.
        n: Dimension.
        dtype: Dtype of the vectors.
        device: Device of the vectors.

    Example:
        >>> import torch
        >>> A = CallableOperator(lambda v: 2 * v, 3)
        >>> A @ torch.ones(3)
        tensor([2., 2., 2.])
    """

    def __init__(
        self,
        matvec: Callable[[torch.Tensor], torch.Tensor],
        n: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if n < 1:
            raise InvalidArgumentError(f"n={n}: an operator needs at least one dimension.")
        if dtype not in (torch.float32, torch.float64):
            raise UnsupportedDtypeError(
                f"vectors of dtype {dtype} (a start vector decides it) carry too few digits for eigenvalues: use "
                "torch.float32 or torch.float64."
            )
        super().__init__(VectorSpace([torch.Size([n])], [dtype], [torch.device(device)]), flat=True)
        self._matvec = matvec

    @contextmanager
    def session(self) -> Iterator[Product]:
        """Yield the callable, with the shape of its result checked."""

        def product(vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            version = vector[0]._version
            result = self._matvec(vector[0])
            if not isinstance(result, torch.Tensor):
                raise InvalidArgumentError(f"the matvec returned a {type(result).__name__}; it has to return a tensor.")
            if vector[0]._version != version:
                raise InvalidArgumentError(
                    "the matvec wrote to its argument, which is a vector of the solver: return a new tensor."
                )
            if result.shape != self.space.shapes[0]:
                raise ShapeMismatchError(
                    f"the matvec returned shape {tuple(result.shape)} for a vector of shape {(self.numel,)}: "
                    "a symmetric operator maps (n,) to (n,)."
                )
            return [result]

        yield product


class DenseOperator(CallableOperator):
    """A dense symmetric matrix (n, n)."""

    def __init__(self, matrix: torch.Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
            raise ShapeMismatchError(
                f"matrix has shape {tuple(matrix.shape)}; eigenvalues here are those of a symmetric (n, n) matrix."
            )
        if matrix.dtype not in (torch.float32, torch.float64):
            raise UnsupportedDtypeError(
                f"matrix has dtype {matrix.dtype}; convert it first: matrix.to(torch.float32) or torch.float64."
            )
        matrix = matrix.detach()
        scale = float(matrix.abs().max())
        if not math.isfinite(scale):
            raise NonFiniteError("matrix holds NaN or infinity: its eigenvalues are undefined.")
        asymmetry = float((matrix - matrix.T).abs().max())
        # An fp32 Gram matrix formed by two orders of summation differs by about sqrt(n) eps; 1e-4 is far above that.
        if asymmetry > 1e-4 * scale:
            raise InvalidArgumentError(
                f"matrix is not symmetric: max|A - A.T| = {asymmetry:.3g} against max|A| = {scale:.3g}. Lanczos would "
                "return numbers that are no eigenvalues. Pass (A + A.T) / 2 if the asymmetry is rounding."
            )
        super().__init__(lambda v: matrix @ v, matrix.shape[0], dtype=matrix.dtype, device=matrix.device)


OperatorLike: TypeAlias = "LinearOperator | torch.Tensor | tuple[Callable[[torch.Tensor], torch.Tensor], int]"


def as_operator(
    operator: OperatorLike, *, start: torch.Tensor | Sequence[torch.Tensor] | None = None
) -> LinearOperator:
    """Turn an operator, a dense symmetric tensor, or ``(matvec, n)`` into a :class:`LinearOperator`.

    A bare callable takes its dtype and device from `start`, else float32 on the CPU.

    Raises:
        InvalidArgumentError: Something else was given, or the matrix is not symmetric.
    """
    if isinstance(operator, LinearOperator):
        return operator
    if isinstance(operator, torch.Tensor):
        return DenseOperator(operator)
    if isinstance(operator, tuple) and len(operator) == 2 and callable(operator[0]):
        matvec, n = operator
        if isinstance(start, torch.Tensor):
            return CallableOperator(matvec, int(n), dtype=start.dtype, device=start.device)
        return CallableOperator(matvec, int(n))
    raise InvalidArgumentError(
        f"operator is a {type(operator).__name__}; pass a dyntune operator such as dyntune.hessian(model, batch), a "
        "dense symmetric tensor, or (matvec, n) with matvec acting on flat tensors."
    )
