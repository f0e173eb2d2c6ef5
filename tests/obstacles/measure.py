"""A row through dyntune, and whether anything of the user's moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import dyntune
from tests.objective.snapshot import snapshot
from tests.obstacles.problem import Problem
from tests.obstacles.truth import Named, probe_vector

__all__ = ["Measured", "measure", "moved", "state"]


@dataclass(frozen=True)
class Measured:
    """What dyntune answered."""

    product: Named
    lambda_max: float
    converged: bool
    engine: str
    method: str
    reason: str


def measure(problem: Problem) -> Measured:
    """One product and the largest eigenvalue, defaults apart from the loss."""
    vector = probe_vector(problem.model)
    with problem.caller():
        operator = dyntune.hessian(problem.model, problem.batches, **problem.loss)
        product = operator @ [vector[name].to(operator.dtype) for name in operator.names]
        found = dyntune.eigenvalues(operator)
    return Measured(
        product=dict(zip(operator.names, product, strict=True)),
        lambda_max=float(found.values[0]),
        converged=bool(found.converged),
        engine=operator.engine,
        method=operator.method,
        reason=operator.reason,
    )


def _plain(value: Any) -> Any:
    """Tensors as bits, so that two states can be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Generator):
        return _plain(value.get_state())
    if hasattr(value, "state_dict"):
        return _plain(value.state_dict())
    return value


def state(problem: Problem) -> dict[str, Any]:
    """Everything that a measurement could disturb."""
    return snapshot(problem.model) | {f"held {i}": _plain(item) for i, item in enumerate(problem.held)}


def moved(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is no longer the same."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
