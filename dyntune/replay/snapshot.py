"""One copy of everything that a training goes on from: :class:`Snapshot`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dyntune.replay.randomness import HostState, host_state

__all__ = ["Snapshot", "num_bytes", "stepped_parameters"]


def stepped_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The model's parameters that the optimizer holds, by name, tied ones once; frozen ones may thaw."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in model.named_parameters() if id(p) in held}


def num_bytes(tensors: Any) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Snapshot:
    """Parameters, buffers and optimizer state as they are between two steps; taken again into the same memory.

    Args:
        in_memory: Keep the copies in CPU memory, whatever device the parameters are on.

    Attributes:
        step: Number of the step that comes next; None before the first copy.
        state: Of the optimizer: parameter's name -> key -> copy.
        host: Random states of Python and NumPy.

    Cost:
        One pass over parameters, buffers and state; memory is allocated the first time, and where shapes change.
    """

    def __init__(self, *, in_memory: bool = False) -> None:
        self._in_memory = in_memory
        self.step: int | None = None
        self.parameters: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self.state: dict[str, dict[str, Any]] = {}
        self.host: HostState | None = None
        self._copies: list[torch.Tensor] = []
        self._layout: list[Any] = []

    @torch.no_grad()
    def take(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy what is there now; the originals are read only."""
        self.step = None  # until the copy is whole
        parameters = stepped_parameters(model, optimizer)
        buffers = dict(model.named_buffers())
        states = {name: optimizer.state[p] for name, p in parameters.items() if p in optimizer.state}
        tensors = [p.detach() for p in parameters.values()] + [b.detach() for b in buffers.values()]
        moments = [(n, k, v.detach()) for n, s in states.items() for k, v in s.items() if isinstance(v, torch.Tensor)]
        tensors += [tensor for _, _, tensor in moments]
        self._copy(tensors)
        copies = iter(self._copies)
        self.parameters = {name: next(copies) for name in parameters}
        self.buffers = {name: next(copies) for name in buffers}
        self.state = {
            name: {k: None if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in state.items()}
            for name, state in states.items()
        }
        for name, key, _ in moments:
            self.state[name][key] = next(copies)
        self.host = host_state()
        self.step = step

    def _copy(self, tensors: list[torch.Tensor]) -> None:
        layout = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
        if layout != self._layout:
            self._copies = [self._empty(t) for t in tensors]
            self._layout = layout
        if tensors:
            torch._foreach_copy_(self._copies, tensors)

    def _empty(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu" if self._in_memory else tensor.device)

    @property
    def num_bytes(self) -> int:
        """Of the copies."""
        return num_bytes(self._copies)

    def parameter(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A fresh copy of a parameter on the original's device."""
        return self.parameters[name].to(like.device, copy=True)

    def moments(self, name: str, like: torch.Tensor, original: Mapping[str, Any]) -> dict[str, Any]:
        """A fresh copy of the optimizer's state of a parameter.

        Args:
            name: Of the parameter.
            like: The parameter, for the device.
            original: The user's present state, for where each tensor lies: Adam's step count may be on the CPU.
        """
        fresh: dict[str, Any] = {}
        for key, value in self.state.get(name, {}).items():
            if isinstance(value, torch.Tensor):
                there = original.get(key)
                device = there.device if isinstance(there, torch.Tensor) else like.device
                fresh[key] = value.to(device, copy=True)
            else:
                fresh[key] = copy.deepcopy(value)
        return fresh
