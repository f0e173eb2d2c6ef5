"""The one network and data set of these experiments, and a training loop that stops to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import dyntune
from dyntune.curvature.eigenvalues import Eigenvalues

ROWS = 1024
CLASSES = 10
WIDTH = 64
DIVERGED = 100.0  # times the first loss

Batch = tuple[torch.Tensor, torch.Tensor]
Point = dict[str, float]
CRITERION = nn.MSELoss()


def digits(inputs: str) -> Batch:
    """The first 1,024 of scikit-learn's 8x8 digits, and their classes as one-hot rows.

    Args:
        inputs: ``"signed"``, pixels in [-1, 1]; ``"standardised"``, each pixel with mean 0 and deviation 1 (pixels that
            hardly vary stay small).
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    pixels = torch.tensor(x[:ROWS] / 16, dtype=torch.float32)
    pixels = 2 * pixels - 1 if inputs == "signed" else (pixels - pixels.mean(0)) / (pixels.std(0) + 1e-2)
    return pixels, nn.functional.one_hot(torch.tensor(y[:ROWS]), CLASSES).float()


def network(seed: int, gain: float = 1.0) -> nn.Module:
    """64-64-64-10 with tanh; torch's initial weights times `gain`."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model


def loss_on(model: nn.Module, data: Batch) -> torch.Tensor:
    return CRITERION(model(data[0]), data[1])


class LargestEigenvalue:
    """lambda_max on all data, or lambda_P with an optimizer; each solve begins with the last one's vector."""

    def __init__(self, model: nn.Module, data: Batch, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.data, self.optimizer = model, data, optimizer
        self.last: Eigenvalues | None = None

    def __call__(self) -> float:
        operator: Any = dyntune.hessian(self.model, self.data, criterion=CRITERION)
        if self.optimizer is not None:
            operator = dyntune.preconditioned(operator, self.optimizer)
        self.last = dyntune.eigenvalues(operator, start=self.last, rtol=1e-2)
        return float(self.last)


def batch_sharpness(model: nn.Module, data: Batch, size: int, *, seed: int, count: int = 64) -> dict[str, float]:
    """Batch sharpness over fresh batches of the training size, with its 95% interval over batches."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = [data]
    if size < ROWS:
        rows = [torch.randperm(ROWS, generator=generator)[:size] for _ in range(count)]
        batches = [(data[0][r], data[1][r]) for r in rows]
    found = dyntune.sharpness(model, batches, criterion=CRITERION, quantities=("batch",), num_batches="all").batch
    assert found is not None
    assert found.value is not None
    interval = {"low": found.low, "high": found.high} if len(batches) > 1 else {}
    return {"value": found.value} | interval


def minibatches(size: int, seed: int) -> Iterator[torch.Tensor | None]:
    """Epochs without replacement, for ever; None for all rows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if size >= ROWS:
            yield None
            continue
        order = torch.randperm(ROWS, generator=generator)
        yield from order[: ROWS // size * size].split(size)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Batch,
    measure: Callable[[int], Point],
    *,
    steps: int,
    every: int,
    size: int = ROWS,
    seed: int = 0,
    at: tuple[int, ...] = (),
) -> list[Point]:
    """Train; `measure` every `every` steps and after those of `at`, with the loss on all data beside it.

    Ends early, without a last measurement, where the loss exceeds a hundred times its first value.
    """
    series: list[Point] = []
    source = minibatches(size, seed)
    for step in range(steps + 1):
        if step % every == 0 or step in at:
            with torch.no_grad():
                loss = float(loss_on(model, data))
            series.append({"step": step, "loss": loss})
            if not loss <= DIVERGED * series[0]["loss"]:
                break
            series[-1] |= measure(step)
        rows = next(source)
        batch = data if rows is None else (data[0][rows], data[1][rows])
        optimizer.zero_grad()
        loss_on(model, batch).backward()
        optimizer.step()
    return series


def plateau(series: list[Point], key: str, since: int) -> dict[str, float] | None:
    """Mean, median and 10-90% range over time from step `since` on; None for a run that diverged."""
    values = np.array([point[key] for point in series if point["step"] >= since and key in point])
    if not len(values) or key not in series[-1]:
        return None
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
    return {"mean": float(values.mean()), "median": float(median), "q10": float(low), "q90": float(high)}
