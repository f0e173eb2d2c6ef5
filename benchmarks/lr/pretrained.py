"""The small models that the fine-tuning scenarios start from: trained here, always in the same way, and cached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lr.data import cached, load
from benchmarks.lr.models import add_lora, build


@dataclass(frozen=True)
class Pretraining:
    """AdamW with cosine decay to zero on batches of 32."""

    data: str
    target: str
    model: str
    steps: int
    lr: float
    options: dict[str, Any] = field(default_factory=dict)


PRETRAININGS = {
    "mlp-on-mnist8": Pretraining("mnist8", "class", "mlp-relu", 1500, 3e-3, {"width": 32}),
    "mlp-on-digits": Pretraining("digits", "class", "mlp-relu", 600, 3e-3, {"width": 32}),
    "gpt-on-pydoc": Pretraining("pydoc", "text", "gpt", 2000, 3e-3, {"width": 32, "depth": 2}),
    "gpt-on-shakespeare": Pretraining("shakespeare", "text", "gpt", 2000, 3e-3, {"width": 32, "depth": 2}),
}


def _train(pretraining: Pretraining) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(pretraining.model, pretraining.data, **pretraining.options)
        data = load(pretraining.data, pretraining.target)
        optimizer = torch.optim.AdamW(model.parameters(), lr=pretraining.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, pretraining.steps)
        for _ in range(pretraining.steps):
            rows = torch.randint(len(data.x), (32,))
            loss = F.cross_entropy(model(data.x[rows]).flatten(0, -2), data.y[rows].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.state_dict()


def finetuned(start: str, *, fresh_head: bool, lora_rank: int | None) -> nn.Module:
    """A pretrained model, ready to be trained on; draws from the global random state for what is new in it.

    Args:
        start: A key of ``PRETRAININGS``.
        fresh_head: Initialise the last linear layer anew.
        lora_rank: Train LoRA of this rank, with alpha twice the rank, instead of the weights; with a fresh head, that
            is trained, too.
    """
    pretraining = PRETRAININGS[start]
    path = cached(f"{start}.pt", lambda part: torch.save(_train(pretraining), part))
    model = build(pretraining.model, pretraining.data, **pretraining.options)
    model.load_state_dict(torch.load(path, weights_only=True))
    if lora_rank is not None:
        add_lora(model, lora_rank, 2.0 * lora_rank)
    if fresh_head:
        assert isinstance(model, nn.Sequential)
        old = model[-1] if lora_rank is None else model[-1].base
        model[-1] = nn.Linear(old.in_features, old.out_features)
    return model
