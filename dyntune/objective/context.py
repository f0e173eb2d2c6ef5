"""Execution context of every forward pass of ours: differentiable twice, deterministic, in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["differentiable_twice", "is_compiled", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside ``torch.compile``, DataParallel and DistributedDataParallel wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model was compiled: compiled code cannot be differentiated twice."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


@contextmanager
def differentiable_twice(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Gradients on, autocast off, attention by the math kernel, cuDNN off for recurrent layers, compiled code eager.

    The fused attention kernels have no second derivative (on the CPU neither); only the forward pass must run in here.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
