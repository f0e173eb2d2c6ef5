"""One scenario: a complete description of a training run but for its learning rate and seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lr.data import Data, digest, load
from benchmarks.lr.models import build
from benchmarks.lr.pretrained import PRETRAININGS, finetuned

Batch = tuple[torch.Tensor, torch.Tensor]

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "nadam": (torch.optim.NAdam, {}),
}
ADAPTIVE = ("rmsprop", "adam", "adamw", "nadam")
FUSED = ("sgd", "momentum", "nesterov", "adam", "adamw")
TARGETS = {"ce": "class", "mse": "onehot", "regression": "value", "binary": "value", "text": "text"}
TARGETS |= {"reconstruction": "self", "pixels": "self"}


@dataclass(frozen=True)
class Scenario:
    """One way of training, complete but for the learning rate and the seed.

    Args:
        name: Unique: the family and what is special.
        family: Data set / architecture.
        half: ``"tune"`` or ``"test"``.
        optimizer: A key of ``OPTIMIZERS``.
        batch: Rows in a batch.
        steps: Length of the run.
        loss: ``"ce"``, ``"mse"`` (on one-hot rows), ``"regression"``, ``"binary"``, ``"text"`` (cross-entropy per
            character), ``"reconstruction"`` (squared error), ``"pixels"`` (binary cross-entropy).
        width: Of the model.
        model: Further options of the architecture, as pairs.
        warmup: Steps of linear warm-up, 0 for none.
        schedule: ``"constant"``, ``"cosine"`` or ``"linear"``: the decay to zero after the warm-up.
        betas: Of Adam's kind; or, of SGD's, (momentum,).
        weight_decay: As the optimizer means it.
        clip: Largest gradient norm, None for no clipping.
        groups: Pairs (pattern of parameter names, LR relative to the first group's): these form a group each.
        init_scale: Factor on every initial weight with two or more axes.
        loss_scale: Factor on the loss: a sum instead of a mean, say.
        input_scale: See ``load``.
        label_noise: See ``load``.
        smoothing: Label smoothing.
        start: Key of ``PRETRAININGS``: fine-tuning.
        fresh_head: See ``finetuned``.
        lora: Rank of LoRA.
    """

    name: str
    family: str
    half: str
    optimizer: str
    batch: int = 32
    steps: int = 300
    loss: str = "ce"
    width: int = 32
    model: tuple[tuple[str, Any], ...] = ()
    warmup: int = 0
    schedule: str = "constant"
    betas: tuple[float, ...] | None = None
    weight_decay: float = 0.0
    clip: float | None = None
    groups: tuple[tuple[str, float], ...] = ()
    init_scale: float = 1.0
    loss_scale: float = 1.0
    input_scale: float = 1.0
    label_noise: float = 0.0
    smoothing: float = 0.0
    start: str | None = None
    fresh_head: bool = False
    lora: int | None = None

    @property
    def data_name(self) -> str:
        return self.family.split("/")[0]

    def data(self) -> Data:
        return load(self.data_name, TARGETS[self.loss], label_noise=self.label_noise, input_scale=self.input_scale)

    def new_model(self, seed: int) -> nn.Module:
        """A freshly initialised model, in training mode; the global random state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.start is not None:
                model = finetuned(self.start, fresh_head=self.fresh_head, lora_rank=self.lora)
            else:
                architecture = self.family.split("/")[1]
                model = build(architecture, self.data_name, width=self.width, **dict(self.model))
        if self.init_scale != 1.0:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(self.init_scale)
        return model.train()

    def loss_fn(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean loss over a batch, times `loss_scale`."""
        x, y = batch
        return self.criterion(model(x), y)

    def criterion(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The same from outputs and targets, which is how most tools take a loss."""
        if self.loss in ("ce", "text"):
            loss = F.cross_entropy(out.flatten(0, -2), y.flatten(), label_smoothing=self.smoothing)
        elif self.loss in ("binary", "pixels"):
            loss = F.binary_cross_entropy_with_logits(out, y)
        else:
            loss = F.mse_loss(out, y)
        return loss if self.loss_scale == 1.0 else self.loss_scale * loss

    def new_optimizer(self, model: nn.Module, lr: float, *, fused: bool = False) -> torch.optim.Optimizer:
        """torch's own optimizer; `lr` is the first group's. `fused`: torch's fused kernel, where there is one."""
        members: dict[str | None, list[nn.Parameter]] = {None: []} | {pattern: [] for pattern, _ in self.groups}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                pattern = next((p for p, _ in self.groups if fnmatch(name, p)), None)
                members[pattern].append(parameter)
        ratios: dict[str | None, float] = {None: 1.0} | dict(self.groups)
        groups = [{"params": found, "lr": lr * ratios[pattern]} for pattern, found in members.items()]
        if not all(group["params"] for group in groups):
            raise ValueError(f"{self.name}: a parameter group is empty; groups={self.groups}")
        kind, options = OPTIMIZERS[self.optimizer]
        options = options | {"weight_decay": self.weight_decay}
        if self.betas is not None:
            options |= {"betas": self.betas} if self.optimizer in ADAPTIVE[1:] else {"momentum": self.betas[0]}
        if fused and self.optimizer in FUSED:
            options["fused"] = True
        return kind(groups, lr=lr, **options)

    def factor(self, step: int) -> float:
        """The schedule at a step, counted from 0: a factor on every group's LR."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / (self.steps - self.warmup)
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def loader(self, seed: int) -> Loader:
        return Loader(self.data(), self.batch, seed)

    def settings(self) -> dict[str, Any]:
        """What is not default, as JSON gives it back; the name left out."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = {k: v for k, v in dataclasses.asdict(self).items() if v != defaults[k] and k != "name"}
        found: dict[str, Any] = json.loads(json.dumps(changed))
        return found

    def digest(self) -> str:
        """Hash of all that the outcome depends on, but for the code that trains; the text of the data included."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("name", "half")}
        values["data"] = digest(self.data_name)
        if self.start is not None:
            values["pretraining"] = dataclasses.asdict(PRETRAININGS[self.start])
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


class Loader:
    """Batches of shuffled rows, epoch after epoch without replacement; a short last batch is left out.

    Every ``iter()`` goes on with a new order from the same seed's stream, as a DataLoader with a generator does.
    """

    def __init__(self, data: Data, batch: int, seed: int) -> None:
        self.data, self.batch = data, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data.x) // self.batch

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.data.x), generator=self.generator)
        for rows in order[: len(self) * self.batch].split(self.batch):
            yield self.data.x[rows], self.data.y[rows]
