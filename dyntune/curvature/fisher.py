r"""The empirical Fisher matrix as an operator: :func:`empirical_fisher`.

.. math:: F = \frac{\sum_i c_i\, g_i g_i^\top}{\sum_i c_i}

With :math:`g_i` the gradient of row i's own loss :math:`\ell_i` and :math:`c_i` the count that this loss averages over,
it is the same weighted mean of outer products that the loss :math:`\sum_i c_i \ell_i / \sum_i c_i` is of row losses.
So :math:`F - g g^\top`, with g the gradient of the loss, is the covariance of the rows' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dyntune.curvature.linearised import Jacobian, LinearisedOperator
from dyntune.errors import HVPUnsupportedError
from dyntune.numerics.vectors import Vector, norm
from dyntune.objective.batches import num_rows, split_rows
from dyntune.objective.hvp import first_line
from dyntune.objective.losses import Criterion, Loss, LossFunction
from dyntune.objective.objective import Objective
from dyntune.objective.parameters import ParameterSelection
from dyntune.objective.shards import ProcessGroupLike
from dyntune.objective.state import BorrowedBuffers

__all__ = ["EmpiricalFisherOperator", "empirical_fisher"]

# Two ways of computing the same derivatives differ by rounding, 1e-6 or so in float32; a loss that couples its rows or
# passes by the outputs differs by what is missed. The same limit as for Gauss-Newton.
MISSED = 1e-3

_ADVICE = "Pass criterion=..., or a loss_fn that makes a mean over rows from one call model(batch[0])."


class EmpiricalFisherOperator(LinearisedOperator):
    """Empirical Fisher matrix of an :class:`Objective`; positive semi-definite, of rank at most the number of rows.

    Args:
        objective: A loss that is a weighted mean over rows (or their sum), each through its row of the model's output.
    """

    doing = "telling the rows apart"

    def _batch(self, index: int, buffers: BorrowedBuffers) -> tuple[Callable[..., Vector], float | torch.Tensor]:
        """The product on one batch, and the batch's weight."""
        parameters = self.objective.tensors
        calls: list[Any] = []
        handle = self.objective.model.register_forward_hook(lambda _module, _inputs, output: calls.append(output))
        try:
            loss = self.objective.batch_loss(index, buffers)
        finally:
            handle.remove()
        rows = _row_slopes(self.objective, index, calls)
        _check_mean_over_rows(loss.value, rows, parameters)
        jacobian = Jacobian(rows.outputs, parameters, suspects=self.objective.suspects)

        def product(vector: Sequence[torch.Tensor]) -> Vector:
            # g_i . v for every row, times the row's share in the mean
            pushed = jacobian.push(vector)
            along = sum((s * t).flatten(1).sum(1) for s, t in zip(rows.slopes, pushed, strict=True)) * rows.shares
            return jacobian.pull([s * _like(along, s) for s in rows.slopes])

        return product, loss.weight


@dataclass(frozen=True)
class _Rows:
    """What the rows of one batch make of the model's outputs.

    Args:
        outputs: The model's output tensors with their graph, each (rows, ...).
        slopes: Derivative of each row's own loss with respect to its row of the outputs, shaped like them.
        shares: Weight of each row in the batch's loss, (rows,): adds up to one, or all ones where losses are added up.
        value: The batch's loss put together from its rows.
        size: The same of their absolute values: what rounding in `value` is relative to.
    """

    outputs: tuple[torch.Tensor, ...]
    slopes: tuple[torch.Tensor, ...]
    shares: torch.Tensor
    value: float
    size: float


