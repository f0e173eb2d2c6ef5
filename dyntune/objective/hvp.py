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

Where a loss stops a gradient the question itself is open, and the engines differ: the first two hold the stopped values
fixed; finite differences let them move with the parameters, and forward-over-reverse does so under ``no_grad`` (which
forward mode ignores) but not at ``detach()``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch.autograd import forward_ad

from dyntune.errors import DyntuneError, HVPUnsupportedError, StaleOperatorError
from dyntune.numerics.operator import Product
from dyntune.numerics.vectors import Vector
from dyntune.objective.context import differentiable_forward
from dyntune.objective.fsdp import backward_gradient, moved_shards
from dyntune.objective.objective import Objective, differentiate
from dyntune.objective.shards import Sharded
from dyntune.objective.state import same_bits
from dyntune.objective.triage import check_twice_differentiable

__all__ = [
    "FiniteDifference",
    "Session",
    "finite_difference_session",
    "first_line",
    "forward_over_reverse_session",
    "is_unsupported",
    "reforward_session",
    "retained_graph_session",
    "second_derivative",
    "twice_differentiable",
    "unchanged_parameters",
]

Session: TypeAlias = Callable[[Objective], AbstractContextManager[Product]]

# Step along a unit direction for Richardson extrapolation of two central differences. In float32 the measured optimum
# on a trained transformer is 1e-2 (error 4e-6); in float64 truncation h^4 meets rounding eps/h near eps^(1/5).
FD_STEP = {torch.float32: 1e-2, torch.float64: 7e-4}


@contextmanager
def unchanged_parameters(objective: Objective) -> Iterator[Callable[[], None]]:
    """Yields a check that raises when a parameter was written to; writes through ``.data`` are found at the end."""
    tensors = list(objective.parameters.values())
    versions = [p._version for p in tensors]
    # A checksum would miss a change of sign or order; one copy is little beside the basis of a Lanczos run.
    before = [p.detach().clone() for p in tensors]

    def check() -> None:
        for (name, p), version in zip(objective.parameters.items(), versions, strict=True):
            if p._version != version:
                raise StaleOperatorError(
                    f"parameter {name!r} was changed while an operator's session was open: its products would mix two "
                    "points. Finish measuring before optimizer.step(), or measure a copy."
                )

    yield check
    check()
    for name, old, new in zip(objective.parameters, before, tensors, strict=True):
        if not same_bits(old, new):
            raise StaleOperatorError(
                f"parameter {name!r} was changed through .data while an operator's session was open: the products mix "
                "two points. Finish measuring before the parameters change."
            )


def second_derivative(
    gradient: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], vector: Sequence[torch.Tensor], *, keep: bool
) -> Vector:
    """d(gradient . vector) / d(parameters); rows of the Hessian that are identically zero have no graph."""
    live = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
    if not live:
        return [torch.zeros_like(p) for p in parameters]
    outputs, weights = zip(*live, strict=True)
    result = torch.autograd.grad(outputs, parameters, weights, retain_graph=keep, allow_unused=True)
    return _dense(result, parameters)


def _dense(parts: Sequence[torch.Tensor | None], parameters: Sequence[torch.Tensor]) -> Vector:
    """Zeros for None, dense tensors for sparse ones (embeddings with ``sparse=True``)."""
    return [
        torch.zeros_like(p) if t is None else (t if t.layout == torch.strided else t.to_dense())
        for t, p in zip(parts, parameters, strict=True)
    ]


def twice_differentiable(objective: Objective, loss: torch.Tensor) -> Vector:
    """The gradient with its graph.

    Raises:
        HVPUnsupportedError: The graph holds a ``once_differentiable`` backward: its products would lack terms.
    """
    gradient = differentiate(loss, objective.tensors, create_graph=True)
    if objective.suspects:
        check_twice_differentiable(gradient)
    return gradient


