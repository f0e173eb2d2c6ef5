"""One training in the ordinary form, under a workload, a seed and changes such as a fault: :class:`Training`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from benchmarks.faults.workloads import Workload

if TYPE_CHECKING:
    import dyntune

Batch = tuple[torch.Tensor, torch.Tensor]
# A loop goes on for a while after the loss stopped being finite, as real ones do; nothing new happens after this many.
AFTER_NON_FINITE = 64
FORWARD_ROWS = 64  # of an evaluation at a time


class Change(Protocol):
    """What differs from the workload: a fault, or something that healthy trainings do."""

    onset: int

    def build(self, run: Training) -> None:
        """After construction, before the first step."""

    def begin(self, run: Training) -> None:
        """Once, before the step `onset`."""

    def before(self, run: Training) -> None:
        """Before every step from `onset` on; the step's learning rate is set, the batch is not drawn."""

    def batch(self, run: Training, x: torch.Tensor, y: torch.Tensor) -> Batch:
        """The batch of a step from `onset` on."""
        ...

    def after_backward(self, run: Training) -> None:
        """From `onset` on, before clipping."""


class Training:
    """A model, its optimizer, batches and the loop over them. Iterating yields batches; the loop consumes them.

    Args:
        workload: What is trained.
        seed: Of initial weights, order of rows and dropout.
        changes: Faults and the like, in order.

    Attributes:
        step: The number of the present step.
        factor: Schedule: step to factor on all learning rates.
        criterion: As the user minimises it.
        clip: Largest gradient norm, or None.
        x, y: Training rows; a change may replace them.
        batch_size: Of the next batch.
        clears: Whether the gradients are cleared after this step.
        sanitises: Whether the loop replaces gradients that are not finite by zero, as some do.
        losses, norms, lrs: One number a step; the norm is that before clipping, the learning rate the first group's.
    """

    def __init__(self, workload: Workload, seed: int, changes: Sequence[Change] = ()) -> None:
        self.workload, self.seed, self.changes = workload, seed, tuple(changes)
        self.steps, self.step = workload.steps, 0
        self.model = workload.new_model(seed)
        self.optimizer = workload.new_optimizer(self.model)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.factor, self.criterion, self.clip = workload.factor, workload.criterion, workload.scenario.clip
        data = workload.data()
        self.x, self.y, self.batch_size = data.x, data.y, workload.scenario.batch
        self.rows_order = torch.Generator().manual_seed(seed)
        self.clears, self.sanitises = True, False
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.lrs: list[float] = []
        for change in self.changes:
            change.build(self)

    # -- batches -------------------------------------------------------------------------------------------------------

    def order(self) -> torch.Tensor:
        """Rows of the next epoch, in order; a change may replace this method."""
        return torch.randperm(len(self.x), generator=self.rows_order)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        order, used = self.order(), 0
        while self.step < self.steps and not self.is_over():
            self._prepare()
            if used + self.batch_size > len(order):
                order, used = self.order(), 0
            rows = order[used : used + self.batch_size]
            used += self.batch_size
            x, y = self.x[rows], self.y[rows]
            for change in self._active():
                x, y = change.batch(self, x, y)
            yield x, y

    def _active(self) -> list[Change]:
        return [change for change in self.changes if self.step >= change.onset]

    def _prepare(self) -> None:
        factor = self.factor(self.step)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        self.clears = True
        for change in self._active():
            if self.step == change.onset:
                change.begin(self)
            change.before(self)

    def is_over(self) -> bool:
        """Whether the loss has not been finite for long."""
        recent = self.losses[-AFTER_NON_FINITE:]
        return len(recent) == AFTER_NON_FINITE and not any(map(math.isfinite, recent))

    # -- the loop ------------------------------------------------------------------------------------------------------

    def loop(self, monitor: dyntune.Monitor | None = None, *, until: int | None = None) -> None:
        """Train to the end, or to a step; random numbers of dropout come from the seed, and the global state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            batches: Iterable[Any] = self if monitor is None else monitor.watch(self, progress=False)
            for x, y in batches:
                loss = self._step(x, y)
                if monitor is not None:
                    monitor.observe(loss)
                if until is not None and self.step >= until:
                    break

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = self.criterion(self.model(x), y)
        loss.backward()
        for change in self._active():
            change.after_backward(self)
        self.norms.append(self._clipped())
        self.losses.append(float(loss.detach()))
        self.lrs.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.clears:
            self.optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    def _clipped(self) -> float:
        """The norm of the whole gradient; then it is clipped, if that is what the workload does."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return 0.0
        norm = nn.utils.get_total_norm(gradients)
        if self.sanitises and not math.isfinite(norm):
            for gradient in gradients:
                gradient.nan_to_num_(0.0, 0.0, 0.0)
        elif self.clip is not None:
            torch._foreach_mul_(gradients, torch.clamp(self.clip / (norm + 1e-6), max=1.0))
        return float(norm)

    # -- results -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> float:
        """The workload's own loss on its fixed, clean rows."""
        x, y = self.workload.evaluation()
        self.model.eval()
        pairs = zip(x.split(FORWARD_ROWS), y.split(FORWARD_ROWS), strict=True)
        losses = [float(self.workload.criterion(self.model(a), b)) for a, b in pairs]
        self.model.train()
        return sum(losses) / len(losses)

    @property
    def diverged(self) -> bool:
        """Whether the last loss, or a parameter, is not finite."""
        parameters = all(bool(p.isfinite().all()) for p in self.model.parameters())
        return not (parameters and math.isfinite(self.losses[-1]))
