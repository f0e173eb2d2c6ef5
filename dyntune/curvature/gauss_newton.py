r"""The generalised Gauss-Newton matrix as an operator: :func:`gauss_newton`.

With outputs :math:`z = f(\theta)` and a loss :math:`\ell(z)`, :math:`G = J^\top \nabla^2_z \ell\, J` with the Jacobian
J of the outputs: the Hessian without the curvature of the network itself. For cross-entropy and squared error it is
positive semi-definite, and for cross-entropy equal to the Fisher information matrix of the model's predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from dyntune.errors import HVPUnsupportedError
from dyntune.numerics.operator import LinearOperator, Product
from dyntune.numerics.vectors import Vector, norm
from dyntune.objective.hvp import unchanged_parameters
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective, Weighted
from dyntune.objective.parameters import ParameterSelection
from dyntune.objective.shards import ProcessGroupLike
from dyntune.objective.state import BorrowedBuffers

__all__ = ["GaussNewtonOperator", "gauss_newton"]

# A loss that reaches the parameters past the outputs (an L2 term, say) leaves a part of the gradient unexplained; in
# float32 the two ways of computing it differ by rounding, 1e-6 or so.
PAST_THE_OUTPUTS = 1e-3


class GaussNewtonOperator(LinearOperator):
    """Gauss-Newton matrix of an :class:`Objective`; positive semi-definite where the loss is convex in the outputs.

    Args:
        objective: A loss that depends on the parameters through the model's output only.
    """

    method = "exact, retained graph"

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective.space)
        self.objective = objective

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of the vectors."""
        return tuple(self.objective.parameters)

    @contextmanager
    def session(self) -> Iterator[Product]:
        """Keep the graphs of all batches: forward, one backward, and the backward's own linear graph.

        Raises:
            HVPUnsupportedError: The loss depends on the parameters past the outputs, or the model returns no tensor.
            NondeterministicLossError: See :meth:`Objective.check_repeatable`, asked once.
        """
        objective = self.objective
        objective.check_repeatable()
        with objective.differentiating() as buffers, unchanged_parameters(objective) as check:
            with objective.layout.together("linearising the model"):
                products = [self._batch(i, buffers) for i in range(len(objective.batches))]

            def product(vector: Sequence[torch.Tensor]) -> Vector:
                check()
                return objective.accumulate(lambda i: (products[i][0](vector), products[i][1]))

            yield objective.layout.across(product)

    def _batch(self, index: int, buffers: BorrowedBuffers) -> tuple[Callable[..., Vector], float | torch.Tensor]:
        """The product on one batch, and the batch's weight."""
        parameters = self.objective.tensors
        outputs, loss = _with_outputs(self.objective, index, buffers)
        slopes = torch.autograd.grad(
            loss.value, outputs, create_graph=True, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        _check_through_outputs(loss.value, outputs, slopes, parameters)
        # J^T u is linear in u, so its derivative with respect to u along the vector is J v: reverse mode only.
        probes = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        pulled = torch.autograd.grad(
            outputs, parameters, probes, create_graph=True, allow_unused=True, materialize_grads=True
        )

        def product(vector: Sequence[torch.Tensor]) -> Vector:
            live = [(g, v) for g, v in zip(pulled, vector, strict=True) if g.requires_grad]
            if not live:
                return [torch.zeros_like(p) for p in parameters]
            heads, weights = zip(*live, strict=True)
            pushed = torch.autograd.grad(heads, probes, weights, retain_graph=True, materialize_grads=True)  # J v
            curved = _output_curvature(slopes, outputs, pushed)
            parts = torch.autograd.grad(
                outputs, parameters, curved, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return [t if t.layout == torch.strided else t.to_dense() for t in parts]

        return product, loss.weight


def _output_curvature(
    slopes: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], direction: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Hessian of the loss with respect to the outputs, times a direction."""
    live = [(s, d) for s, d in zip(slopes, direction, strict=True) if s.requires_grad]
    if not live:
        return [torch.zeros_like(z) for z in outputs]
    heads, weights = zip(*live, strict=True)
    return torch.autograd.grad(heads, outputs, weights, retain_graph=True, allow_unused=True, materialize_grads=True)


def _with_outputs(objective: Objective, index: int, buffers: BorrowedBuffers) -> tuple[list[torch.Tensor], Weighted]:
    """Loss of one batch with the tensors that the model returned on the way."""
    seen: list[Any] = []
    handle = objective.model.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        loss = objective.batch_loss(index, buffers)
    finally:
        handle.remove()
    outputs = [t for output in seen for t in _tensors(output) if t.requires_grad and t is not loss.value]
    outputs = [t for t in outputs if t.is_floating_point()]
    if not outputs:
        raise HVPUnsupportedError(
            "the model's call returned no differentiable tensor, so there are no outputs to linearise. Call the model "
            "itself in loss_fn: model(batch[0])."
        )
    return outputs, loss


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Tensors in a model's output, without a loss that it computed itself."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for key, item in output.items():
            if key != "loss":
                yield from _tensors(item)
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)


def _check_through_outputs(
    loss: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    slopes: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
) -> None:
    whole = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    through = torch.autograd.grad(
        outputs,
        parameters,
        [s.detach() for s in slopes],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    gap = norm(torch._foreach_sub(list(whole), list(through)))
    size = norm(whole)
    if gap > PAST_THE_OUTPUTS * size:
        raise HVPUnsupportedError(
            f"{gap / size:.1%} of the gradient does not pass through the model's output once: a regulariser in the "
            "loss, a hidden state that it reads, or a model called on its own output. Gauss-Newton needs "
            "loss(outputs). Leave the extra term out, or measure dyntune.hessian."
        )


def gauss_newton(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    criterion: Criterion | None = None,
    params: ParameterSelection = None,
    num_batches: int | Literal["all"] = 16,
    process_group: ProcessGroupLike = "auto",
    seed: int = 0,
) -> GaussNewtonOperator:
    """The generalised Gauss-Newton matrix of the loss, as a linear operator.

    Args:
        model: As for :func:`dyntune.hessian`, like everything else here. The loss must depend on the parameters through
            what the model returns, and on nothing else.
        batches: See there.
        loss_fn: See there.
        criterion: See there.
        params: See there.
        num_batches: See there.
        process_group: See there; shards are always gathered.
        seed: See there.

    Returns:
        A symmetric operator on vectors shaped like the parameters; unit: loss / parameter^2.

    Raises:
        HVPUnsupportedError: When a session opens: the loss reaches the parameters past the outputs.
        DyntuneError: As :func:`dyntune.hessian`.

    Accuracy:
        Exact up to rounding.
    Cost:
        1.1 to 1.3 gradients per product (median of 25 pairs, MLP and small transformer, one CPU core, torch 2.13): the
        forward pass is kept. Per batch a graph of about three forward passes.
    Source:
        Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent", Neural
        Computation 14(7); Martens (2020), arXiv:1412.1193, section 8.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # linear in its parameters: Gauss-Newton is the Hessian
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> gauss_newton(model, batch, criterion=torch.nn.MSELoss()) @ torch.ones(2)
        tensor([4., 1.])
    """
    return GaussNewtonOperator(
        Objective(
            model,
            batches,
            loss_fn,
            criterion=criterion,
            params=params,
            num_batches=num_batches,
            process_group=process_group,
            seed=seed,
        )
    )
