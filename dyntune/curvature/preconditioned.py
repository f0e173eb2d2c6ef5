r"""The Hessian as an adaptive optimizer sees it: :func:`preconditioned`.

A step :math:`-\eta P^{-1} g` with a diagonal :math:`P` is plain gradient descent in the coordinates
:math:`P^{1/2}\theta`; there the Hessian is :math:`P^{-1/2} H P^{-1/2}`, symmetric, with the eigenvalues of
:math:`P^{-1} H`. Its largest one times the learning rate is what the thresholds of :mod:`dyntune.stability` speak of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dyntune.curvature.hessian import HessianOperator
from dyntune.errors import InvalidArgumentError
from dyntune.numerics.operator import LinearOperator, Product
from dyntune.numerics.vectors import Vector
from dyntune.stability.scales import diagonal_scale

__all__ = ["PreconditionedOperator", "preconditioned"]


class PreconditionedOperator(LinearOperator):
    """``P^-1/2 A P^-1/2`` for a diagonal P.

    Args:
        operator: A.
        scale: P, shaped like the operator's vectors; None for the identity. Copied.
    """

    def __init__(self, operator: LinearOperator, scale: Sequence[torch.Tensor] | None) -> None:
        super().__init__(operator.space, flat=operator.flat)
        self.operator = operator
        self.root: Vector | None = None if scale is None else [s.detach().rsqrt() for s in scale]

    @property
    def method(self) -> str:
        """How the inner products are made."""
        return f"preconditioned, {getattr(self.operator, 'method', 'exact products')}"

    @contextmanager
    def session(self) -> Iterator[Product]:
        """The inner operator's session with two elementwise products around each of its products."""
        with self.operator.session() as inner:
            root = self.root
            if root is None:
                yield inner
                return

            def product(vector: Sequence[torch.Tensor]) -> Vector:
                return list(torch._foreach_mul(list(inner(list(torch._foreach_mul(list(vector), root)))), root))

            yield product


def preconditioned(
    operator: LinearOperator,
    optimizer_or_scale: torch.optim.Optimizer | torch.Tensor | Sequence[torch.Tensor],
    *,
    momentum_correction: bool = False,
) -> PreconditionedOperator:
    """``P^-1/2 A P^-1/2`` with P from an optimizer's state, or given.

    Args:
        operator: A :class:`HessianOperator` when an optimizer is given, any operator otherwise.
        optimizer_or_scale: A *stepped* torch optimizer that holds the operator's parameters (P includes the ratios of
            its groups' learning rates to the first group's), or P itself: positive tensors shaped like the vectors, or
            one flat tensor (n,).
        momentum_correction: Multiply P by ``1 - beta1^t``, which lengthens Adam's first steps; off in the steady state.

    Returns:
        A symmetric operator; unit: loss times (step per unit gradient) per parameter^2.

    Raises:
        InvalidArgumentError: The optimizer has not stepped yet (P of one batch says nothing), P is not positive and
            finite, or the operator does not know its parameters.
        OptimizerMismatchError: The optimizer does not hold the operator's parameters.
        ShapeMismatchError: P has other shapes.

    Cost:
        Two elementwise products beside each product of A; one copy of P.
    Source:
        Cohen et al. (2022), arXiv:2207.14484; P per optimizer in ``dyntune.stability.scales``.

    Example:
        >>> import dyntune
        >>> A = dyntune.numerics.operator.DenseOperator(torch.diag(torch.tensor([8.0, 3.0])))
        >>> dyntune.eigenvalues(preconditioned(A, torch.tensor([4.0, 1.0]))).values.round(decimals=4)
        tensor([3.], dtype=torch.float64)
    """
    if isinstance(optimizer_or_scale, torch.optim.Optimizer):
        if not isinstance(operator, HessianOperator):
            raise InvalidArgumentError(
                f"a {type(operator).__name__} does not know which of the optimizer's parameters its vectors belong to. "
                "Pass dyntune.hessian(...), or P itself as tensors."
            )
        tensors = list(operator.objective.parameters.values())
        scale = diagonal_scale(optimizer_or_scale, tensors, momentum_correction=momentum_correction)
        scale = None if scale is None else operator.space.check(scale, name="scale")
    elif isinstance(optimizer_or_scale, torch.Tensor):
        scale = operator.space.unflatten(optimizer_or_scale)
    else:
        scale = operator.space.check(optimizer_or_scale, name="scale")
    for index, s in enumerate(scale or []):
        if not bool(((s > 0) & torch.isfinite(s)).all()):
            raise InvalidArgumentError(
                f"the preconditioner's tensor {index} (shape {tuple(s.shape)}) is not positive and finite everywhere: "
                "its inverse root is undefined. An entry is zero where a parameter never had a gradient and eps is 0."
            )
    return PreconditionedOperator(operator, scale)
