"""Faults of the data, the loss and the loop."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.faults.fault import Fault
from benchmarks.faults.training import Batch, Training
from benchmarks.faults.workloads import Workload
from dyntune.monitor.alerts import Cause

BURST = 5  # batches


class InputBurst(Fault):
    """Five batches whose inputs are too large by a factor: a preprocessing step that was skipped."""

    family, cause, unit = "input-burst", Cause.BAD_BATCH, "factor on the inputs of five batches"
    mid_run, judged = True, "lost"
    weakest, strongest = 3.0, 1e6

    @classmethod
    def fits(cls, workload: Workload) -> bool:
        """Only where inputs have a size."""
        return not workload.is_text

    def batch(self, run: Training, x: torch.Tensor, y: torch.Tensor) -> Batch:
        return (x * self.strength if run.step < self.onset + BURST else x), y


class LabelBurst(Fault):
    """A run of batches with labels that mean nothing."""

    family, cause, unit = "label-burst", Cause.BAD_BATCH, "batches in a row with labels at random"
    mid_run, judged = True, "lost"
    weakest, strongest = 1.0, 500.0

    def batch(self, run: Training, x: torch.Tensor, y: torch.Tensor) -> Batch:
        if run.step >= self.onset + self.strength:
            return x, y
        high = int(run.y.max()) + 1
        return x, torch.randint(0, high, y.shape, generator=self.random)


class SortedData(Fault):
    """Rows come sorted, by class or by how dense the text is; weaker: only a share of them."""

    family, cause, unit = "sorted-data", Cause.DATA_ORDER, "share of the rows that are in sorted order"
    weakest, strongest = 0.3, 1.0

    def build(self, run: Training) -> None:
        key = run.x.float().mean(1) if run.workload.is_text else run.y.float()
        ranks = torch.empty(len(key))
        ranks[key.argsort(stable=True)] = torch.linspace(0, 1, len(key))

        def order() -> torch.Tensor:
            free = torch.rand(len(ranks), generator=run.rows_order)
            is_sorted = torch.rand(len(ranks), generator=run.rows_order) < self.strength
            return torch.where(is_sorted, ranks, free).argsort()

        run.order = order  # type: ignore[method-assign]


class ShortCycle(Fault):
    """From the onset on the loader deals the same few batches again and again: a worker's seed that is reset."""

    family, cause, unit = "short-cycle", Cause.DATA_ORDER, "1 / different batches"
    mid_run = True
    weakest, strongest = 1 / 64, 1.0

    def build(self, _run: Training) -> None:
        self.kept: list[Batch] = []

    def batch(self, run: Training, x: torch.Tensor, y: torch.Tensor) -> Batch:
        if len(self.kept) < max(1, round(1 / self.strength)):
            self.kept.append((x, y))
            return x, y
        return self.kept[(run.step - self.onset) % len(self.kept)]


class ShuffledLabels(Fault):
    """The labels of a share of the rows are those of other rows; a large model learns them by heart."""

    family, cause, unit = "shuffled-labels", Cause.WRONG_LABELS, "share of the rows"
    weakest, strongest = 0.05, 1.0

    def build(self, run: Training) -> None:
        rows = torch.randperm(len(run.y), generator=self.random)[: round(self.strength * len(run.y))]
        shuffled = run.y.clone()
        shuffled[rows] = run.y[rows[torch.randperm(len(rows), generator=self.random)]]
        run.y = shuffled


class Misaligned(Fault):
    """From the onset on a share of every batch gets the labels of the row before."""

    family, cause, unit = "misaligned", Cause.WRONG_LABELS, "share of the rows"
    mid_run = True
    weakest, strongest = 0.05, 1.0

    def batch(self, _run: Training, x: torch.Tensor, y: torch.Tensor) -> Batch:
        moved = torch.rand(len(y), generator=self.random) < self.strength
        return x, torch.where(moved.view(-1, *[1] * (y.ndim - 1)), y.roll(1, 0), y)


class ZeroGradForgotten(Fault):
    """Gradients are cleared at one step in so many; in between they add up."""

    family, cause, unit = "zero-grad", Cause.ACCUMULATED_GRADIENTS, "steps from one clearing to the next"
    weakest, strongest = 2.0, 2000.0

    def before(self, run: Training) -> None:
        run.clears = (run.step + 1) % round(self.strength) == 0


class ZeroGradLost(ZeroGradForgotten):
    """The same from an onset on."""

    family, mid_run = "zero-grad-onset", True


class DoubleSoftmax(Fault):
    """The criterion takes logits and is given probabilities, scaled by a factor that is 1 in the usual mistake."""

    family, cause, unit = "double-softmax", Cause.WRONG_LOSS, "1 / factor on the probabilities"
    weakest, strongest = 0.03, 10.0

    def build(self, run: Training) -> None:
        criterion = run.criterion
        run.criterion = lambda out, y: criterion(F.softmax(out, -1) / self.strength, y)


class LossScale(Fault):
    """The mean is taken twice: the loss, and with it every gradient, is too small; only SGD's kind notices."""

    family, cause, unit = "loss-scale", Cause.LOSS_SCALE, "divisor of the loss"
    kind = "sgd"
    weakest, strongest = 3.0, 1e6

    @classmethod
    def setting(cls, workload: Workload) -> Workload:
        """Without clipping, which would hide it, or be hidden by it."""
        return workload.changed(clip=None)

    def build(self, run: Training) -> None:
        criterion = run.criterion
        run.criterion = lambda out, y: criterion(out, y) / self.strength


class LossSummed(LossScale):
    """A sum instead of a mean: the loss and every gradient are too large."""

    family, unit = "loss-summed", "factor on the loss"
    weakest, strongest = 2.0, 1000.0

    def build(self, run: Training) -> None:
        criterion = run.criterion
        run.criterion = lambda out, y: criterion(out, y) * self.strength


FAMILIES: list[type[Fault]] = [
    *(InputBurst, LabelBurst, SortedData, ShortCycle, ShuffledLabels, Misaligned),
    *(ZeroGradForgotten, ZeroGradLost, DoubleSoftmax, LossScale, LossSummed),
]