def _swapped_gradient(
    objective: Objective, loss: torch.Tensor, moved: Mapping[str, torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """Gradient with respect to the tensors that stand in for the parameters.

    Raises:
        HVPUnsupportedError: The loss also reaches a parameter itself, which then stood still.
    """
    if not loss.requires_grad:
        return [None] * len(moved)
    parts = torch.autograd.grad(loss, [*moved.values(), *objective.tensors], allow_unused=True)
    for name, part in zip(objective.parameters, parts[len(moved) :], strict=True):
        if part is not None:
            raise HVPUnsupportedError(
                f"the loss uses parameter {name!r} not through the model (a list made earlier, perhaps), so it cannot "
                "be moved without writing to it. Inside loss_fn, take parameters from the model: for p in "
                "model.parameters(). Exact products need no such care: method='exact' with a larger memory_limit."
            )
    return parts[: len(moved)]


@contextmanager
def retained_graph_session(objective: Objective) -> Iterator[Product]:
    """Exact; one gradient with its graph when opened, then one backward pass through that graph per product."""
    with objective.differentiating() as buffers, unchanged_parameters(objective) as check:
        parameters = objective.tensors
        gradient = twice_differentiable(objective, objective.total_loss(buffers))

        def product(vector: Sequence[torch.Tensor]) -> Vector:
            check()
            return second_derivative(gradient, parameters, vector, keep=True)

        yield product


@contextmanager
def reforward_session(objective: Objective) -> Iterator[Product]:
    """Exact; every product runs forward, backward and backward again, one batch at a time."""
    with objective.differentiating() as buffers, unchanged_parameters(objective) as check:
        parameters = objective.tensors

        def product(vector: Sequence[torch.Tensor]) -> Vector:
            check()

            def term(index: int) -> tuple[Vector, float | torch.Tensor]:
                loss = objective.batch_loss(index, buffers)
                gradient = twice_differentiable(objective, loss.value)
                return second_derivative(gradient, parameters, vector, keep=False), loss.weight

            return objective.accumulate(term)

        yield product


@functools.cache
def _load_forward_mode() -> None:
    """Import what torch imports at the first dual tensor: it warns about its own use of ``torch.jit`` (2.13)."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _tangent(dual: torch.Tensor) -> torch.Tensor | None:
    tangent: torch.Tensor | None = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    return tangent


@contextmanager
def forward_over_reverse_session(objective: Objective) -> Iterator[Product]:
    """Exact; the derivative of the gradient along a dual direction. Slower, and lighter than a second graph."""
    _load_forward_mode()
    with (
        objective.differentiating() as buffers,
        unchanged_parameters(objective) as check,
        differentiable_forward(objective.model, objective.space.device),
    ):

        def product(vector: Sequence[torch.Tensor]) -> Vector:
            check()

            def term(index: int) -> tuple[Vector, float | torch.Tensor]:
                with forward_ad.dual_level():
                    duals = {
                        name: forward_ad.make_dual(p.detach(), v).requires_grad_()  # type: ignore[no-untyped-call]
                        for (name, p), v in zip(objective.present.items(), vector, strict=True)
                    }
                    with objective.swapped(duals):
                        loss = objective.batch_loss(index, buffers)
                        gradient = _swapped_gradient(objective, loss.value, duals)
                    tangents = [None if g is None else _tangent(g) for g in gradient]
                    weight = loss.weight
                return [t.detach() for t in _dense(tangents, objective.tensors)], weight

            return objective.accumulate(term)

        yield product


class FiniteDifference:
    """Central differences of the gradient with Richardson extrapolation, and their own error estimate.

    ``D(h) = (g(x + h u) - g(x - h u)) / 2h`` along the unit direction u; the product is ``(4 D(h/2) - D(h)) / 3`` and
    the reported error ``|D(h) - D(h/2)|`` relative to ``|D(h/2)|``. For smooth losses the true error is at most twice
    that: far below it in float64, while in float32 both are rounding (the extrapolation has 1.2 times that of the gap
    on average; measured at most 1.6 times on 11 small models, 20 directions each). The step is a length along a *unit*
    direction: scaling it with the parameter norm was measured 16% wrong on a transformer.
    """

    def __init__(self) -> None:
        self.worst_error: float | None = None

    @contextmanager
    def session(self, objective: Objective) -> Iterator[Product]:
        """Finite differences on copies of the parameters; only FSDP's shards are written to, and put back."""
        step = FD_STEP[objective.space.dtype]
        length_of = objective.layout.inner_norm(objective.space)
        with ExitStack() as stack:
            buffers = stack.enter_context(objective.differentiating())
            check = stack.enter_context(unchanged_parameters(objective))

            def gradient_on_shards(vector: Sequence[torch.Tensor], shift: float) -> Vector:
                with moved_shards(objective.parameters.values(), vector, shift):
                    return backward_gradient(objective, buffers)

            def gradient_on_copies(vector: Sequence[torch.Tensor], shift: float) -> Vector:
                moved = {
                    name: torch.add(p.detach(), v, alpha=shift).requires_grad_()
                    for (name, p), v in zip(objective.present.items(), vector, strict=True)
                }

                def term(index: int) -> tuple[Vector, float | torch.Tensor]:
                    with objective.swapped(moved):
                        loss = objective.batch_loss(index, buffers)
                        parts = _swapped_gradient(objective, loss.value, moved)
                    return _dense(parts, objective.tensors), loss.weight

                return objective.accumulate(term)

            gradient_at = gradient_on_shards if isinstance(objective.layout, Sharded) else gradient_on_copies

            def central(vector: Sequence[torch.Tensor], h: float) -> Vector:
                difference = torch._foreach_sub(gradient_at(vector, h), gradient_at(vector, -h))
                return list(torch._foreach_div(difference, 2 * h))

            def product(vector: Sequence[torch.Tensor]) -> Vector:
                check()
                length = length_of(vector)
                if length == 0.0:
                    return [torch.zeros_like(v) for v in vector]
                coarse = central(vector, step / length)
                fine = central(vector, step / (2 * length))
                gap = torch._foreach_sub(fine, coarse)
                size = length_of(fine)
                error = length_of(gap) / size if size > 0 else 0.0
                self.worst_error = max(self.worst_error or 0.0, error)
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
)


def is_unsupported(error: BaseException) -> bool:
    """Whether an exception says that an operation lacks the derivative that an engine needs."""
    if isinstance(error, DyntuneError):
        return isinstance(error, HVPUnsupportedError)
    if isinstance(error, NotImplementedError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(t in text for t in _UNSUPPORTED_TEXTS)


def first_line(error: BaseException) -> str:
    """What an exception says, in one sentence."""
    text = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
    return f"{text}." if isinstance(error, DyntuneError) else f"{type(error).__name__}: {text}."
