"""Curvature of one loss along its own (preconditioned) gradient: one graph and one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dyntune.numerics.vectors import dot
from dyntune.objective.hvp import second_derivative, twice_differentiable
from dyntune.objective.objective import Objective

__all__ = ["along_gradient"]


def along_gradient(
    objective: Objective, loss: torch.Tensor, scale: Sequence[torch.Tensor] | None
) -> tuple[float, float]:
    """``(d.Hd, d.g)`` with ``d = P^-1 g``: their ratio times the learning rate is what stochastic thresholds speak of.

    Args:
        objective: Whose parameters are meant.
        loss: A scalar with its graph, made in a context that can be differentiated twice.
        scale: Diagonal P, shaped like the parameters; None for the identity.

    Raises:
        HVPUnsupportedError: The graph holds a ``once_differentiable`` backward: the product would lack terms.
    """
    gradient = twice_differentiable(objective, loss)
    flat = [g.detach() for g in gradient]
    direction = flat if scale is None else [g / s for g, s in zip(flat, scale, strict=True)]
    product = second_derivative(gradient, objective.tensors, direction, keep=False)
    return dot(direction, product), dot(direction, flat)
