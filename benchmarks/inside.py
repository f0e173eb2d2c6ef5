"""What a monitor's look inside the network costs, relative to a forward pass and a training step of the same model.

    python benchmarks/inside.py

An MLP (64-256-256-10, batches of 128) and a transformer encoder (two layers of width 64, four heads, 64 positions,
batches of 32): small on purpose, since what does not grow with the model weighs most there. Each measurement is timed
on one batch, interleaved with forward passes without gradients and with training steps (forward, backward, Adam);
figures are medians of CPU time on one thread, with the quartiles of the ratio within repetitions beside them.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dyntune.monitor.inside import EVERY_PASS, InsideProbe

WIDTH, HEADS, LAYERS, LENGTH, ROWS, VOCABULARY = 64, 4, 2, 64, 32, 100


class Encoder(nn.Module):
    """Tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.1, batch_first=True)
        self.embed, self.out = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.blocks(self.embed(tokens)))
        return out


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy over everything but the last dimension."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def cases() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]]:
    """Models with a batch each."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1))
    return {
        "MLP": (mlp, (torch.randn(128, 64), torch.randint(10, (128,)))),
        "transformer": (Encoder(), (tokens[:, :-1], tokens[:, 1:])),
    }


def main() -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=60, help="of every timing")
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    for name, (model, batch) in cases().items():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

        def forward(model: nn.Module = model, inputs: torch.Tensor = batch[0]) -> None:
            with torch.no_grad():
                model(inputs)

        def step(
            model: nn.Module = model,
            batch: tuple[torch.Tensor, torch.Tensor] = batch,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

        runs: dict[str, Callable[[], object]] = {"forward": forward, "step": step}
        for quantities in (*((q,) for q in EVERY_PASS), EVERY_PASS, ("alignment",)):
            probe = InsideProbe(model, loss_of)
            runs[" + ".join(quantities)] = partial(probe.values, batch, quantities)
        times: dict[str, list[float]] = {what: [] for what in runs}
        for repetition in range(repetitions + 3):
            for what, run in runs.items():
                began = time.process_time()
                run()
                if repetition >= 3:  # the first ones fill caches
                    times[what].append(time.process_time() - began)
        base = np.array(times["forward"])
        print(f"{name}: forward {1e3 * np.median(base):.2f} ms, step {1e3 * np.median(times['step']):.2f} ms")
        for what in list(runs)[2:]:
            took = float(np.median(times[what]))
            low, high = np.quantile(np.array(times[what]) / base, [0.25, 0.75])
            ratios = f"{took / np.median(base):.2f} forward passes ({low:.2f} .. {high:.2f})"
            print(f"  {what}: {1e3 * took:.2f} ms, {ratios}, {took / np.median(times['step']):.2f} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