class _Replay(nn.Module):
    """Stands in for the model and answers with what the model answered, one row of it."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        super().__init__()
        self._answers = iter(outputs)

    def forward(self, *_inputs: Any, **_keywords: Any) -> Any:
        return next(self._answers)


def _row_slopes(objective: Objective, index: int, calls: Sequence[Any]) -> _Rows:
    """Evaluate the loss on every row of the batch, on the outputs of the one forward pass that was made."""
    batch = objective.batches[index]
    count = num_rows(batch)
    leaves, structure = pytree.tree_flatten(list(calls))
    places = [i for i, leaf in enumerate(leaves) if _has_rows(leaf, count)]
    if not places:
        raise HVPUnsupportedError(
            f"the model's call returned no differentiable tensor with the batch's {count} rows, so rows cannot be told "
            f"apart. {_ADVICE}"
        )
    cut = [leaves[i].detach().split(1) for i in places]
    fixed = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    values, counts, own = [], [], []
    for row, data in enumerate(split_rows(batch, count)):
        own.append([pieces[row].clone().requires_grad_() for pieces in cut])
        for place, leaf in zip(places, own[-1], strict=True):
            fixed[place] = leaf
        found = _row_loss(objective, data, pytree.tree_unflatten(fixed, structure), row)
        values.append(found.value)
        counts.append(1.0 if objective.adds_up else found.count)
    value = torch.stack(values)
    weights = torch.stack([torch.as_tensor(c, dtype=value.dtype, device=value.device) for c in counts])
    slopes = _own_slopes(value, own)
    counted = weights > 0  # a row without terms that count has a mean of 0 / 0
    shares = weights if objective.adds_up else weights / weights.sum()
    parts = shares * value.detach().where(counted, 0.0)
    return _Rows(
        outputs=tuple(leaves[i] for i in places),
        slopes=tuple(s.where(_like(counted, s), 0.0) for s in slopes),
        shares=shares,
        value=float(parts.sum()),
        size=float(parts.abs().sum()),
    )


def _own_slopes(values: torch.Tensor, own: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Derivative of each row's value by its own tensors; stacked again, (rows, ...) each."""
    total = values.sum()  # rows are separate tensors: the sum keeps them apart
    flat = [leaf for leaves in own for leaf in leaves]
    if total.requires_grad:
        flat = list(torch.autograd.grad(total, flat, allow_unused=True, materialize_grads=True))
    else:
        flat = [torch.zeros_like(leaf) for leaf in flat]
    width = len(own[0])
    return [torch.cat(flat[i::width]) for i in range(width)]


