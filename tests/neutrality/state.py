"""All that training depends on: as places in memory and versions (``everything``), and as mere values (``values``)."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special  # noqa: F401 - at its first import it adds a filter for its own warnings, and so does dynamo
import torch
import torch._dynamo
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tests.objective.snapshot import snapshot

__all__ = ["everything", "values"]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _held(item: Any) -> Any:
    """An optimizer's settings and state: identity, version and bits of its tensors."""
    if isinstance(item, torch.Tensor):
        return id(item), item._version, item.stride(), _bits(item)
    if isinstance(item, Mapping):
        return {key if isinstance(key, (str, int)) else id(key): _held(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_held(value) for value in item]
    return repr(item) if isinstance(item, (int, float, str, bool, type(None))) else id(item)


def settings() -> dict[str, Any]:
    """torch's and Python's process-wide switches."""
    return {
        "threads": torch.get_num_threads(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "precision": torch.get_float32_matmul_precision(),
        "attention priority": torch.backends.cuda.cudnn_sdp_enabled(),
        "autograd": (
            torch.is_anomaly_enabled(),
            torch.is_anomaly_check_nan_enabled(),
            torch.autograd.is_multithreading_enabled(),
            forward_ad._current_level,
            torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        ),
        "modes of torch": (torch._C._len_torch_function_stack(), len(_get_current_dispatch_mode_stack())),
        "global hooks": [
            len(getattr(global_hooks, n))
            for n in vars(global_hooks)
            if n.startswith("_global_") and n.endswith("hooks")
        ],
        "warnings": (len(warnings.filters), [repr(f) for f in warnings.filters]),
    }


def everything(model: nn.Module, *others: Any) -> dict[str, Any]:
    """What no measurement may change, to the version counters.

    Args:
        model: The model.
        others: Optimizer, scheduler, batches: whatever else training holds.
    """
    state = snapshot(model) | settings()
    for place, other in enumerate(others):
        held = vars(other) if hasattr(other, "__dict__") and not isinstance(other, torch.Tensor) else other
        state[f"{place}: {type(other).__name__}"] = _held(held)
    state["hooks of tensors"] = [
        (p._backward_hooks and len(p._backward_hooks), len(getattr(p, "_post_accumulate_grad_hooks", None) or ()))
        for p in model.parameters()
    ]
    state["strides"] = [t.stride() for t in (*model.parameters(), *model.buffers())]
    return state


def values(model: nn.Module, *others: Any) -> dict[str, Any]:
    """What two runs from the same start have in common: bits, without places in memory."""

    def plain(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item.stride(), _bits(item)
        if isinstance(item, Mapping):
            return {key: plain(value) for key, value in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(value) for value in item]
        return repr(item)

    keys, position, *rest = np.random.get_state(legacy=True)[1:]
    return {
        "parameters": {n: (plain(p), plain(p.grad), p.requires_grad) for n, p in model.named_parameters()},
        "buffers": {n: plain(b) for n, b in model.named_buffers()},
        "modes": [m.training for m in model.modules()],
        "others": [plain(other.state_dict()) if hasattr(other, "state_dict") else plain(other) for other in others],
        "python": random.getstate(),
        "numpy": (keys.tobytes(), position, rest),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "settings": settings(),
    }
