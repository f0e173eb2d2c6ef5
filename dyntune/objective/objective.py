"""The loss as a function of the parameters: ``loss()``, ``gradient()`` and ``hvp(v)`` on frozen batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dyntune.errors import EmptyBatchError, NoGradientError, NonFiniteError
from dyntune.numerics.random import stream_seed
from dyntune.numerics.vectors import Vector, VectorSpace
from dyntune.objective.batches import freeze_batches, num_rows
from dyntune.objective.context import differentiable_twice, unwrap
from dyntune.objective.losses import Criterion, Loss, LossFunction, LossRule, resolve_loss
from dyntune.objective.parameters import ParameterSelection, select_parameters
from dyntune.objective.state import BorrowedBuffers, preserved_state, seed_all

__all__ = ["Objective", "Weighted"]


@dataclass(frozen=True)
class Weighted:
    """One batch's loss with its weight in the objective (not yet normalised)."""

    value: torch.Tensor
    weight: float | torch.Tensor


class Objective:
    """The loss of a model on frozen batches as a function of its selected parameters.

    The model is used as it is: in its present mode (recorded), with dropout's masks fixed by `seed`, in its storage
    precision. Over several batches the loss is the one that the concatenated data would have.

    Args:
        model: The model; wrappers of ``torch.compile`` and DDP are looked through.
        batches: See the batch grammar in :mod:`dyntune.objective.batches`.
        loss_fn: ``(model, batch) -> mean or Loss``.
        criterion: ``(outputs, targets) -> mean``.
        params: Globs or predicate on parameter names; default all trainable ones.
        num_batches: How many batches to draw from a loader.
        seed: Seed of dropout and other randomness in the forward pass.

    Raises:
        NoParametersError, UnsupportedDtypeError, NonFiniteError: See :func:`select_parameters`; also a non-finite loss.
        AmbiguousLossError, InvalidArgumentError, BatchError: See :func:`resolve_loss` and :func:`freeze_batches`.
        NoGradientError: The loss does not depend on the parameters.
        EmptyBatchError: No target counts.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        loss_fn: LossFunction | None = None,
        *,
        criterion: Criterion | None = None,
        params: ParameterSelection = None,
        num_batches: int | Literal["all"] = 16,
        seed: int = 0,
    ) -> None:
        self.model = unwrap(model)
        self.parameters: dict[str, nn.Parameter] = select_parameters(self.model, params)
        self.space = VectorSpace.of(list(self.parameters.values()))
        self.batches = freeze_batches(batches, num_batches=num_batches, device=self.space.device)
        self.seed = seed
        self.forward_bytes = 0
        with self.measuring() as buffers, differentiable_twice(self.model, self.space.device):
            self.rule: LossRule = resolve_loss(self.model, self.batches[0], loss_fn, criterion)
            self._probe(buffers)

    @property
    def tensors(self) -> list[nn.Parameter]:
        """The selected parameters, in order."""
        return list(self.parameters.values())

    @property
    def num_rows(self) -> int:
        """Rows in all batches together."""
        return sum(num_rows(batch) for batch in self.batches)

    @property
    def mode(self) -> str:
        """``train`` or ``eval``: BatchNorm and dropout make the two different functions."""
        return "train" if self.model.training else "eval"

    def describe(self) -> dict[str, Any]:
        """What was assumed, for the record."""
        return {
            "loss": self.rule.assumed,
            "count_unit": self.rule.unit,
            "num_batches": len(self.batches),
            "num_rows": self.num_rows,
            "mode": self.mode,
            "num_parameters": self.space.numel,
        }

    # -- evaluating ----------------------------------------------------------------------------------------------

    @contextmanager
    def measuring(self) -> Iterator[BorrowedBuffers]:
        """The scope within which forward passes may run; everything of the user's is put back at its end."""
        with preserved_state(self.model) as buffers:
            yield buffers

    def batch_loss(
        self,
        index: int,
        buffers: BorrowedBuffers,
        parameters: Mapping[str, torch.Tensor] | None = None,
        *,
        renew: bool = True,
    ) -> Weighted:
        """Loss of one batch, with `parameters` (by clean name) in place of the model's own where given.

        Args:
            index: Which batch.
            buffers: Of the enclosing :meth:`measuring`.
            parameters: Replacements.
            renew: Start from the user's buffers; False where a twin's buffers go along with its parameters.
        """
        if renew:
            buffers.renew()
        # One stream per batch: every pass over a batch sees the same dropout masks.
        seed_all(stream_seed(self.seed, index))
        batch = self.batches[index]
        with differentiable_twice(self.model, self.space.device):
            if parameters is None:
                loss = self.rule.evaluate(self.model, batch)
            else:
                loss = _evaluate_with(self.model, self.rule, batch, parameters)
        return Weighted(loss.value, loss.count if self.rule.reduction == "mean" else 1.0)

    def training_loss(
        self,
        index: int,
        buffers: BorrowedBuffers,
        parameters: Mapping[str, torch.Tensor],
        *,
        autocast: torch.dtype | None,
        seed: int,
    ) -> Loss:
        """Loss of one batch as training computes it: fused kernels, mixed precision, fresh dropout masks.

        Buffers are not renewed: in a twin's training BatchNorm statistics move along.
        """
        seed_all(seed)
        device = self.space.device
        with (
            torch.inference_mode(mode=False),
            torch.set_grad_enabled(torch.is_grad_enabled() or any(p.requires_grad for p in parameters.values())),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        ):
            return _evaluate_with(self.model, self.rule, self.batches[index], parameters)

    @property
    def adds_up(self) -> bool:
        """Whether batches are added up (``reduction="sum"``) rather than averaged by count."""
        return self.rule.reduction == "sum"

    def normaliser(self, weights: Sequence[float | torch.Tensor]) -> float | torch.Tensor:
        """What the weighted sum over batches is divided by."""
        if self.adds_up:
            return 1.0
        total: float | torch.Tensor = sum(weights[1:], start=weights[0])
        return total

    def total_loss(self, buffers: BorrowedBuffers) -> torch.Tensor:
        """The objective as one tensor, with the graph of every batch."""
        terms = [self.batch_loss(i, buffers) for i in range(len(self.batches))]
        if len(terms) == 1:
            return terms[0].value
        total = sum((t.value * t.weight for t in terms[1:]), start=terms[0].value * terms[0].weight)
        return total / self.normaliser([t.weight for t in terms])

    def loss(self) -> float:
        """The objective's value."""
        with self.measuring() as buffers, torch.no_grad():
            terms = [self.batch_loss(i, buffers) for i in range(len(self.batches))]
            if len(terms) == 1:
                return float(terms[0].value.detach())
            total = sum(float(t.value.detach()) * float(t.weight) for t in terms)
            return total / float(self.normaliser([t.weight for t in terms]))

    def gradient(self) -> Vector:
        """The objective's gradient: one tensor per parameter; ``.grad`` is not touched."""
        with self.measuring() as buffers:
            return self.accumulate(lambda i: self._batch_gradient(i, buffers))

    def hvp(self, vector: Sequence[torch.Tensor]) -> Vector:
        """Hessian-vector product, one batch after the other (no graph is kept)."""
        from dyntune.objective.hvp import reforward_session

        with reforward_session(self) as product:
            return list(product(self.space.check(vector)))

    def accumulate(self, term: Any) -> Vector:
        """Weighted mean over batches of ``term(index) -> (vector, weight)``."""
        total, weight = term(0)
        if len(self.batches) == 1:
            return list(total)
        total, weights = [t * weight for t in total], [weight]
        for index in range(1, len(self.batches)):
            vector, weight = term(index)
            torch._foreach_add_(total, [v * weight for v in vector])
            weights.append(weight)
        normaliser = self.normaliser(weights)
        return [t / normaliser for t in total]

    def _batch_gradient(self, index: int, buffers: BorrowedBuffers) -> tuple[Vector, float | torch.Tensor]:
        loss = self.batch_loss(index, buffers)
        parts = torch.autograd.grad(loss.value, self.tensors, allow_unused=True, materialize_grads=True)
        return list(parts), loss.weight

    # -- checking ------------------------------------------------------------------------------------------------

    def _probe(self, buffers: BorrowedBuffers) -> None:
        """One forward pass per problem that users should hear of at once; measures what a graph would take."""
        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            first = self.batch_loss(0, buffers)
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        self.forward_bytes = sum(size for pointer, size in seen.items() if pointer not in own)
        if not bool(torch.isfinite(first.value)):
            raise NonFiniteError(
                f"the loss of batch 0 is {float(first.value.detach())}: its derivatives are undefined. Check the inputs, "
                "the targets, and whether the run has already diverged."
            )
        if not self.adds_up and float(first.weight) <= 0:
            raise EmptyBatchError(
                f"batch 0 has no terms that count ({self.rule.unit}): its mean loss is undefined. Leave it out."
            )
        if not first.value.requires_grad:
            raise NoGradientError(
                "the loss does not depend on the selected parameters through autograd. Is it computed under "
                "torch.no_grad(), from detached or .item() values, or from other parameters than those selected?"
            )


class _Evaluation(nn.Module):
    """Lets ``torch.func.functional_call`` swap a model's parameters during a whole loss evaluation."""

    def __init__(self, model: nn.Module, rule: LossRule) -> None:
        super().__init__()
        self.subject = model
        self.rule = rule

    def forward(self, batch: Any) -> Loss:
        return self.rule.evaluate(self.subject, batch)


def _evaluate_with(model: nn.Module, rule: LossRule, batch: Any, parameters: Mapping[str, torch.Tensor]) -> Loss:
    """Evaluate the loss with other tensors in the place of the model's parameters (tied ones together)."""
    from dyntune.objective.parameters import clean_name

    full = {clean_name(name): name for name, _ in model.named_parameters()}
    swapped = {f"subject.{full[name]}": tensor for name, tensor in parameters.items()}
    result: Loss = torch.func.functional_call(_Evaluation(model, rule), swapped, (batch,))
    return result
