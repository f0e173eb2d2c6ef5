"""What looking inside the network costs, relative to a forward pass and a training step of the same model.

    python benchmarks/tier2.py

A small language model (six layers of width 256, eight heads, 256 positions) and a convolutional network. Each
measurement is timed on one batch, interleaved with forward passes without gradients and with training steps (forward,
backward, Adam); ratios are of medians, with the quartiles of the ratio within repetitions beside them. The accuracy of
attention entropies and logits is measured as well, against a dense softmax in float64, for logits of growing size.

Takes about a minute on one core. Exit status 1 if an entropy is off by more than a thousandth of a nat where
logits stay below a hundred.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peer_suite.provenance import provenance
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dyntune

RESULT = Path(__file__).resolve().parent / "results" / "tier2.json"
SCHEMA = 1
VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 4096, 256, 8, 6, 256
GAINS = (1.0, 10.0, 100.0, 1000.0, 10000.0)


class Attention(nn.Module):
    """Causal self-attention by the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP with GELU, norms before both."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    """Embedding, blocks, and a linear layer to the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def network() -> nn.Module:
    """A convolutional network for images of 32 by 32."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def cases() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    """Model, inputs, targets, and what is measured."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (4, LENGTH + 1), generator=generator)
    images, labels = torch.randn(32, 3, 32, 32, generator=generator), torch.randint(10, (32,), generator=generator)
    every = ("attention_statistics", "dead_units", "output_logits", "spectral_alignment")
    return {
        "language model": (made(LanguageModel), tokens[:, :-1], tokens[:, 1:], every),
        "convolutional network": (made(network), images, labels, every[1:]),
    }


def cost(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, names: tuple[str, ...], repetitions: int
) -> dict[str, Any]:
    """CPU seconds of forward passes, training steps and measurements, interleaved."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def forward() -> None:
        with torch.no_grad():
            model(inputs)

    def step() -> None:
        optimizer.zero_grad()
        outputs = model(inputs)
        F.cross_entropy(outputs.flatten(0, -2), targets.flatten()).backward()
        optimizer.step()

    runs: dict[str, Callable[[], object]] = {"forward": forward, "step": step}
    for name in names:
        measure = getattr(dyntune, name)
        runs[name] = lambda measure=measure: measure(model, inputs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 2):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if repetition >= 2:  # the first ones fill caches
                times[name].append(time.process_time() - began)
    base = {name: np.array(times[name]) for name in ("forward", "step")}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "inputs": list(inputs.shape),
        "forward_seconds": float(np.median(base["forward"])),
        "step_seconds": float(np.median(base["step"])),
        "measurements": {
            name: {
                "seconds": float(np.median(times[name])),
                "of_a_forward": float(np.median(times[name]) / np.median(base["forward"])),
                "of_a_forward_quartiles": np.quantile(np.array(times[name]) / base["forward"], [0.25, 0.75]).tolist(),
                "of_a_step": float(np.median(times[name]) / np.median(base["step"])),
            }
            for name in names
        },
    }


class Given(nn.Module):
    """Attention over queries and keys that are given, scaled by a parameter."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, qk: torch.Tensor) -> torch.Tensor:
        q, k = qk.unbind(1)
        return F.scaled_dot_product_attention(self.gain * q, k, k, is_causal=True)


def accuracy() -> list[dict[str, float]]:
    """Largest error of a head's entropy and largest logit, by the size of the logits."""
    qk = torch.randn(2, 2, HEADS, LENGTH, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for gain in GAINS:
        (heads,) = dyntune.attention_statistics(Given(gain), qk).values()
        q, k = (gain * qk[:, 0]).double(), qk[:, 1].double()
        barred = ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        z = (q @ k.transpose(-1, -2) / math.sqrt(32)).masked_fill(barred, -math.inf)
        log_p = z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p.masked_fill(barred, 0.0)).sum(-1)[..., 1:].mean((0, 2))
        largest = z.amax((0, 2, 3))
        found.append(
            {
                "largest_logit": float(largest.max()),
                "smallest_entropy": float(entropy.min()),
                "entropy_error": float((torch.tensor(heads.entropy).double() - entropy).abs().max()),
                "logit_relative_error": float((torch.tensor(heads.max_logit).double() / largest - 1).abs().max()),
            }
        )
    return found


def main() -> int:
    """Measure, save, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15, help="of every timing")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "schema": SCHEMA,
        "provenance": provenance(),
        "accuracy": accuracy(),
        "cost": {name: cost(*case, arguments.repetitions) for name, case in cases().items()},
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, case in result["cost"].items():
        print(f"{name}: forward {1e3 * case['forward_seconds']:.0f} ms, step {1e3 * case['step_seconds']:.0f} ms")
        for what, took in case["measurements"].items():
            print(f"  {what}: {took['of_a_forward']:.2f} forward passes, {took['of_a_step']:.2f} steps")
    for row in result["accuracy"]:
        print(f"logits to {row['largest_logit']:.3g}: entropy off by {row['entropy_error']:.2g} nats")
    return int(any(row["entropy_error"] > 1e-3 for row in result["accuracy"] if row["largest_logit"] < 100))


if __name__ == "__main__":
    sys.exit(main())
