"""Time and memory of curvature on GPT-2-like models from 1M to 124M parameters, on the CPU.

    python benchmarks/scale.py            measure what is missing, draw the figure
    python benchmarks/scale.py --fresh    measure everything again

Each size runs in a process of its own, so that its peak resident memory is its own. Random weights, text of
Shakespeare as bytes, one sequence of 64; lambda_max of the Hessian, and of the preconditioned Hessian after three AdamW
steps. GPT-2 small has 12 blocks of width 768 and a vocabulary of 50,257, tied; the smaller ones scale down all of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "scale.json"
FIGURE = HERE.parent / "docs" / "_static" / "scale.svg"
LENGTH = 64
# name: (width, blocks, vocabulary)
SIZES = {"1M": (128, 4, 1024), "10M": (320, 6, 8192), "40M": (512, 8, 30000), "124M": (768, 12, 50257)}


class Block(nn.Module):
    """Pre-LN attention and MLP, as in GPT-2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, width)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token and place embeddings, blocks, tied output; weights N(0, 0.02) as in GPT-2."""

    def __init__(self, width: int, blocks: int, vocabulary: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(1024, width)
        self.blocks, self.norm = nn.Sequential(*(Block(width) for _ in range(blocks))), nn.LayerNorm(width)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.blocks(self.token(tokens) + self.place(torch.arange(tokens.shape[1])))
        return self.norm(h) @ self.token.weight.T


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def measure(name: str) -> dict[str, Any]:
    """One size, in this process."""
    import dyntune

    torch.manual_seed(0)
    model = GPT(*SIZES[name])
    text = torch.tensor(list((HERE / "data" / "shakespeare.txt").read_bytes()[: 4 * (LENGTH + 1)]))
    batches = [(c[None, :-1], c[None, 1:]) for c in text.view(4, -1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for batch in batches[1:]:
        loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    started = time.perf_counter()
    loss_fn(model, batches[0]).backward()
    gradient_seconds = time.perf_counter() - started
    optimizer.zero_grad()
    before = _peak()
    out: dict[str, Any] = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "gradient_seconds": gradient_seconds,
        "peak_gib_before": before,
    }
    operator = dyntune.hessian(model, batches[0], loss_fn)
    for label, measured in (("hessian", operator), ("preconditioned", dyntune.preconditioned(operator, optimizer))):
        started = time.perf_counter()
        found = dyntune.eigenvalues(measured, max_products=100)
        out[label] = found.to_dict() | {"seconds": time.perf_counter() - started, "peak_gib": _peak()}
        del found
    return out


def _peak() -> float:
    """Peak resident memory of this process in GiB (Linux: ru_maxrss is in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _draw(sizes: dict[str, Any]) -> None:
    """Seconds per product and memory beyond the training's own, against the line through the largest model."""
    from dyntune.plots.style import BLUE, INK, ORANGE, label, new_axes, tidy
    from dyntune.plots.svg import to_svg

    n = [found["num_parameters"] for found in sizes.values()]
    product = [found["hessian"]["seconds"] / found["hessian"]["num_products"] for found in sizes.values()]
    memory = [found["preconditioned"]["peak_gib"] - found["peak_gib_before"] for found in sizes.values()]
    ax = new_axes(height=3.0)
    for values, color, name in ((product, BLUE, "seconds per product"), (memory, ORANGE, "GiB beyond training")):
        ax.loglog(n, values, color=color, marker="o", linewidth=1.4)
        ax.loglog(n, [values[-1] * m / n[-1] for m in n], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        above = color == ORANGE
        place = {"ha": "right", "offset": (0, 10)} if above else {"ha": "left", "offset": (8, -14)}
        label(ax, n[1], values[1], name, color=color, **place)
    label(ax, n[2], product[-1] * n[2] / n[-1], "dashed: proportional", ha="left", va="top", offset=(6, -12))
    tidy(ax, title="Time and memory of a Lanczos solve", xlabel="parameters", ylabel="seconds, or GiB", grid="y")
    figure = ax.get_figure(root=True)
    assert figure is not None
    text = "Seconds per Hessian-vector product and extra memory, from one million to 124 million parameters."
    FIGURE.write_text(to_svg(figure, name="scale", description=text, standalone=True) + "\n", encoding="utf-8")


def main() -> int:
    """Measure the missing sizes one after the other; each result is saved as soon as it is there."""
    from peer_suite.provenance import provenance

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--one", choices=SIZES, help="measure one size in this process and print it")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return 0
    result: dict[str, Any] = {"sizes": {}}
    if RESULT.exists() and not arguments.fresh:
        result = json.loads(RESULT.read_text())
    for name in SIZES:
        if name in result["sizes"]:
            continue
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
        result["sizes"][name] = json.loads(done)
        result["provenance"] = provenance() | {"threads": torch.get_num_threads()}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {done[:200]}", file=sys.stderr, flush=True)
    _draw(result["sizes"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
