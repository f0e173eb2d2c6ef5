"""Operators made of operators: :class:`AffineOperator`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dyntune.errors import InvalidArgumentError, ShapeMismatchError
from dyntune.numerics.operator import LinearOperator, Product
from dyntune.numerics.vectors import Vector

__all__ = ["AffineOperator", "affine"]


class AffineOperator(LinearOperator):
    """``A + alpha B``.

    Args:
        first: A.
        second: B, on vectors of the same shapes.
        alpha: A finite number.
    """

    def __init__(self, first: LinearOperator, second: LinearOperator, alpha: float) -> None:
        super().__init__(first.space, flat=first.flat)
        if first.space.shapes != second.space.shapes:
            raise ShapeMismatchError(
                f"A acts on {first.space.numel} entries in {len(first.space.shapes)} tensors, B on "
                f"{second.space.numel} in {len(second.space.shapes)}: only operators on the same vectors add up."
            )
        if not -float("inf") < alpha < float("inf"):
            raise InvalidArgumentError(f"alpha={alpha}: A + alpha B needs a finite alpha.")
        self.first, self.second, self.alpha = first, second, alpha

    @property
    def method(self) -> str:
        """How the products of both are made."""
        parts = (getattr(op, "method", "exact products") for op in (self.first, self.second))
        return " + ".join(parts)

    def at(self, alpha: float) -> AffineOperator:
        """The same family at another alpha."""
        return AffineOperator(self.first, self.second, alpha)

    @contextmanager
    def session(self) -> Iterator[Product]:
        """Both sessions side by side."""
        with self.first.session() as a, self.second.session() as b:

            def product(vector: Sequence[torch.Tensor]) -> Vector:
                # The first result may be reused by its session: the sum is a new vector.
                return list(torch._foreach_add(list(a(vector)), list(b(vector)), alpha=self.alpha))

            yield product


def affine(first: LinearOperator, second: LinearOperator, *, alpha: float) -> AffineOperator:
    """The member ``A + alpha B`` of an affine family; ``.at(alpha)`` gives another.

    Args:
        first: A.
        second: B.
        alpha: The weight of B.

    Raises:
        ShapeMismatchError: A and B act on different vectors.
        InvalidArgumentError: alpha is not finite.

    Cost:
        One product of each per product.

    Example:
        >>> from dyntune.numerics.operator import DenseOperator
        >>> A, B = DenseOperator(torch.eye(2)), DenseOperator(torch.diag(torch.tensor([0.0, 4.0])))
        >>> affine(A, B, alpha=0.5) @ torch.ones(2)
        tensor([1., 3.])
    """
    return AffineOperator(first, second, alpha)
