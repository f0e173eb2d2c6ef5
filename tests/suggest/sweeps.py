"""Models and losses that another process can import, for sweeps over processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.suggest.problems import classification, mlp

CE = nn.CrossEntropyLoss()


class Bowl(nn.Module):
    """0.5 sum(lambda_i w_i^2), times the mean of the batch.

    Args:
        curvatures: The lambda_i.
        first: w_0 at the start; the others are 1.
    """

    def __init__(self, curvatures: tuple[float, ...], *, first: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("curvatures", torch.tensor(curvatures, dtype=torch.float64))
        self.weights = nn.Parameter(torch.tensor([first, *[1.0] * (len(curvatures) - 1)], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x.mean() * (self.curvatures * self.weights.square()).sum()


def own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch[0])


ONES = [(torch.ones(2, 1, dtype=torch.float64),)] * 4


class Deadly(nn.Sequential):
    """An MLP whose process is killed after some forward passes with gradients, counted in a file.

    Args:
        path: Where a byte is left for each.
        last: How many; None for no end.
    """

    def __init__(self, path: Path, last: int | None) -> None:
        super().__init__(*mlp(extras=True))
        self.path, self.last = path, last

    def extra_repr(self) -> str:
        return ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            with self.path.open("ab") as file:
                file.write(b".")
            if self.last is not None and self.path.stat().st_size > self.last:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def sweep_until_killed(path: Path, journal: Path, last: int) -> None:
    from dyntune.suggest.lr_sweep import sweep_lr

    torch.set_num_threads(1)
    sweep_lr(Deadly(path, last), classification(8), storage=journal, **SMALL)


SMALL: dict[str, Any] = {"criterion": CE, "optimizer": "sgd", "num_steps": 30, "start": 0.3, "seeds": 2}
