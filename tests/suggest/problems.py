"""Small models on made data, and what of a user's state must not move."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn


def classification(num_batches: int = 24, rows: int = 32, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a noisy linear classification problem with 4 classes in 8 dimensions."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(8, 4, generator=g)
    batches = []
    for _ in range(num_batches):
        x = torch.randn(rows, 8, generator=g)
        batches.append((x, (x @ weights + torch.randn(rows, 4, generator=g)).argmax(1)))
    return batches


def mlp(seed: int = 0, *, extras: bool = False) -> nn.Sequential:
    """8-16-4 tanh; with `extras` BatchNorm and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(16), nn.Dropout(0.2)] if extras else []
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), *middle, nn.Linear(16, 4))


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Everything that a measurement must leave bit-identical, with identities and version counters."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    return {
        "parameters": [(id(p), p._version, p.detach().clone()) for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "buffers": [(id(b), b._version, b.clone()) for b in model.buffers()],
        "modes": [m.training for m in model.modules()],
        "python": python_state,
        "numpy": (numpy_state[1].tolist(), numpy_state[2]),  # type: ignore[index]
        "torch": torch.get_rng_state(),
        "optimizer": None
        if optimizer is None
        else [
            [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
            [
                {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
                for s in optimizer.state.values()
            ],
        ],
    }


def same(a: Any, b: Any) -> bool:
    """Bit-identity of two snapshots."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
