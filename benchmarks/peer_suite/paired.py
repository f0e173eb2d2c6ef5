"""Trainings that take turns, one of them watched, and what watching costs by their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

SEED = 0
Batch = tuple[torch.Tensor, torch.Tensor]
Steps = Callable[[int], float]


class Transformer(nn.Module):
    """Ten million parameters: 12 layers of width 256 and a vocabulary of 2048."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2048, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(256, 2048)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(tokens))).transpose(1, 2)


def mlp() -> tuple[nn.Module, Batch]:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return model, (torch.randn(128, 64), torch.randint(10, (128,)))


def cnn() -> tuple[nn.Module, Batch]:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]

    model = nn.Sequential(*block(3, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Linear(2048, 10))
    return model, (torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))


def transformer() -> tuple[nn.Module, Batch]:
    return Transformer(), (torch.randint(2048, (2, 32)), torch.randint(2048, (2, 32)))


Make = Callable[[], tuple[nn.Module, Batch]]
# Steps of a block and pairs of blocks; a block takes 0.1 to 1 s.
MODELS: dict[str, tuple[Make, int, int]] = {
    "MLP": (mlp, 200, 100),
    "CNN": (cnn, 40, 300),
    "transformer": (transformer, 5, 200),
}


class Training:
    """One copy: model, batch, AdamW, and a step as everybody writes it."""

    def __init__(self, make: Make) -> None:
        torch.manual_seed(SEED)
        self.model, self.batch = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.criterion: nn.Module = nn.CrossEntropyLoss()

    def step(self) -> Any:
        """One step; its loss."""
        x, y = self.batch
        loss = self.criterion(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def steps(self, count: int) -> float:
        """CPU seconds that the calling thread spends on `count` steps."""
        began = time.thread_time()
        for _ in range(count):
            self.step()
        return time.thread_time() - began


@dataclass(frozen=True)
class Pairs:
    """CPU seconds of pairs of blocks.

    Args:
        bare: Of as many bare steps as a watched block has. Shape (pairs,).
        watched: Of the watched block, and of everything else in the same time. Shape (pairs,).
        block: Steps of a watched block.
    """

    bare: np.ndarray
    watched: np.ndarray
    block: int

    @property
    def step_seconds(self) -> float:
        """Of a bare step."""
        return float(self.bare.mean() / self.block)

    @property
    def extra(self) -> np.ndarray:
        """Seconds per step that watching adds. Shape (pairs,)."""
        return (self.watched - self.bare) / self.block


def no_children() -> float:
    """CPU seconds of other processes: there are none."""
    return 0.0


def paired(
    bare: Steps,
    watched: Steps,
    *,
    block: int,
    pairs: int,
    bare_block: int | None = None,
    children: Callable[[], float] = no_children,
    seconds: float = np.inf,
    least: int = 4,
) -> Pairs:
    """Blocks in turn; first comes the bare one in two pairs, the watched one in the next two, and so on.

    A bare block is charged with its own thread. The watched one is charged with all else that this process and its
    children spend during the pair: a thread or a service that works on during the bare block is the watcher's.

    Args:
        bare: Takes a number of steps; the CPU seconds of this thread.
        watched: Likewise.
        block: Steps of a watched block.
        pairs: At most so many.
        bare_block: Steps of a bare block, if others: where watching takes many times as long, few of them say little.
        children: CPU seconds so far of other processes that the watcher started.
        seconds: No pair is begun after so many seconds on the clock,
        least: unless fewer than this many are done. Even numbers are kept, so that events in every second pair balance.
    """
    times: list[tuple[float, float]] = []
    bare_block = block if bare_block is None else bare_block
    began = time.perf_counter()
    before = children()
    while len(times) < pairs and (len(times) < least or len(times) % 2 or time.perf_counter() - began < seconds):
        whole = time.process_time()
        if len(times) // 2 % 2:  # not every second one: that is how events come
            watched(block)
            alone = bare(bare_block)
        else:
            alone = bare(bare_block)
            watched(block)
        whole = time.process_time() - whole
        after = children()
        times.append((alone * block / bare_block, whole - alone + after - before))
        before = after
    found = np.array(times)
    return Pairs(found[:, 0], found[:, 1], block)


def interval(bare: np.ndarray, watched: np.ndarray, draws: int = 10_000) -> list[float]:
    """95% bootstrap over pairs of blocks, of the ratio of sums less 1."""
    chosen = np.random.default_rng(SEED).integers(len(bare), size=(draws, len(bare)))
    ratios = watched[chosen].sum(1) / bare[chosen].sum(1) - 1
    return np.quantile(ratios, [0.025, 0.975]).tolist()


def summary(found: Pairs) -> dict[str, Any]:
    """What watching costs where every block holds the same."""
    return {
        "overhead": float(found.watched.sum() / found.bare.sum() - 1),
        "interval": interval(found.bare, found.watched),
        "seconds_per_step": float(found.extra.mean()),
    }


def periodic(found: Pairs, periods: Sequence[int], *, draws: int = 10_000) -> dict[str, Any]:
    """What watching costs where every second block holds one event: quiet steps and the event apart.

    At one event in `period` steps a step costs `quiet + event / period` more. Both are measured; the ratio for periods
    far longer than the run follows from them. Intervals are 95%, of a bootstrap over neighbouring pairs.

    Args:
        found: An even number of pairs; the first, the third, ... hold an event.
        periods: Steps from one event to the next.
        draws: Of the bootstrap.
    """
    if len(found.bare) % 2:
        raise ValueError(f"{len(found.bare)} pairs: one with and one without an event belong together; give 2n.")
    with_event, without = found.extra[::2], found.extra[1::2]
    bare = (found.bare[::2] + found.bare[1::2]) / (2 * found.block)

    def estimate(chosen: Any) -> tuple[Any, Any, Any]:
        quiet = without[chosen].mean(-1)
        return quiet, (with_event[chosen].mean(-1) - quiet) * found.block, bare[chosen].mean(-1)

    quiet, event, step = estimate(np.arange(len(bare)))
    drawn = estimate(np.random.default_rng(SEED).integers(len(bare), size=(draws, len(bare))))

    def ends(values: np.ndarray) -> list[float]:
        return np.quantile(values, [0.025, 0.975]).tolist()

    return {
        "quiet_seconds": float(quiet),
        "event_seconds": float(event),
        "event_interval": ends(drawn[1]),
        "at": {
            str(period): {
                "overhead": float((quiet + event / period) / step),
                "interval": ends((drawn[0] + drawn[1] / period) / drawn[2]),
            }
            for period in periods
        },
    }
