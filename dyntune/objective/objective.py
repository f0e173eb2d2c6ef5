"""The loss as a function of the parameters: ``loss()``, ``gradient()`` and ``hvp(v)`` on frozen batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dyntune.errors import (
    DyntuneError,
    HVPUnsupportedError,
    NoGradientError,
    NondeterministicLossError,
    StaleOperatorError,
)
from dyntune.numerics.arithmetic import plain_arithmetic
from dyntune.numerics.random import stream_seed
from dyntune.numerics.vectors import Vector
from dyntune.objective.batches import freeze_batches, num_rows
from dyntune.objective.context import differentiable_twice, unwrap
from dyntune.objective.dtensor import is_distributed_tensor
from dyntune.objective.fsdp import backward_gradient
from dyntune.objective.losses import Criterion, Loss, LossFunction, LossRule
from dyntune.objective.memory import enough_memory
from dyntune.objective.parameters import ParameterSelection, named_parameters, select_parameters
from dyntune.objective.precision import LOW_PRECISION, measured_dtype
from dyntune.objective.probe import Probed, probe, stand_ins
from dyntune.objective.resolve import resolve_loss
from dyntune.objective.shards import Gathered, ProcessGroupLike, Sharded, layout_of
from dyntune.objective.state import BorrowedBuffers, own_generators, parameter_slots, preserved_state, seed_all, swapped

__all__ = ["Objective", "Weighted", "differentiate"]


# Multiples of machine epsilon by which two evaluations of one loss may differ: kernels with atomic additions, and those
# whose order of summation depends on where memory lies, round differently each time. Another order of the rows changed
# the loss of an MLP, a CNN and a transformer by at most 1.8, dropout of 0.1 by 37,000 and more
# (tests/obstacles/test_determinism.py).
REPEAT_TOLERANCE = 100.0


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


def _kind(parameter: nn.Parameter) -> tuple[torch.Size, torch.dtype, torch.device]:
    return parameter.shape, parameter.dtype, parameter.device


class Objective:
    """The loss of a model on frozen batches as a function of its selected parameters.

    The model is used as it is: in its present mode (recorded), with dropout's masks fixed by `seed`. Parameters stored
    in bfloat16 or float16 are measured through float32 copies. Over several batches the loss is the one that the
    concatenated data would have.

    Args:
        model: The model; wrappers of ``torch.compile`` and DDP are looked through.
        batches: See the batch grammar in :mod:`dyntune.objective.batches`.
        loss_fn: ``(model, batch) -> mean or Loss``.
        criterion: ``(outputs, targets) -> mean``.
        params: Globs or predicate on parameter names; default all trainable ones.
        num_batches: How many batches to draw from a loader.
        num_checked: How many batches to evaluate once, here, for what users should hear of at once; default all.
        process_group: See :func:`dyntune.hessian`; None: this process alone.
        gather_limit: Bytes that the whole parameters of a sharded model may take on each process while measuring.
        widen: Measure parameters stored in bfloat16 or float16 through float32 copies; False: refuse them.
        seed: Seed of dropout and other randomness in the forward pass.

    Raises:
        NoParametersError, UnsupportedDtypeError, NonFiniteError: See :func:`select_parameters`; also a non-finite loss.
        AmbiguousLossError, InvalidArgumentError, BatchError: See :func:`resolve_loss` and :func:`freeze_batches`.
        NoGradientError: The loss does not depend on the parameters.
        EmptyBatchError: A batch in which no target counts.
        InvalidArgumentError: The forward pass writes to a parameter.
        HVPUnsupportedError: Reentrant checkpointing.
        InsufficientMemoryError: Not even one forward pass fits.

    Cost:
        One forward pass over the batches that are checked; two where the model is checkpointed.
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
        widen: bool = True,
        process_group: ProcessGroupLike = None,
        gather_limit: float = math.inf,
        seed: int = 0,
    ) -> None:
        self.model = unwrap(model)
        self.layout = layout_of(model, self.model, process_group, gather_limit=gather_limit)
        plain = (torch.float32, torch.float64)
        dtypes = (*plain, *LOW_PRECISION) if widen else plain
        with self.layout.together("reading the model and the batches"):
            self.parameters: dict[str, nn.Parameter] = select_parameters(self.model, params, dtypes=dtypes)
            self.precision = self.layout.precision()
            with plain_arithmetic(self.layout.device):
                drawn = freeze_batches(batches, num_batches=num_batches, device=self.layout.device)
                self.batches = tuple(self.precision.batch(batch) for batch in drawn)
        self.space = self.layout.space(list(self.parameters.values()))
        self._slots = parameter_slots(self.model, self.parameters.values())
        self.seed = seed
        self._generators = own_generators(self.model)
        self._stored = {name: _kind(p) for name, p in self.parameters.items()}
        self._repeatable = False
        self._others = True  # whether the loss runs modules outside of the model; the first pass shows
        self.layout.place(
            num_batches=len(self.batches),
            num_rows=self._own_rows(),
            signature=f"{self.mode}, seed {seed}, {self._kinds()}",
        )
        self.rule: LossRule
        with self.differentiating() as buffers, self.layout.together("the first forward pass"):
            self._probed = self._first_pass(buffers, loss_fn, criterion, num_checked)
            self._others = buffers.others > 0
        self.layout.weigh(self._probed.weight, adds_up=self.adds_up)

    def _first_pass(
        self,
        buffers: BorrowedBuffers,
        loss_fn: LossFunction | None,
        criterion: Criterion | None,
        num_checked: int | None,
    ) -> Probed:
        """Find the loss and evaluate it once per batch."""
        with ExitStack() as stack:
            stack.enter_context(enough_memory("the first forward pass"))
            stack.enter_context(self.precision.explained())
            # What stands in for gathered shards is a copy already, and FSDP's own passes take no other tensors.
            copied = isinstance(self.layout, (Gathered, Sharded))
            copies: Mapping[str, torch.Tensor] = self.present if copied else stack.enter_context(stand_ins(self.model))
            self.rule = resolve_loss(self.model, self.batches[0], loss_fn, criterion)
            return probe(self, buffers, copies, num_checked=None if self.layout.team else num_checked)

    @property
    def forward_bytes(self) -> int:
        """What the largest batch's graph saves for the backward pass, parameters apart."""
        return self._probed.forward_bytes

    @property
    def suspects(self) -> tuple[str, ...]:
        """Operations whose second derivative has to be verified."""
        return self._probed.suspects

    @property
    def present(self) -> dict[str, nn.Parameter]:
        """What the model computes with: the selected parameters, within :meth:`measuring` their float32 copies."""
        return {name: self.precision.of(p) for name, p in self.parameters.items()}

    @property
    def tensors(self) -> list[nn.Parameter]:
        """The values of :attr:`present`, in order."""
        return list(self.present.values())

    def _kinds(self) -> str:
        """The parameters in one line."""
        return ", ".join(f"{name} {list(shape)} {dtype}" for name, (shape, dtype, _) in self._stored.items())

    def _own_rows(self) -> int:
        return sum(num_rows(batch) for batch in self.batches)

    @property
    def num_rows(self) -> int:
        """Rows in all batches together, on all processes."""
        return self.layout.num_rows if self.layout.team else self._own_rows()

    @property
    def num_batches(self) -> int:
        """How many batches there are, on all processes."""
        return self.layout.num_batches if self.layout.team else len(self.batches)

    @property
    def mode(self) -> str:
        """``train`` or ``eval``: BatchNorm and dropout make the two different functions."""
        return "train" if self.model.training else "eval"

    def restricted(self, names: Sequence[str]) -> Objective:
        """The same loss as a function of some of the selected parameters, the others held."""
        other = copy.copy(self)
        other.parameters = {name: self.parameters[name] for name in names}
        other.layout = copy.copy(self.layout)
        other.space = other.layout.space(list(other.parameters.values()))
        other._slots = parameter_slots(self.model, other.parameters.values())
        return other

    def on(self, batches: Sequence[Any]) -> Objective:
        """The same loss on other batches, already on the right device (not checked again).

        Raises:
            HVPUnsupportedError: Measuring together with other processes, with whose counts they would have to be
                weighed.
        """
        if self.layout.team is not None:
            raise HVPUnsupportedError(
                "this measurement draws batches of its own, which is not supported over several processes. Measure on "
                "one: process_group=None, with an unsharded model."
            )
        other = copy.copy(self)
        other.batches = tuple(self.precision.batch(batch) for batch in batches)
        return other

    def describe(self) -> dict[str, Any]:
        """What was assumed, for the record."""
        return {
            "loss": self.rule.assumed,
            "count_unit": self.rule.unit,
            "num_batches": self.num_batches,
            "num_rows": self.num_rows,
            "mode": self.mode,
            "num_parameters": self.space.numel,
            **self.layout.describe(),
            **({"precision": self.precision.note} if self.precision else {}),
        }

    def check_repeatable(self) -> None:
        """Evaluate the first batch once more, the first time this is called: its loss has to be what it was.

        Differences as small as rounding pass. Where the parameters moved in between, a third evaluation decides.

        Cost: a forward pass with its graph; 0.4 to 0.5 gradients of one batch, which is 0.7 to 0.8% of finding that
        batch's largest eigenvalue (the same three models, one thread).

        Raises:
            NondeterministicLossError: The loss depends on something besides parameters, batch and seed.
        """
        if self._repeatable or self.layout.native:  # a native pass is a collective: one process must not do a third
            return
        with (
            enough_memory("a forward pass"),
            self.differentiating() as buffers,
            self.layout.together("checking that the loss repeats"),
        ):
            again = self._value(0, buffers)
            if not self._same(self._probed.first_loss, again) and not self._same(
                again, third := self._value(0, buffers)
            ):
                raise NondeterministicLossError(
                    f"two evaluations of the loss of batch 0 at the same parameters gave {again:.8g} and {third:.8g}: "
                    "there is no one function to take derivatives of. torch's, NumPy's and Python's global generators "
                    "are seeded, and those that modules hold; something else draws or counts. In loss_fn, take the "
                    "data from `batch`, not from an iterator; seed a generator of your own at the start of each call; "
                    "keep counters in buffers (register_buffer), which are put back."
                )
        self._repeatable = True

    def _value(self, index: int, buffers: BorrowedBuffers) -> float:
        return float(self.batch_loss(index, buffers).value.detach())

    def _same(self, one: float, other: float) -> bool:
        permitted = REPEAT_TOLERANCE * torch.finfo(self.space.dtype).eps * max(abs(one), abs(other))
        return abs(one - other) <= permitted or (math.isnan(one) and math.isnan(other))

    # -- evaluating ----------------------------------------------------------------------------------------------

    @contextmanager
    def measuring(self) -> Iterator[BorrowedBuffers]:
        """The scope within which forward passes may run; everything of the user's is put back at its end.

        Raises:
            StaleOperatorError: A selected parameter was replaced, converted or frozen since.
        """
        with self.layout.together("comparing the parameters with those that were selected"):
            self.layout.settle()
            self._check_selection()
        dtype = {"dtype": measured_dtype} if self.precision else {}
        with (
            plain_arithmetic(self.space.device),
            preserved_state(self.model, **dtype, others=self._others) as buffers,
            self.layout.prepared(),
            self.precision.lent(),
        ):
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
        for name, p in self.parameters.items():
            if present.get(name) is not self.precision.of(p) or _kind(p) != self._stored[name] or not p.requires_grad:
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
        seed_all(stream_seed(self.seed, self.layout.first_batch + index), self._generators)
        with differentiable_twice(self.model, self.space.device), self.swapped(parameters or {}):
            loss = self.rule.evaluate(self.model, self.batches[index])
        value: torch.Tensor = loss.value.full_tensor() if is_distributed_tensor(loss.value) else loss.value  # type: ignore[attr-defined]
        return Weighted(value, loss.count if self.rule.reduction == "mean" else 1.0)

    @contextmanager
    def training_pass(
        self, index: int, parameters: Mapping[str, torch.Tensor], *, autocast: torch.dtype | None, seed: int
    ) -> Iterator[Loss]:
        """Loss of one batch as training computes it: fused kernels, mixed precision, fresh dropout masks.

        The backward pass belongs inside (checkpointed blocks run forward again in it). Buffers are not renewed: in a
        twin's training BatchNorm statistics move along.
        """
        seed_all(seed, self._generators)
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
        with self.differentiating() as buffers, self.layout.together("computing the loss"):
            total = norm = 0.0
            for index in range(len(self.batches)):
                term = self.batch_loss(index, buffers)
                weight = float(term.weight) if len(self.batches) > 1 else 1.0
                total, norm = total + float(term.value.detach()) * weight, norm + weight
            own = total if self.adds_up else total / norm
        return self.layout.whole_loss(own)

    def gradient(self) -> Vector:
        """The objective's gradient: one tensor per parameter; ``.grad`` is not touched."""
        with self.differentiating() as buffers:
            if isinstance(self.layout, Sharded):
                with self.layout.together("computing the gradient"):
                    return backward_gradient(self, buffers)
            return self.collected(lambda: self.accumulate(lambda i: self._batch_gradient(i, buffers)))

    def collected(self, vector: Callable[[], Sequence[torch.Tensor]]) -> Vector:
        """A vector over all processes' data from one on this process's: an error on one reaches all."""
        return list(self.layout.across(lambda _: vector())(self.space.zeros()))

    def batch_share(self, weight: float | torch.Tensor) -> float | torch.Tensor:
        """Share of one batch in this process's loss."""
        return 1.0 if self.adds_up else weight / self._probed.weight

    def hvp(self, vector: Sequence[torch.Tensor]) -> Vector:
        """Hessian-vector product, one batch after the other (no graph is kept)."""
        from dyntune.objective.hvp import first_line, is_unsupported, reforward_session

        try:
            with reforward_session(self) as product:
                return list(self.layout.across(product)(self.space.check(vector)))
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, DyntuneError) or not is_unsupported(error):
                raise
            raise HVPUnsupportedError(f"the model cannot be differentiated twice: {first_line(error)}") from error

    def accumulate(self, term: Any) -> Vector:
        """Weighted mean over batches of ``term(index) -> (vector, weight)``."""
        total, weight = term(0)
        total = self.layout.parts(total)
        if len(self.batches) == 1:
            return list(total)
        total, weights = [t * weight for t in total], [weight]
        for index in range(1, len(self.batches)):
            vector, weight = term(index)
            torch._foreach_add_(total, [v * weight for v in self.layout.parts(vector)])
            weights.append(weight)
        normaliser = self.normaliser(weights)
        return [t / normaliser for t in total]

    def _batch_gradient(self, index: int, buffers: BorrowedBuffers) -> tuple[Vector, float | torch.Tensor]:
        loss = self.batch_loss(index, buffers)
        return differentiate(loss.value, self.tensors), loss.weight
