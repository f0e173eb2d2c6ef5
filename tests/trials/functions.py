"""Trial functions that another process can import, and one that it cannot."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def train(point: float, seed: int) -> Mapping[str, Any]:
    """A few steps of momentum SGD on a least-squares problem that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(64, 32, generator=generator), torch.randn(64, generator=generator)
    w = torch.zeros(32, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=point, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = (a @ w - b).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"loss": losses[-1], "losses": losses, "dtype": str(torch.get_default_dtype())}


class Fragile:
    """Trains, but raises at one point and takes its whole process along at another.

    Args:
        raises: The first.
        dies: The second.
    """

    def __init__(self, *, raises: float | None = None, dies: float | None = None) -> None:
        self.raises, self.dies = raises, dies

    def __call__(self, point: float, seed: int) -> Mapping[str, Any]:
        if point == self.raises:
            raise ValueError(f"no {point}")
        if point == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(point, seed)


class Counted:
    """Leaves a line in a file for every trial that was run, and dies with the process at the given one.

    Args:
        path: Where.
        last: After how many trials the process is killed; None for never.
    """

    def __init__(self, path: Path, last: int | None = None) -> None:
        self.path, self.last = path, last

    def __call__(self, point: float, seed: int) -> Mapping[str, Any]:
        with self.path.open("a") as file:
            file.write(f"{point} {seed}\n")
        if self.last is not None and len(self.path.read_text().splitlines()) > self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(point, seed)


class Unimportable:
    """Pickles well, and cannot be read back."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (refuse, ())

    def __call__(self, point: float, seed: int) -> Mapping[str, Any]:
        return {}


def refuse() -> None:
    raise ModuleNotFoundError("No module named 'notebook_cell'")


class Endless:
    """Says which process runs it, and never ends.

    Args:
        folder: Where a file of the process's number appears.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, point: float, seed: int) -> Mapping[str, Any]:
        (self.folder / str(os.getpid())).touch()
        while True:
            time.sleep(60.0)
