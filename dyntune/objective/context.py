"""Execution context of every forward pass of ours: differentiable twice, deterministic, in full precision."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dyntune.numerics.arithmetic import plain_arithmetic

__all__ = ["differentiable_forward", "differentiable_twice", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside ``torch.compile``, DataParallel and DistributedDataParallel wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def _is_recurrent(model: nn.Module) -> bool:
    return any(isinstance(m, nn.RNNBase) for m in model.modules())


@contextmanager
def differentiable_forward(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Kernels with a forward-mode derivative: oneDNN's recurrent layer on the CPU has none."""
    with ExitStack() as stack:
        if device.type == "cpu" and _is_recurrent(model):
            # None: leave as it is. Setting TF32, even to its default, warns where there is no Intel GPU.
            flags = torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None)
            stack.enter_context(flags)
        yield


@contextmanager
def differentiable_twice(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Gradients on, autocast off, attention by the math kernel, cuDNN off for recurrent layers, compiled code eager.

    The fused attention kernels have no second derivative (on the CPU neither). Backward passes run in here, too:
    autocast would round them, and a checkpointed block runs its forward pass in them.
    """
    with ExitStack() as stack:
        stack.enter_context(plain_arithmetic(device))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device.type == "cuda" and _is_recurrent(model):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled: not the model, nor a function in its loss
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
