"""Everything of a user's program that a measurement could disturb, as plain values to compare."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["changes", "snapshot"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def _tensor(tensor: torch.Tensor | None) -> Any:
    """Identity, place in memory, version and bits."""
    if tensor is None:
        return None
    if tensor.layout != torch.strided:  # gradients of sparse embeddings
        return id(tensor), tensor._version, tensor.detach().to_dense().numpy().tobytes()
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)  # NumPy has no bfloat16
    return id(tensor), tensor.data_ptr(), tensor._version, bits.numpy().tobytes()


def _module(module: nn.Module) -> dict[str, Any]:
    attributes = {name: id(item) for name, item in vars(module).items()}
    return {
        "attributes": attributes,
        "training": module.training,
        "parameters": {
            n: (_tensor(p), p.requires_grad, _tensor(p.grad)) for n, p in module._parameters.items() if p is not None
        },
        "buffers": {n: _tensor(b) for n, b in module._buffers.items()},
        "flat weights": [id(w) for w in getattr(module, "_flat_weights", [])],
        "hooks": {name: list(getattr(module, name)) for name in HOOKS},
    }


def snapshot(model: nn.Module) -> dict[str, Any]:
    """The state of a model and of torch's, NumPy's and Python's global settings."""
    state: dict[str, Any] = {f"module {name!r}": _module(m) for name, m in model.named_modules()}
    keys, position, *rest = np.random.get_state(legacy=True)[1:]
    return state | {
        "python rng": random.getstate(),
        "numpy rng": (keys.tobytes(), position, rest),
        "torch rng": torch.get_rng_state().numpy().tobytes(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "attention kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "kernels": (torch._C._get_mkldnn_enabled(), torch.backends.cudnn.enabled),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is no longer the same."""
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
