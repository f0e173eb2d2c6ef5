"""What matrices of the form ``J^T M J`` share: the Jacobian J of a model's outputs, as two maps, batch by batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from dyntune.errors import HVPUnsupportedError
from dyntune.numerics.operator import LinearOperator, Product
from dyntune.numerics.random import normal_like
from dyntune.numerics.vectors import Vector, norm
from dyntune.objective.hvp import unchanged_parameters
from dyntune.objective.objective import Objective
from dyntune.objective.state import BorrowedBuffers
from dyntune.objective.triage import check_twice_differentiable

__all__ = ["Jacobian", "LinearisedOperator"]

# Relative difference between u.(J v) and (J^T u).v that is rounding: 1e-6 or so in float32, while what a backward pass
# hides from the graph is of order one. The same limit as for what passes by the outputs.
ADJOINT = 1e-3
_ADJOINT_STREAM = 0xAD01


class Jacobian:
    """J of outputs by parameters: ``push(v) = J v`` and ``pull(u) = J^T u``, both in reverse mode.

    Args:
        outputs: With their graph.
        parameters: What they are differentiated by.
        suspects: Names of operations whose second derivative may be wrong: then the two maps are compared once.

    Raises:
        HVPUnsupportedError: The graph of the backward pass lacks terms.
    """

    def __init__(
        self, outputs: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], *, suspects: Sequence[str]
    ) -> None:
        self._outputs, self._parameters = outputs, parameters
        # J^T u is linear in u, so its derivative with respect to u along the vector is J v: reverse mode only.
        self._probes = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        self._pulled = torch.autograd.grad(
            outputs, parameters, self._probes, create_graph=True, allow_unused=True, materialize_grads=True
        )
        if suspects:
            check_twice_differentiable(self._pulled)
            self._check_adjoint(suspects)

    def push(self, vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """J v, shaped like the outputs."""
        live = [(g, v) for g, v in zip(self._pulled, vector, strict=True) if g.requires_grad]
        if not live:
            return [torch.zeros_like(z) for z in self._outputs]
        heads, weights = zip(*live, strict=True)
        return list(torch.autograd.grad(heads, self._probes, weights, retain_graph=True, materialize_grads=True))

    def pull(self, along: Sequence[torch.Tensor]) -> Vector:
        """J^T u, shaped like the parameters."""
        parts = torch.autograd.grad(
            self._outputs, self._parameters, along, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return [t if t.layout == torch.strided else t.to_dense() for t in parts]

    def _check_adjoint(self, suspects: Sequence[str]) -> None:
        """A backward that detaches raises nothing: compare `push` with `pull`, along a random u.

        With v = J^T u, ``u.(J v)`` is ``|v|^2``, and `pull` is a first derivative, which is not in doubt.
        """
        # Not ones: the outputs of a softmax add up to one, and J^T takes ones to zero.
        along = [normal_like(z.shape, z.dtype, z.device, key=(_ADJOINT_STREAM, i)) for i, z in enumerate(self._outputs)]
        vector = [t.detach() for t in self.pull(along)]
        expected = norm(vector) ** 2
        found = sum(
            float((u * t.detach()).sum(dtype=torch.float64)) for u, t in zip(along, self.push(vector), strict=True)
        )
        if abs(found - expected) > ADJOINT * expected:
            raise HVPUnsupportedError(
                f"the backward pass of {' or '.join(suspects)} hides part of the graph: J v is "
                f"{abs(found - expected) / expected:.1%} off what J^T says it is. Write the backward with torch "
                "operations that autograd can follow, or measure dyntune.hessian with method='finite-difference'."
            )


class LinearisedOperator(LinearOperator):
    """An operator that keeps every batch's linearised model while a session is open.

    Args:
        objective: The loss.
    """

    method = "exact, retained graph"
    doing = "linearising the model"

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective.space)
        self.objective = objective

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of the vectors."""
        return tuple(self.objective.parameters)

    @contextmanager
    def session(self) -> Iterator[Product]:
        """Build the graphs of all batches; a product is the weighted mean of theirs.

        Raises:
            HVPUnsupportedError: The loss does not have the form that the matrix asks for.
            NondeterministicLossError: See :meth:`Objective.check_repeatable`, asked once.
        """
        objective = self.objective
        objective.check_repeatable()
        with objective.differentiating() as buffers, unchanged_parameters(objective) as check:
            with objective.layout.together(self.doing):
                products = [self._batch(i, buffers) for i in range(len(objective.batches))]

            def product(vector: Sequence[torch.Tensor]) -> Vector:
                check()
                return objective.accumulate(lambda i: (products[i][0](vector), products[i][1]))

            yield objective.layout.across(product)

    @abstractmethod
    def _batch(self, index: int, buffers: BorrowedBuffers) -> tuple[Callable[..., Vector], float | torch.Tensor]:
        """The product on one batch, and the batch's weight."""
