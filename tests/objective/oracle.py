"""A Hessian that owes nothing to dyntune: ``torch.autograd.functional`` in float64 on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["dense_hessian", "relative_error"]


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _doubled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_doubled(item) for item in value)
    return value


def dense_hessian(
    model: nn.Module,
    data: Any,
    loss: Callable[[Callable[..., Any], Any], torch.Tensor],
    *,
    selected: Callable[[str], bool] = lambda name: True,
) -> torch.Tensor:
    """The matrix of second derivatives, float64, in the order of ``named_parameters()``.

    Args:
        model: Left alone.
        data: Handed to `loss`, floating point tensors in float64.
        loss: ``(call, data) -> scalar`` where `call` runs the model.
        selected: Which parameters.
    """
    twin = copy.deepcopy(model).double()
    chosen = {n: p.detach() for n, p in twin.named_parameters() if p.requires_grad and selected(n)}
    sizes = [p.numel() for p in chosen.values()]
    doubled = _doubled(data)

    def of_flat(flat: torch.Tensor) -> torch.Tensor:
        parts = {n: f.view_as(p) for (n, p), f in zip(chosen.items(), flat.split(sizes), strict=True)}
        return loss(lambda *a, **k: torch.func.functional_call(twin, parts, a, k), doubled)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(of_flat, torch.cat([p.reshape(-1) for p in chosen.values()]))


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference relative to that of the truth."""
    return float(torch.linalg.norm(found.double() - truth) / torch.linalg.norm(truth))