def _like(rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """One number per row, to be multiplied with a tensor (rows, ...)."""
    return rows.view(-1, *[1] * (tensor.dim() - 1))


def _has_rows(leaf: Any, count: int) -> bool:
    if not isinstance(leaf, torch.Tensor) or not leaf.requires_grad:
        return False
    return leaf.is_floating_point() and leaf.dim() > 0 and leaf.shape[0] == count


def _row_loss(objective: Objective, data: Any, answers: Sequence[Any], row: int) -> Loss:
    try:
        return objective.rule.evaluate(_Replay(answers).train(objective.model.training), data)
    except (AttributeError, IndexError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise HVPUnsupportedError(
            f"the loss could not be evaluated on row {row} of the model's output alone, as the empirical Fisher matrix "
            f"asks: {first_line(error)} {_ADVICE}"
        ) from error


def _check_mean_over_rows(loss: torch.Tensor, rows: _Rows, parameters: Sequence[torch.Tensor]) -> None:
    """The rows' losses add up to the batch's, and it reaches the parameters through the outputs only.

    Raises:
        HVPUnsupportedError: One of the two does not hold.
    """
    whole = torch.autograd.grad(loss, rows.outputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    gap = norm(torch._foreach_sub(list(whole), [s * _like(rows.shares, s) for s in rows.slopes]))
    off = abs(rows.value - float(loss.detach()))
    if gap > MISSED * norm(whole) or not off <= MISSED * rows.size:  # NaN is no agreement
        raise HVPUnsupportedError(
            f"the loss {float(loss.detach()):g} is not the mean of its rows' losses, {rows.value:g}, or their "
            "derivatives differ: it couples the rows (a contrastive loss, say), adds a regulariser, or the model "
            "computes it inside. The empirical Fisher matrix is made of the gradients of the rows' own losses. "
            f"{_ADVICE}"
        )
    gradient = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    through = torch.autograd.grad(
        rows.outputs, parameters, whole, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    missed, size = norm(torch._foreach_sub(list(gradient), list(through))), norm(gradient)
    if missed > MISSED * size:
        raise HVPUnsupportedError(
            f"{missed / size:.1%} of the gradient does not pass through the rows of the model's output: a regulariser "
            f"in the loss, or a model that is called on its own output. Leave the extra term out. {_ADVICE}"
        )


def empirical_fisher(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFunction | None = None,
    *,
    criterion: Criterion | None = None,
    params: ParameterSelection = None,
    num_batches: int | Literal["all"] = 16,
    process_group: ProcessGroupLike = "auto",
    seed: int = 0,
) -> EmpiricalFisherOperator:
    """The empirical Fisher matrix of the loss, ``F = sum_i c_i g_i g_i^T / sum_i c_i``, as a linear operator.

    A row is one entry of the batch's first dimension: an example, or a whole sequence. ``g_i`` is the gradient of row
    i's own loss, which is the given loss evaluated on row i of the outputs of one forward pass over the batch, and
    ``c_i`` its count:

    * rows or elements: every row counts the same, F is the plain mean over rows;
    * cross-entropy with ``ignore_index``: a sequence's loss is the mean over its tokens that count, and their number
      its weight; a row without any adds nothing;
    * class weights: they weigh the rows, not the gradients (the row's own mean divides by its weight);
    * ``reduction="sum"``: F is the sum of ``g_i g_i^T``, as the loss is the sum of ``l_i``.

    Batches of any sizes give the F of the concatenated data. Where the forward pass couples rows (BatchNorm in
    training mode) ``g_i`` is the gradient of row i's loss as its batch makes it, and F belongs to these batches; with
    dropout each row has the mask of its place in the batch.

    It is not the Fisher information: that takes labels from the model's predictions, not from the data, and is
    :func:`dyntune.gauss_newton` for cross-entropy. The two agree only where the model is right about its own errors.

    Args:
        model: As for :func:`dyntune.hessian`, like everything else here.
        batches: See there.
        loss_fn: See there; it must be a mean over rows of the output of ``model(...)``. It is called once per row.
        criterion: See there.
        params: See there.
        num_batches: See there.
        process_group: See there; shards are always gathered.
        seed: See there.

    Returns:
        A symmetric positive semi-definite operator on vectors shaped like the parameters; unit: (loss / parameter)^2.

    Raises:
        HVPUnsupportedError: When a session opens: the loss is not a mean over the rows of the model's output (it
            couples them, has a regulariser, or the model computes it itself).
        DyntuneError: As :func:`dyntune.hessian`.

    Accuracy:
        Exact up to rounding.
    Cost:
        A product measured as 1.1 gradients on an MLP and 1.2 on a small transformer (1 CPU core, torch 2.13). When a
        session opens, per batch a graph of about two forward passes and one call of the loss per row, on outputs only:
        measured as 3 gradients for 16 sequences of the transformer, 10 for 512 rows of the MLP (75 microseconds a row).
        No gradient of a single row is ever stored.
    Source:
        Kunstner, Balles and Hennig (2019), "Limitations of the empirical Fisher approximation for natural gradient
        descent", arXiv:1905.12558, equation 3; products as in Schraudolph (2002), Neural Computation 14(7).

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> batch = (torch.eye(2), torch.zeros(2, 1))  # gradients (2, 0) and (0, 2) of the rows' squared errors
        >>> empirical_fisher(model, batch, criterion=torch.nn.MSELoss()) @ torch.ones(2)
        tensor([2., 2.])
    """
    return EmpiricalFisherOperator(
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
