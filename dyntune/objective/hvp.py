"""Hessian-vector products: four engines, and the rule that chooses between them.

===================== ============================ =====================================================================
engine                cost of one product          when
===================== ============================ =====================================================================
retained graph        1.7 to 2.3 gradients         default: the gradient's graph is built once per session and kept
re-forward            2.7 to 3.5 gradients         the graphs of all batches do not fit, that of one batch does
forward-over-reverse  3.1 to 3.7 gradients         even one batch's double-backward graph does not fit
finite differences    4 gradients                  an operation has no second derivative
===================== ============================ =====================================================================

Costs measured on an MLP and a small transformer (2 CPU cores, torch 2.13). The first three are exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import torch
from torch.autograd import forward_ad

from dyntune.errors import HVPUnsupportedError, NoGradientError, StaleOperatorError
from dyntune.numerics.operator import Product
from dyntune.numerics.vectors import Vector
from dyntune.objective.objective import Objective

__all__ = [
    "Session",
    "finite_difference_session",
    "forward_over_reverse_session",
    "is_unsupported",
    "reforward_session",
    "retained_graph_session",
]

Session: TypeAlias = Callable[[Objective], AbstractContextManager[Product]]

# Step along a unit direction for Richardson extrapolation of two central differences. In float32 the measured optimum
# on a trained transformer is 1e-2 (error 4e-6); in float64 truncation h^4 meets rounding eps/h near eps^(1/5).
FD_STEP = {torch.float32: 1e-2, torch.float64: 7e-4}


@contextmanager
def _unchanged_parameters(objective: Objective) -> Iterator[Callable[[], None]]:
    """Yields a check that raises when a parameter was written to; writes through ``.data`` are found at the end."""
    tensors = objective.tensors
    versions = [p._version for p in tensors]
    sums = torch._foreach_norm([p.detach() for p in tensors], ord=1)

    def check() -> None:
        for (name, p), version in zip(objective.parameters.items(), versions, strict=True):
            if p._version != version:
                raise StaleOperatorError(
                    f"parameter {name!r} was changed while an operator's session was open: its products would mix two "
                    "points. Finish measuring before optimizer.step(), or measure a copy."
                )

    yield check
    check()
    after = torch._foreach_norm([p.detach() for p in tensors], ord=1)
    for name, old, new in zip(objective.parameters, sums, after, strict=True):
        if not torch.equal(old, new):
            raise StaleOperatorError(
                f"parameter {name!r} was changed through .data while an operator's session was open: the products mix "
                "two points. Finish measuring before the parameters change."
            )


def _second(
    gradient: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], vector: Sequence[torch.Tensor], *, keep: bool
) -> Vector:
    """d(gradient . vector) / d(parameters); rows of the Hessian that are identically zero have no graph."""
    live = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
    if not live:
        return [torch.zeros_like(p) for p in parameters]
    outputs, weights = zip(*live, strict=True)
    result = torch.autograd.grad(outputs, parameters, weights, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(p) if r is None else r for r, p in zip(result, parameters, strict=True)]


@contextmanager
def retained_graph_session(objective: Objective) -> Iterator[Product]:
    """Exact; one gradient with its graph when opened, then one backward pass through that graph per product."""
    parameters = objective.tensors
    with objective.measuring() as buffers, _unchanged_parameters(objective) as check:
        loss = objective.total_loss(buffers)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)

        def product(vector: Sequence[torch.Tensor]) -> Vector:
            check()
            return _second(gradient, parameters, vector, keep=True)

        yield product


@contextmanager
def reforward_session(objective: Objective) -> Iterator[Product]:
    """Exact; every product runs forward, backward and backward again, one batch at a time."""
    parameters = objective.tensors
    with objective.measuring() as buffers, _unchanged_parameters(objective) as check:

        def product(vector: Sequence[torch.Tensor]) -> Vector:
            check()

            def term(index: int) -> tuple[Vector, float | torch.Tensor]:
                loss = objective.batch_loss(index, buffers)
                gradient = torch.autograd.grad(
                    loss.value, parameters, create_graph=True, allow_unused=True, materialize_grads=True
                )
                return _second(gradient, parameters, vector, keep=False), loss.weight

            return objective.accumulate(term)

        yield product


@contextmanager
def forward_over_reverse_session(objective: Objective) -> Iterator[Product]:
    """Exact; the derivative of the gradient along a dual direction. Slower, and lighter than a second graph."""
    with objective.measuring() as buffers, _unchanged_parameters(objective) as check:

        def product(vector: Sequence[torch.Tensor]) -> Vector:
            check()

            def term(index: int) -> tuple[Vector, float | torch.Tensor]:
                with forward_ad.dual_level():
                    duals = {
                        name: forward_ad.make_dual(p.detach().requires_grad_(), v)
                        for (name, p), v in zip(objective.parameters.items(), vector, strict=True)
                    }
                    loss = objective.batch_loss(index, buffers, duals)
                    gradient = torch.autograd.grad(
                        loss.value, list(duals.values()), allow_unused=True, materialize_grads=True
                    )
                    tangents = [forward_ad.unpack_dual(g).tangent for g in gradient]
                    weight = loss.weight
                found = zip(tangents, objective.tensors, strict=True)
                return [torch.zeros_like(p) if t is None else t.detach() for t, p in found], weight

            return objective.accumulate(term)

        yield product


class FiniteDifference:
    """Central differences of the gradient with Richardson extrapolation, and their own error estimate.

    ``D(h) = (g(x + h u) - g(x - h u)) / 2h`` along the unit direction u; the product is ``(4 D(h/2) - D(h)) / 3`` and
    the reported error ``|D(h) - D(h/2)|`` relative to ``|D(h/2)|``, an upper estimate for smooth losses. The step is a
    length along a *unit* direction: scaling it with the parameter norm was measured 16% wrong on a transformer.
    """

    def __init__(self) -> None:
        self.worst_error = 0.0

    @contextmanager
    def session(self, objective: Objective) -> Iterator[Product]:
        """Finite differences on copies of the parameters; the user's tensors are only read."""
        step = FD_STEP[objective.space.dtype]
        with objective.measuring() as buffers, _unchanged_parameters(objective) as check:

            def gradient_at(vector: Sequence[torch.Tensor], shift: float) -> Vector:
                moved = {
                    name: torch.add(p.detach(), v, alpha=shift).requires_grad_()
                    for (name, p), v in zip(objective.parameters.items(), vector, strict=True)
                }

                def term(index: int) -> tuple[Vector, float | torch.Tensor]:
                    loss = objective.batch_loss(index, buffers, moved)
                    parts = torch.autograd.grad(
                        loss.value, list(moved.values()), allow_unused=True, materialize_grads=True
                    )
                    return list(parts), loss.weight

                return objective.accumulate(term)

            def central(vector: Sequence[torch.Tensor], h: float) -> Vector:
                difference = torch._foreach_sub(gradient_at(vector, h), gradient_at(vector, -h))
                return list(torch._foreach_div(difference, 2 * h))

            def product(vector: Sequence[torch.Tensor]) -> Vector:
                check()
                length = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(vector)))))
                if length == 0.0:
                    return [torch.zeros_like(v) for v in vector]
                coarse = central(vector, step / length)
                fine = central(vector, step / (2 * length))
                gap = torch._foreach_sub(fine, coarse)
                size = float(torch.stack(torch._foreach_norm(fine)).norm())
                if size > 0:
                    error = float(torch.stack(torch._foreach_norm(gap)).norm()) / size
                    self.worst_error = max(self.worst_error, error)
                return list(torch._foreach_add(fine, gap, alpha=1 / 3))

            yield product


def finite_difference_session(objective: Objective) -> AbstractContextManager[Product]:
    """A session of :class:`FiniteDifference` whose error is not recorded."""
    return FiniteDifference().session(objective)


_UNSUPPORTED_TEXTS = (
    "not implemented",
    "does not currently support double backward",
    "double backwards is not supported",
    "trying to differentiate twice a function that was marked with @once_differentiable",
    "incompatible with .grad()",
)


def is_unsupported(error: BaseException) -> bool:
    """Whether an exception says that an operation has no second derivative."""
    if isinstance(error, (NoGradientError, StaleOperatorError)):
        return False
    text = str(error).lower()
    return isinstance(error, (NotImplementedError, RuntimeError)) and any(t in text for t in _UNSUPPORTED_TEXTS)


def unsupported(error: BaseException) -> HVPUnsupportedError:
    """The typed error for an operation without a second derivative."""
    return HVPUnsupportedError(
        f"the model cannot be differentiated twice: {error} Pass method='finite-difference' (4 gradients a product, "
        "with a reported error), or replace the operation."
    )
