"""What a row of the obstacle matrix is: a problem, and what dyntune has to make of it.

Nothing here imports pytest: `benchmarks/obstacles.py` runs the same rows through other libraries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["EPS", "EXACT", "Problem", "Row"]

EPS = torch.finfo(torch.float32).eps
# Rounding in float32: a product of a few layers is a sum of some hundred terms, forward, back and back again; each of
# them is good to EPS relative to the largest.
EXACT = 200 * EPS


def _rows(batch: Any) -> float:
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return float(first.shape[0])


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model in a user's hands.

    Args:
        model: The model, in the mode and the wrappers it is trained in.
        batches: What the user passes to dyntune.
        data: The same as a list of batches; default: `batches` is one.
        term: ``(model, batch) -> loss of the batch``: how peers are told, and with `weight` and `summed` the oracle's
            definition, written without dyntune. It must run in float64.
        loss: The keywords that tell dyntune the loss.
        weight: How many terms a batch's mean is over.
        summed: Batches are added up.
        criterion: For tools that take ``criterion(model(inputs), targets)``; None if the loss is of another form.
        held: What else must not move: optimizers, scalers, generators.
        caller: The context in which the user calls.
        exact: The oracle's stand-in for the model, where a float64 copy of it would not do.
    """

    model: nn.Module
    batches: Any
    term: Callable[[nn.Module, Any], torch.Tensor]
    data: list[Any] | None = None
    loss: dict[str, Any] = field(default_factory=dict)
    weight: Callable[[Any], float] = _rows
    summed: bool = False
    criterion: Callable[[Any, Any], torch.Tensor] | None = None
    held: tuple[Any, ...] = ()
    caller: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    exact: Callable[[nn.Module], nn.Module] = lambda model: model

    @property
    def parts(self) -> list[Any]:
        """Every batch."""
        return [self.batches] if self.data is None else self.data


@dataclass(frozen=True, kw_only=True)
class Row:
    """One obstacle.

    Args:
        name: As the table shows it.
        group: The part of the table.
        build: Makes the problem anew.
        engine: The engine that dyntune has to end with.
        because: A pattern that ``operator.reason`` has to match.
        error: Instead: the exception that dyntune has to raise.
        fix: A pattern of the fix that its message has to name.
        tolerance: Permitted relative error of a product, Frobenius norm, against the float64 oracle.
        reason: Why that much.
        note: What the table says about how it is handled.
        answer: Whether there is a right number; if not, only a refusal is right.
        random: The forward pass draws random numbers: which, is the tool's affair.
    """

    name: str
    group: str
    build: Callable[[], Problem]
    engine: str = "retained-graph"
    because: str = ""
    error: type[BaseException] | None = None
    fix: str = ""
    tolerance: float = EXACT
    reason: str = "rounding in float32"
    note: str = ""
    answer: bool = True
    random: bool = False
