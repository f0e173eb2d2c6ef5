"""One forward pass per batch before anything is measured: what users should hear of at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from dyntune.errors import EmptyBatchError, HVPUnsupportedError, InvalidArgumentError, NoGradientError, NonFiniteError
from dyntune.objective.parameters import named_parameters
from dyntune.objective.saved import SavedBytes, bytes_made
from dyntune.objective.shards import Sharded
from dyntune.objective.state import BorrowedBuffers, parameter_slots, same_bits, swapped
from dyntune.objective.triage import reaches, suspects

if TYPE_CHECKING:
    from dyntune.objective.objective import Objective, Weighted

__all__ = ["Probed", "probe", "stand_ins"]


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What one forward pass per batch told.

    Args:
        forward_bytes: What the largest batch's graph saves for the backward pass, parameters apart.
        suspects: Operations whose second derivative has to be verified.
        first_loss: Loss of the first batch.
        weight: Sum of the weights of the batches that were checked.
    """

    forward_bytes: int
    suspects: tuple[str, ...]
    first_loss: float
    weight: float


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Copies in the place of all parameters, so that a forward pass that writes to them is found out without harm.

    Raises:
        InvalidArgumentError: A parameter was written to.
    """
    everything = named_parameters(model)
    copies = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in everything.items()}
    slots = parameter_slots(model, everything.values())
    pairs = [(slot, copy) for places, copy in zip(slots, copies.values(), strict=True) for slot in places]
    with swapped([slot for slot, _ in pairs], [copy for _, copy in pairs]):
        yield copies
    for name, p in everything.items():
        if not same_bits(p, copies[name]):
            raise InvalidArgumentError(
                f"the forward pass writes to parameter {name!r} (an embedding with max_norm, perhaps): measuring would "
                "change the model. Renormalise outside, or measure copy.deepcopy(model)."
            )


def probe(
    objective: Objective,
    buffers: BorrowedBuffers,
    parameters: Mapping[str, torch.Tensor],
    *,
    num_checked: int | None = None,
) -> Probed:
    """Evaluate every batch once, or the first `num_checked`, within ``objective.measuring()``.

    Args:
        objective: The loss.
        buffers: Of ``objective.measuring()``.
        parameters: What stands in the place of the parameters.
        num_checked: How many batches; None for all.

    Returns:
        What was found.

    Raises:
        EmptyBatchError, InvalidArgumentError, NonFiniteError: A batch's count or loss is zero, negative or not finite.
        NoGradientError: No batch's loss depends on the selected parameters.
        HVPUnsupportedError: Reentrant checkpointing; a parameter in low precision that is not taken from the model.
    """
    wanted = [*objective.tensors, *(parameters[name] for name in objective.parameters)]
    # FSDP's own passes lead to whole parameters that it makes and frees itself: the graph cannot be followed there.
    connected = isinstance(objective.layout, Sharded)
    largest, found, first, weight = 0, set[str](), math.nan, 0.0
    for index in range(len(objective.batches[:num_checked])):
        saved = SavedBytes(parameters.values())
        with saved.counting():
            term = objective.batch_loss(index, buffers)
        _check_term(objective, index, term)
        first = float(term.value.detach()) if index == 0 else first
        weight += float(term.weight)
        # Where a budget is promised no graph is kept either, so that its size need not be found out by another pass.
        largest = max(largest, saved.total)
        hidden = num_checked is None and not isinstance(objective.layout, Sharded) and saved.hidden(term.value)
        found.update(suspects(term.value))
        _refuse_reentrant(found)
        _refuse_past_copies(objective, term.value)
        connected = connected or reaches(term.value, wanted)
        del term  # its graph, before there is another one
        if hidden:
            largest = max(largest, bytes_made(functools.partial(objective.batch_loss, index, buffers)))
    if not connected:
        raise NoGradientError(
            "the loss does not depend on the selected parameters through autograd. Is it computed under "
            "torch.no_grad(), from detached or .item() values, or from other parameters than those selected?"
        )
    return Probed(forward_bytes=largest, suspects=tuple(sorted(found)), first_loss=first, weight=weight)


def _check_term(objective: Objective, index: int, term: Weighted) -> None:
    """A batch's loss is finite and its weight positive."""
    weight = float(term.weight)
    if not objective.adds_up and weight == 0:
        raise EmptyBatchError(
            f"batch {index} has no terms that count ({objective.rule.unit}): its mean loss is undefined. Leave it out."
        )
    if not 0 < weight < math.inf:
        raise InvalidArgumentError(
            f"batch {index} has count {weight}: a mean is over a positive number of terms. Check the count that "
            "loss_fn puts into dyntune.Loss, or the class weights."
        )
    if not bool(torch.isfinite(term.value)):
        raise NonFiniteError(
            f"the loss of batch {index} is {float(term.value.detach())}: its derivatives are undefined. Check the "
            "inputs, the targets, and whether the run has already diverged."
        )


def _refuse_past_copies(objective: Objective, loss: torch.Tensor) -> None:
    """The user's own tensor in the loss would be missed: its copy is what moves."""
    for name, p in objective.parameters.items():
        if p is not objective.precision.of(p) and reaches(loss, [p]):
            raise HVPUnsupportedError(
                f"the loss uses parameter {name!r} not through the model (a list made earlier, perhaps), and it is "
                f"stored in {p.dtype}, so that a float32 copy is measured in its place. Inside loss_fn, take "
                "parameters from the model: for p in model.parameters()."
            )


def _refuse_reentrant(functions: Iterable[str]) -> None:
    if "CheckpointFunction" in functions:
        raise HVPUnsupportedError(
            "the model uses torch.utils.checkpoint with use_reentrant=True, which hides its parameters from "
            "torch.autograd.grad. Pass use_reentrant=False (in transformers: "
            'gradient_checkpointing_kwargs={"use_reentrant": False}).'
        )
