"""What is trained, at which batch sizes, and which half each workload belongs to.

The split was fixed by data set and architecture on 2026-11-24, before any workload had been trained at two values of
beta2 and before anything was tuned: no pair of them is in both halves. Rules are fitted on ``"tune"``; ``"test"`` is
for reporting. A workload may be corrected for validity (nothing is learnt, a best learning rate at the end of the
search, too slow), never for how a rule fares on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lr.data import CHARACTERS, Data
from benchmarks.lr.judge import EVALUATED
from benchmarks.lr.scenario import Loader, Scenario

__all__ = ["BETA1", "BETAS", "WORKLOADS", "Workload", "select"]

# Three times 1 / (1 - 0.999), the longest memory that such a run can tell from a longer one, and likewise of 0.9999.
STEPS, LONG = 3000, 30_000
BETAS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)
WARMUP = 100
BETA1 = 0.9
HASHED = 4093  # rows of an embedding of n-grams; a prime number
OUTLIERS, FACTOR = 0.01, 8.0  # share of the training rows that are so many times as large
OUTLIER_SEED = 20261124
ROLLOUT, EPOCHS, CLIP, ENTROPY = 256, 4, 0.2, 0.01  # of PPO, as in Schulman et al. (2017), arXiv:1707.06347


class NGrams(nn.Module):
    """The next character from hashed pairs and triples before it: two embeddings whose rows are used as text has it."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.pairs, self.triples = nn.Embedding(HASHED, width), nn.Embedding(HASHED, width)
        self.head = nn.Linear(width, len(CHARACTERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, earlier = F.pad(x, (1, 0))[:, :-1], F.pad(x, (2, 0))[:, :-2]
        pair = x * len(CHARACTERS) + before
        return self.head(self.pairs(pair % HASHED) + self.triples((pair * len(CHARACTERS) + earlier) % HASHED))


@dataclass(frozen=True)
class Workload(Scenario):
    """A scenario at one batch size; what is trained at every beta2.

    Args:
        outliers: Whether a hundredth of the training rows are eight times as large: rare, large gradients.
        bandit: Whether labels are actions and being right is the reward: PPO's policy loss.
    """

    outliers: bool = False
    bandit: bool = False

    def data(self) -> Data:
        data = super().data()
        if not self.outliers:
            return data
        drawn = torch.rand(len(data.x), generator=torch.Generator().manual_seed(OUTLIER_SEED)) < OUTLIERS
        drawn[:EVALUATED] = False  # the rows that runs are judged by
        return dataclasses.replace(data, x=torch.where(drawn[:, None], FACTOR * data.x, data.x))

    def new_model(self, seed: int) -> nn.Module:
        if not self.family.endswith("/ngrams"):
            return super().new_model(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return NGrams(width=self.width).train()

    def criterion(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Of a bandit, the share of rewards that is missed."""
        if not self.bandit:
            return super().criterion(out, y)
        return 1.0 - out.softmax(-1).gather(-1, y[:, None]).mean()

    def loss_fn(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The mean loss of a batch; of a rollout's part (five tensors), PPO's."""
        if len(batch) == 2:
            return super().loss_fn(model, batch)
        x, action, log_before, advantage, _ = batch
        logs = model(x).log_softmax(-1)
        ratio = (logs.gather(-1, action[:, None])[:, 0] - log_before).exp()
        gained = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
        entropy = -(logs.exp() * logs).sum(-1).mean()
        return -gained - ENTROPY * entropy

    def batches(self, model: nn.Module, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Without end; a bandit's rollouts are taken with the model as it is by then."""
        loader = self.loader(seed)
        while True:
            yield from _rollouts(model, loader, self.batch) if self.bandit else loader

    @property
    def betas2(self) -> tuple[float, ...]:
        """Values that are told apart; in runs of 3000 steps 0.9999 is taken to be 0.999."""
        return BETAS if self.steps >= LONG else BETAS[:-1]

    def at(self, beta2: float) -> Workload:
        """The same with this beta2."""
        return dataclasses.replace(self, betas=(BETA1, beta2))


def _rollouts(model: nn.Module, loader: Loader, batch: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Parts of rollouts on one epoch of rows, every rollout four times over."""
    data = loader.data
    for x, y in Loader(data, ROLLOUT, int(torch.randint(2**31, (), generator=loader.generator))):
        with torch.no_grad():
            logs = model(x).log_softmax(-1)
        action = torch.multinomial(logs.exp(), 1, generator=loader.generator)[:, 0]
        reward = (action == y).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-8)
        taken = logs.gather(-1, action[:, None])[:, 0]
        for _ in range(EPOCHS):
            for rows in torch.randperm(ROLLOUT, generator=loader.generator).split(batch):
                yield x[rows], action[rows], taken[rows], advantage[rows], y[rows]


def _family(name: str, half: str, batches: tuple[int, ...], **common: Any) -> list[Workload]:
    settings = {"optimizer": "adamw", "steps": STEPS, "warmup": WARMUP, "schedule": "cosine"} | common
    longer = {LONG: "-long"}.get(settings["steps"], "")
    return [Workload(name=f"{name}:{b}{longer}", family=name, half=half, batch=b, **settings) for b in batches]


TUNE = [
    *_family("digits/mlp-relu", "tune", (8, 64), label_noise=0.2),
    *_family("mnist/cnn", "tune", (4, 32), width=6, schedule="constant"),
    *_family("shakespeare/gru", "tune", (2, 16), width=24, loss="text"),
    *_family("shakespeare/ngrams", "tune", (2, 16), width=16, loss="text", schedule="constant"),
    *_family("digits/mlp-tanh", "tune", (8, 64), outliers=True),
    *_family("mnist8/mlp-relu", "tune", (16, 128), bandit=True, schedule="constant"),
    *_family("pydoc/pre-ln", "tune", (2, 16), width=24, loss="text", model=(("depth", 1),), clip=1.0),
    *_family("digits/mlp-relu", "tune", (8,), label_noise=0.2, steps=LONG),
    *_family("shakespeare/ngrams", "tune", (2,), width=16, loss="text", schedule="constant", steps=LONG),
]

TEST = [
    *_family("mnist8/mlp-gelu", "test", (8, 64), label_noise=0.2),
    *_family("digits/cnn", "test", (4, 32), width=6, label_noise=0.1, schedule="constant"),
    *_family("digits/vit", "test", (4, 32), width=16, model=(("depth", 1),), label_noise=0.1),
    *_family("pydoc/gru", "test", (2, 16), width=24, loss="text", clip=1.0, schedule="constant"),
    *_family("shakespeare/gpt", "test", (2, 16), width=24, loss="text", model=(("depth", 1),)),
    *_family("pydoc/ngrams", "test", (2, 16), width=16, loss="text"),
    *_family("mnist/mlp-tanh", "test", (8, 64), outliers=True, schedule="constant"),
    *_family("digits/mlp-gelu", "test", (16, 128), bandit=True),
    *_family("mnist8/mlp-gelu", "test", (8,), label_noise=0.2, steps=LONG),
    *_family("pydoc/ngrams", "test", (2,), width=16, loss="text", steps=LONG),
]

WORKLOADS = {workload.name: workload for workload in (*TUNE, *TEST)}


def select(*, half: str | None = None, only: str | None = None) -> list[Workload]:
    """Workloads of a half, or those whose names match a glob."""
    return [w for w in WORKLOADS.values() if half in (None, w.half) and fnmatch(w.name, only or "*")]
