"""One forward pass per batch before anything is measured: what users should hear of at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from dyntune.errors import EmptyBatchError, HVPUnsupportedError, InvalidArgumentError, NoGradientError, NonFiniteError
from dyntune.objective.parameters import named_parameters
from dyntune.objective.state import BorrowedBuffers, parameter_slots, same_bits, swapped
from dyntune.objective.triage import reaches, suspects

if TYPE_CHECKING:
    from dyntune.objective.objective import Objective, Weighted

__all__ = ["probe", "stand_ins"]


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
    parameters: dict[str, torch.Tensor],
    *,
    num_checked: int | None = None,
) -> tuple[int, tuple[str, ...]]:
    """Evaluate every batch once, or the first `num_checked`, within ``objective.measuring()``.

    Args:
        objective: The loss.
        buffers: Of ``objective.measuring()``.
        parameters: What stands in the place of the parameters.
        num_checked: How many batches; None for all.

    Returns:
        The bytes that the largest batch's graph saves for the backward pass, parameters apart, and the names of the
        operations whose second derivative has to be verified.

    Raises:
        EmptyBatchError, InvalidArgumentError, NonFiniteError: A batch's count or loss is zero, negative or not finite.
        NoGradientError: No batch's loss depends on the selected parameters.
        HVPUnsupportedError: Reentrant checkpointing.
    """
    wanted = [*objective.tensors, *(parameters[name] for name in objective.parameters)]
    largest, connected, found = 0, False, set[str]()
    for index in range(len(objective.batches[:num_checked])):
        term, size = _measured_term(objective, index, buffers, parameters.values())
        _check_term(objective, index, term)
        largest = max(largest, size)
        found.update(suspects(term.value))
        _refuse_reentrant(found)
        connected = connected or reaches(term.value, wanted)
    if not connected:
        raise NoGradientError(
            "the loss does not depend on the selected parameters through autograd. Is it computed under "
            "torch.no_grad(), from detached or .item() values, or from other parameters than those selected?"
        )
    return largest, tuple(sorted(found))


def _measured_term(
    objective: Objective, index: int, buffers: BorrowedBuffers, parameters: Iterable[torch.Tensor]
) -> tuple[Weighted, int]:
    """A batch's loss, and the bytes that its graph saved for the backward pass apart from parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it, for ever

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        term = objective.batch_loss(index, buffers)
    return term, sum(size for pointer, size in seen.items() if pointer not in own)


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


def _refuse_reentrant(functions: Iterable[str]) -> None:
    if "CheckpointFunction" in functions:
        raise HVPUnsupportedError(
            "the model uses torch.utils.checkpoint with use_reentrant=True, which hides its parameters from "
            "torch.autograd.grad. Pass use_reentrant=False (in transformers: "
            'gradient_checkpointing_kwargs={"use_reentrant": False}).'
        )
