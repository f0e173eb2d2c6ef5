"""The loss as a function of the parameters: ``loss()``, ``gradient()`` and ``hvp(v)`` on frozen batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dyntune.errors import (
    DyntuneError,
    HVPUnsupportedError,
    NoGradientError,
    StaleOperatorError,
)
from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.numerics.random import stream_seed
from dyntune.numerics.vectors import Vector, VectorSpace
from dyntune.objective.batches import freeze_batches, num_rows
from dyntune.objective.context import differentiable_twice, unwrap
from dyntune.objective.losses import Criterion, Loss, LossFunction, LossRule
from dyntune.objective.parameters import ParameterSelection, named_parameters, select_parameters
from dyntune.objective.probe import probe, stand_ins
from dyntune.objective.resolve import resolve_loss
from dyntune.objective.state import BorrowedBuffers, parameter_slots, preserved_state, seed_all, swapped

__all__ = ["Objective", "Weighted", "differentiate"]


@dataclass(frozen=True)
class Weighted:
    """One batch's loss with its weight in the objective (not yet normalised)."""

    value: torch.Tensor
    weight: float | torch.Tensor


def differentiate(loss: torch.Tensor, parameters: Sequence[torch.Tensor], *, create_graph: bool = False) -> Vector:
    """Gradient of one loss: dense tensors, zeros for parameters that it does not depend on."""
    if not loss.requires_grad:  # one batch of several may not use the selected parameters at all
        return [torch.zeros_like(p) for p in parameters]
    try:
        parts = torch.autograd.grad(
            loss, parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise NoGradientError(
            "the graph of the loss was freed before the loss was returned: loss_fn calls backward() itself. Return the "
            "loss without backward(), or call backward(retain_graph=True)."
        ) from error
    return [g if g.layout == torch.strided else g.to_dense() for g in parts]


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
        num_checked: How many batches to evaluate once, here, for what users should hear of at once; default all.
        seed: Seed of dropout and other randomness in the forward pass.

    Raises:
        NoParametersError, UnsupportedDtypeError, NonFiniteError: See :func:`select_parameters`; also a non-finite loss.
        AmbiguousLossError, InvalidArgumentError, BatchError: See :func:`resolve_loss` and :func:`freeze_batches`.
        NoGradientError: The loss does not depend on the parameters.
        EmptyBatchError: A batch in which no target counts.
        InvalidArgumentError: The forward pass writes to a parameter.
        HVPUnsupportedError: Reentrant checkpointing.

    Cost:
        One forward pass over the batches that are checked.
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
        num_checked: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model = unwrap(model)
        self.parameters: dict[str, nn.Parameter] = select_parameters(self.model, params)
        self.space = VectorSpace.of(list(self.parameters.values()))
        self._slots = parameter_slots(self.model, self.parameters.values())
        with plain_arithmetic(self.space.device):
            self.batches = freeze_batches(batches, num_batches=num_batches, device=self.space.device)
        self.seed = seed
        self.forward_bytes: int
        self.suspects: tuple[str, ...]
        with self.differentiating() as buffers, stand_ins(self.model) as copies:
            self.rule: LossRule = resolve_loss(self.model, self.batches[0], loss_fn, criterion)
            self.forward_bytes, self.suspects = probe(self, buffers, copies, num_checked=num_checked)

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

    def restricted(self, names: Sequence[str]) -> Objective:
        """The same loss as a function of some of the selected parameters, the others held."""
        other = copy.copy(self)
        other.parameters = {name: self.parameters[name] for name in names}
        other.space = VectorSpace.of(list(other.parameters.values()))
        other._slots = parameter_slots(self.model, other.parameters.values())
        return other

    def on(self, batches: Sequence[Any]) -> Objective:
        """The same loss on other batches, already on the right device (not checked again)."""
        other = copy.copy(self)
        other.batches = tuple(batches)
        return other

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
        """The scope within which forward passes may run; everything of the user's is put back at its end.

        Raises:
            StaleOperatorError: A selected parameter was replaced, converted or frozen since.
        """
        self._check_selection()
        with plain_arithmetic(self.space.device), preserved_state(self.model) as buffers:
            yield buffers

    @contextmanager
    def differentiating(self) -> Iterator[BorrowedBuffers]:
        """:meth:`measuring`, for forward and backward passes of ours: a checkpointed block runs forward in both."""
        with self.measuring() as buffers, differentiable_twice(self.model, self.space.device):
            yield buffers

    @contextmanager
    def swapped(self, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Other tensors in the place of the model's parameters (by clean name; tied ones together).

        Keep it open during the backward pass, too: checkpointed blocks read the parameters again.
        """
        pairs = [
            (slot, parameters[name])
            for name, slots in zip(self.parameters, self._slots, strict=True)
            for slot in slots
            if name in parameters
        ]
        with swapped([slot for slot, _ in pairs], [tensor for _, tensor in pairs]):
            yield

    def _check_selection(self) -> None:
        present = named_parameters(self.model)
        expected = zip(self.parameters.items(), self.space.shapes, self.space.dtypes, self.space.devices, strict=True)
        for (name, p), *kind in expected:
            if present.get(name) is not p or [p.shape, p.dtype, p.device] != kind or not p.requires_grad:
                raise StaleOperatorError(
                    f"parameter {name!r} was replaced, converted, moved or frozen since this operator was made: it "
                    "would speak of tensors that the model no longer trains. Make a new one."
                )

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
        with differentiable_twice(self.model, self.space.device), self.swapped(parameters or {}):
            loss = self.rule.evaluate(self.model, self.batches[index])
        return Weighted(loss.value, loss.count if self.rule.reduction == "mean" else 1.0)

    @contextmanager
    def training_pass(
        self, index: int, parameters: Mapping[str, torch.Tensor], *, autocast: torch.dtype | None, seed: int
    ) -> Iterator[Loss]:
        """Loss of one batch as training computes it: fused kernels, mixed precision, fresh dropout masks.

        The backward pass belongs inside (checkpointed blocks run forward again in it). Buffers are not renewed: in a
        twin's training BatchNorm statistics move along.
        """
        seed_all(seed)
        device = self.space.device
        with (
            torch.inference_mode(mode=False),
            torch.set_grad_enabled(any(p.requires_grad for p in parameters.values())),
            self.swapped(parameters),
        ):
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                loss = self.rule.evaluate(self.model, self.batches[index])
            yield loss

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
        with self.differentiating() as buffers:
            total = norm = 0.0
            for index in range(len(self.batches)):
                term = self.batch_loss(index, buffers)
                weight = float(term.weight) if len(self.batches) > 1 else 1.0
                total, norm = total + float(term.value.detach()) * weight, norm + weight
            return total if self.adds_up else total / norm

    def gradient(self) -> Vector:
        """The objective's gradient: one tensor per parameter; ``.grad`` is not touched."""
        with self.differentiating() as buffers:
            return self.accumulate(lambda i: self._batch_gradient(i, buffers))

    def hvp(self, vector: Sequence[torch.Tensor]) -> Vector:
        """Hessian-vector product, one batch after the other (no graph is kept)."""
        from dyntune.objective.hvp import first_line, is_unsupported, reforward_session

        try:
            with reforward_session(self) as product:
                return list(product(self.space.check(vector)))
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, DyntuneError) or not is_unsupported(error):
                raise
            raise HVPUnsupportedError(f"the model cannot be differentiated twice: {first_line(error)}") from error

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
        return differentiate(loss.value, self.tensors), loss.weight
