"""Leaving no trace: what a measurement borrows from the user's program and how it is put back.

Nothing here copies parameters: they are never written to. Gradients are set aside by reference, buffers are replaced
by clones while a measurement runs, random states are saved and restored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["BorrowedBuffers", "preserved_rng", "preserved_state", "seed_all"]


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Save and restore the global random states of Python, NumPy and torch (all initialised CUDA devices)."""
    python_state, numpy_state, cpu_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if _cuda_ready() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def _cuda_ready() -> bool:
    """CUDA that is not initialised has no state, and asking for it would initialise it."""
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())


def seed_all(seed: int) -> None:
    """Seed every global generator; only inside :func:`preserved_rng`.

    The generators are seeded one by one because ``torch.manual_seed`` would also leave a pending seed on a CUDA that
    the user initialises later.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if _cuda_ready():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)


class BorrowedBuffers:
    """Clones that stand in for the model's buffers, renewed before every forward pass that follows a write.

    BatchNorm and spectral normalisation write to their buffers in the forward pass. With clones in their place the
    user's tensors keep even their version counters, so a graph that the user holds stays valid.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
        self._clones: dict[int, tuple[torch.Tensor, int]] = {}

    def renew(self) -> None:
        """Put clones with the original values in place; those that nothing wrote to are used again."""
        for module, name, original in self._slots:
            clone, version = self._clones.get(id(original), (None, -1))
            if clone is None or clone._version != version:
                clone = original.detach().clone()
                self._clones[id(original)] = (clone, clone._version)
            module._buffers[name] = clone


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[BorrowedBuffers]:
    """Set gradients aside, lend clones of the buffers, and put everything back afterwards, also after an exception.

    Gradients are replaced by None meanwhile, so that a loss function which calls ``backward()`` itself accumulates
    into tensors that are thrown away.
    """
    modules = list(model.modules())
    modes = [m.training for m in modules]
    slots = [dict(m._buffers) for m in modules]
    parameters = list(model.parameters())
    flags = [p.requires_grad for p in parameters]
    gradients = [p.grad for p in parameters]
    with preserved_rng():
        try:
            for p in parameters:
                p.grad = None
            buffers = BorrowedBuffers(model)
            buffers.renew()
            yield buffers
        finally:
            for p, flag, gradient in zip(parameters, flags, gradients, strict=True):
                if p.requires_grad != flag:
                    p.requires_grad_(flag)
                p.grad = gradient
            for module, mode, slot in zip(modules, modes, slots, strict=True):
                module.training = mode
                module._buffers.clear()
                module._buffers.update(slot)
