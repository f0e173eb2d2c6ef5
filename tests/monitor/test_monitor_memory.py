"""What a monitor keeps over a long training: the run's numbers, and nothing else that grows with the steps."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dyntune
from dyntune.monitor.budget import Budget
from tests.neutrality.test_leaks import needs_proc, resident

pytestmark = pytest.mark.slow
CE = nn.CrossEntropyLoss()
# Windows hold 16 bursts of nine steps each, and a record of their older half.
WARM, STEPS, PARTS = 600, 20_000, 10


@contextmanager
def everything_measured() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "affords", lambda self, kind, *, share: True)
        patch.setattr(Budget, "interval", 1, raising=False)
        patch.setattr(Budget, "stride", 1, raising=False)
        yield


class Long:
    """A training of short steps with a monitor that logs to a file."""

    def __init__(self, log: Path) -> None:
        self.model = nn.Linear(6, 3)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(0)
        self.batches = [(x, x[:, :3].argmax(1)) for x in torch.randn(50, 8, 6, generator=generator)]
        self.monitor = dyntune.Monitor(self.model, self.opt, criterion=CE, log=log, on_error="raise")

    def train(self, steps: int) -> None:
        done = 0
        while done < steps:
            for x, y in self.monitor.watch(self.batches):
                loss = CE(self.model(x), y)
                loss.backward()
                self.opt.step()
                self.opt.zero_grad()
                self.monitor.observe(loss)
            done += len(self.batches)

    def own(self) -> int:
        """Bytes of what was recorded: 12 for each number, 16 for each row."""
        run = self.monitor.run
        return 12 * sum(run.series(name)[0].size for name in run.names) + 16 * len(run)


def counted() -> tuple[int, int]:
    """Tensors, and all objects that Python's collector knows of."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(o), torch.Tensor) for o in objects), len(objects)


def levels(training: Long, memory: Any) -> list[tuple[int, int, int, int]]:
    """Tensors, objects, memory and the run's own part of it: with every window full, and after each part."""
    with everything_measured():
        training.train(WARM)
    found = [(*counted(), memory(), training.own())]
    for _ in range(PARTS):
        training.train(STEPS // PARTS)
        found.append((*counted(), memory(), training.own()))
    return found


def grown(found: list[tuple[int, int, int, int]]) -> list[int]:
    """From the first half of the parts to the second: windows fill and are halved, so the largest of each counts."""
    middle = len(found) // 2
    return [
        max(late) - max(early)
        for early, late in zip(zip(*found[:middle], strict=True), zip(*found[middle:], strict=True), strict=True)
    ]


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Long]:
    found = Long(tmp_path / "run.jsonl")
    with found.monitor:
        yield found


def test_nothing_but_the_numbers_grows(training: Long) -> None:
    tracemalloc.start()
    try:
        found = levels(training, lambda: tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    tensors, objects, memory, own = grown(found)
    assert tensors <= 0.01 * STEPS / 2
    assert objects <= 0.1 * STEPS / 2
    # Arrays grow by a sixteenth at a time. A reference in a list takes 8 bytes.
    assert memory - own * (1 + 1 / 16) <= 4 * STEPS / 2


@needs_proc
def test_resident_memory_is_flat(training: Long) -> None:
    found = levels(training, resident)
    _, _, memory, own = grown(found)
    assert memory - own * (1 + 1 / 16) <= 64 * STEPS / 2  # a tensor of one number takes over 500 bytes
