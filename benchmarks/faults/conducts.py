"""What healthy trainings do that looks like a fault: each is a change like a fault, and none is one."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.faults.training import Batch, Training
from benchmarks.lr.data import CHARACTERS

RAMP = (1 / 8, 1 / 4, 1 / 2, 1.0)  # batch sizes of the quarters of a run, relative to the workload's
EASY_SHARE = 0.4  # of the run: the first stage of the curriculum


class Conduct:
    """Does nothing; begins at step 0.

    Attributes:
        events: Steps at which something changes on purpose, by name: expected changes, not alarms.
    """

    onset = 0

    def __init__(self) -> None:
        self.events: dict[str, list[int]] = {}

    def build(self, run: Training) -> None: ...

    def begin(self, run: Training) -> None: ...

    def before(self, run: Training) -> None: ...

    def batch(self, _run: Training, x: torch.Tensor, y: torch.Tensor) -> Batch:
        return x, y

    def after_backward(self, run: Training) -> None: ...


class Subset(Conduct):
    """The first rows only; as one batch, if asked."""

    def __init__(self, rows: int, *, full_batch: bool = False) -> None:
        super().__init__()
        self.rows, self.full_batch = rows, full_batch

    def build(self, run: Training) -> None:
        run.x, run.y = run.x[: self.rows], run.y[: self.rows]
        if self.full_batch:
            run.batch_size = len(run.x)


class BatchRamp(Conduct):
    """The batch grows from an eighth to the workload's, twofold at each quarter of the run."""

    def build(self, run: Training) -> None:
        self.full = run.batch_size
        self.events["batch size"] = [round(run.steps * i / len(RAMP)) for i in range(1, len(RAMP))]

    def before(self, run: Training) -> None:
        share = RAMP[min(len(RAMP) * run.step // run.steps, len(RAMP) - 1)]
        run.batch_size = max(1, round(self.full * share))


class Curriculum(Conduct):
    """Half of the classes first (of text: its first quarter), everything later: the loss jumps at the switch."""

    def build(self, run: Training) -> None:
        switch = round(EASY_SHARE * run.steps)
        self.events["curriculum"] = [switch]
        text = run.workload.is_text
        easy = torch.arange(len(run.y) // 4) if text else (run.y <= run.y.max() // 2).nonzero().flatten()

        def order() -> torch.Tensor:
            if run.step < switch:
                return easy[torch.randperm(len(easy), generator=run.rows_order)]
            return torch.randperm(len(run.y), generator=run.rows_order)

        self.switch, self.order = switch, order
        run.order = order  # type: ignore[method-assign]


class LabelNoise(Conduct):
    """A share of the labels redrawn at random once, every run the same way."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def build(self, run: Training) -> None:
        generator = torch.Generator().manual_seed(run.seed)
        noisy = torch.rand(run.y.shape, generator=generator) < self.share
        drawn = torch.randint(0, int(run.y.max()) + 1, run.y.shape, generator=generator)
        run.y = torch.where(noisy, drawn, run.y)


class SparseEmbedding(Conduct):
    """Pairs of characters as symbols: most of 9,216 rows have no gradient at a step, and many never have."""

    def build(self, run: Training) -> None:
        embed = run.model.get_submodule("embed")
        assert isinstance(embed, nn.Embedding)
        symbols, width = len(CHARACTERS), embed.embedding_dim
        weight = 0.02 * torch.randn(symbols**2, width, generator=torch.Generator().manual_seed(run.seed))
        pairs = nn.Embedding.from_pretrained(weight, freeze=False)
        pairs.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + symbols * inputs[0].roll(1, 1),))
        run.model.embed = pairs
        run.optimizer = run.workload.new_optimizer(run.model)


class Rectified(Conduct):
    """ReLU where GELU was: activations are sparse."""

    def build(self, run: Training) -> None:
        for parent in list(run.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.GELU):
                    setattr(parent, name, nn.ReLU())
