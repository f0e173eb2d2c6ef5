"""Random states as they were before a forward pass: what dropout's masks of a replay are drawn from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dyntune.objective.state import Generator, cuda_ready, generator_state, set_generator_state

__all__ = ["HostState", "RandomState", "host_state", "random_state", "set_host_state", "set_random_state"]


@dataclass(frozen=True)
class RandomState:
    """Of torch's global generators and of those that the model holds: what a forward pass draws from.

    Args:
        cpu: Of torch's default generator.
        cuda: One per device; empty where CUDA is not in use.
        own: Of the model's generators, in order.
    """

    cpu: torch.Tensor
    cuda: tuple[torch.Tensor, ...]
    own: tuple[Any, ...]


@dataclass(frozen=True)
class HostState:
    """Of Python's and NumPy's global generators, which take longer to read: once per snapshot."""

    python: Any
    numpy: Any


def random_state(own: Sequence[Generator] = ()) -> RandomState:
    """The present state; nothing is drawn.

    Cost: some 2 microseconds without CUDA (one thread of a two-core CPU, warm).
    """
    cuda = tuple(torch.cuda.get_rng_state_all()) if cuda_ready() else ()
    return RandomState(torch.get_rng_state(), cuda, tuple(map(generator_state, own)))


def set_random_state(state: RandomState, own: Sequence[Generator] = ()) -> None:
    """Put a state back; only where the present one is preserved."""
    torch.set_rng_state(state.cpu)
    if state.cuda:
        torch.cuda.set_rng_state_all(state.cuda)
    for generator, item in zip(own, state.own, strict=True):
        set_generator_state(generator, item)


def host_state() -> HostState:
    """The present state of Python's and NumPy's global generators."""
    return HostState(random.getstate(), np.random.get_state())


def set_host_state(state: HostState) -> None:
    """Put a state back; only where the present one is preserved."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
