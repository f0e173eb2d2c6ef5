"""One training of a sweep: a rate and a seed in, the final loss out; the same batches and masks for every rate."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from dyntune.errors import NonFiniteError
from dyntune.numerics.random import stream_seed
from dyntune.objective.batches import num_rows, tensors_of
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.objective.objective import Objective
from dyntune.pilot.runs import BLOW_UP
from dyntune.pilot.twin import CostMeter, Training, Twin

__all__ = ["Decay", "PairedTraining", "factor"]

Decay: TypeAlias = Literal["constant", "linear", "cosine"]

# Batches on which the end of a training is judged, the same for all.
EVALUATED = 8
# The final loss is the mean at this many points of the last twentieth of the steps: at a constant rate, one step's loss
# is noise (as in benchmarks/lr/judge.py).
TAIL, TAIL_POINTS = 0.05, 3
# A blow-up is a mean loss over successive steps of this many rows above twice the initial one, batch by batch. That of
# a single small batch is noise (PEAK_ROWS: benchmarks/lr/judge.py; batch by batch: dyntune/pilot/runs.py). There are at
# least PEAKS such means in a training.
PEAK_ROWS, PEAKS = 256, 10
VERSION = 1  # of what is computed here: recorded trainings of another one do not count


def factor(step: int, *, num_steps: int, warmup_steps: int, schedule: Decay) -> float:
    """The rate of a step, counted from 0, over the peak: linear warm-up, then constant or decaying to zero.

    Example:
        >>> [round(factor(s, num_steps=6, warmup_steps=2, schedule="linear"), 2) for s in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / (num_steps - warmup_steps)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def accumulated_rows(batches: Sequence[Any], accumulate: int) -> int:
    """Rows of a step: of the smallest batch, as often as it is accumulated."""
    return accumulate * min(num_rows(batch) for batch in batches)


class PairedTraining:
    """Trains twins; called with a rate and a seed. Picklable where model, batches, loss and optimizer are.

    The seed decides the order of the batches (new in every epoch) and dropout's masks, the rate neither. All trainings
    begin at the model's present parameters and its optimizer's present state.

    Args:
        objective: The user's loss on the batches that are trained on.
        loss_fn: What `objective` was made with.
        criterion: Likewise.
        training: How steps are made.
        num_steps: Length.
        warmup_steps: Of these, linear warm-up; None: see :func:`dyntune.suggest.lr_sweep.sweep_lr`.
        schedule: After it.
        seed: Of everything.

    Raises:
        NonFiniteError: A batch whose loss is not finite before training.
    Cost:
        A forward pass per batch, here; a training's own cost is in its result.
    """

    def __init__(
        self,
        objective: Objective,
        loss_fn: LossFunction | None,
        criterion: Criterion | None,
        training: Training,
        *,
        num_steps: int,
        warmup_steps: int | None,
        schedule: Decay,
        seed: int,
    ) -> None:
        self.model: nn.Module = objective.model
        self.batches = objective.batches
        self.loss_fn, self.criterion = loss_fn, criterion
        self.training = training
        self.num_steps, self.schedule, self.seed = num_steps, schedule, seed
        self._objective: Objective | None = objective
        meter = CostMeter(math.inf)
        with objective.measuring() as buffers:
            twin = Twin(objective, training, buffers, meter, seed=seed)
            self.before = [twin.loss_at(index, None, 0.0) for index in range(len(self.batches))]
            betas = twin.optimizer.param_groups[0].get("betas")
            usual = 0 if betas is None else min(round(2 / (1 - float(betas[1]))), num_steps // 10)
            self.warmup_steps = usual if warmup_steps is None else warmup_steps
            settings = (training.clip_norm, training.accumulate, str(training.autocast), num_steps)
            self.digest = _digest(objective, twin, (*settings, self.warmup_steps, schedule, seed))
        self.cost = meter.spent
        self.limit = BLOW_UP * abs(float(np.mean(self.before)))
        rows = accumulated_rows(self.batches, training.accumulate)
        self.window = max(1, min(math.ceil(PEAK_ROWS / rows), num_steps // PEAKS))
        if bad := [index for index, loss in enumerate(self.before) if not math.isfinite(loss)]:
            raise NonFiniteError(
                f"the loss of batch {bad[0]} is {self.before[bad[0]]} before training: no rate can be judged by it. "
                "Look at that batch and at the loss."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without the objective, which holds handles on this process's model; another process makes its own."""
        return self.__dict__ | {"_objective": None}

    @property
    def objective(self) -> Objective:
        """The loss, in this process."""
        if self._objective is None:
            self._objective = Objective(
                self.model,
                list(self.batches),
                self.loss_fn,
                criterion=self.criterion,
                num_checked=1,
                widen=False,
                seed=self.seed,
            )
        return self._objective

    @property
    def initial(self) -> float:
        """Loss before training on the batches that its end is judged on."""
        return float(np.mean(self.before[:EVALUATED]))

    def order(self, seed: int) -> list[int]:
        """Which batches a training sees, in order: every epoch a permutation of its own."""
        count, needed = len(self.batches), self.num_steps * self.training.accumulate
        epochs = range(math.ceil(needed / count))
        drawn = [np.random.default_rng(stream_seed(self.seed, seed, epoch)).permutation(count) for epoch in epochs]
        return [int(index) for epoch in drawn for index in epoch][:needed]

    def factor(self, step: int) -> float:
        """See :func:`factor`."""
        return factor(step, num_steps=self.num_steps, warmup_steps=self.warmup_steps, schedule=self.schedule)

    def __call__(self, lr: float, seed: int) -> Mapping[str, Any]:
        """Train; stops at a blow-up.

        Args:
            lr: Peak learning rate of the first parameter group.
            seed: From 0.

        Returns:
            ``loss``: final, infinite where the training was stopped or ended so; ``steps`` taken; ``cost`` in
            gradient-equivalents.
        """
        order = self.order(seed)
        judged = range(len(order), len(order) + min(EVALUATED, len(self.batches)))
        # Each step has a batch of its own, and behind them lie those that the end is judged on.
        sequence = self.objective.on([self.batches[i] for i in order] + list(self.batches[:EVALUATED]))
        meter = CostMeter(math.inf)
        tail = {round(self.num_steps * (1 - TAIL * i / (TAIL_POINTS - 1))) for i in range(TAIL_POINTS)}
        finals: list[float] = []
        risen = 0.0
        with self.objective.measuring() as buffers:
            twin = Twin(sequence, self.training, buffers, meter, seed=stream_seed(self.seed, seed))
            for step in range(self.num_steps):
                loss = twin.step(lr * self.factor(step))
                risen = (risen if step % self.window else 0.0) + self._excess(order, step, loss)
                # Not even losses of zero for the rest of the window would bring its mean back below the limit.
                rest = self.window - 1 - step % self.window
                if not math.isfinite(loss) or risen > self.limit * (self.window + rest):
                    return {"loss": math.inf, "steps": step + 1, "cost": meter.spent}
                if step + 1 in tail:
                    finals.append(float(np.mean([twin.loss_at(index, None, 0.0) for index in judged])))
        final = float(np.mean(finals))
        return {"loss": final if math.isfinite(final) else math.inf, "steps": self.num_steps, "cost": meter.spent}

    def _excess(self, order: list[int], step: int, loss: float) -> float:
        """How far the loss of a step lies above that of its batches before training."""
        per_step = self.training.accumulate
        return loss - float(np.mean([self.before[i] for i in order[step * per_step : (step + 1) * per_step]]))


def _digest(objective: Objective, twin: Twin, settings: tuple[Any, ...]) -> str:
    """A name for what is computed: parameters, buffers, batches, optimizer and settings; not the code of the model."""
    groups = [
        sorted((k, repr(v)) for k, v in group.items() if k not in ("params", "lr"))
        for group in twin.optimizer.param_groups
    ]
    optimizer = (type(twin.optimizer).__name__, groups, twin.ratios)
    told = (
        VERSION,
        torch.__version__,
        str(objective.model),
        objective.mode,
        objective.rule.assumed,
        optimizer,
        settings,
    )
    found = hashlib.sha256(repr(told).encode())
    state = [v for held in twin.optimizer.state.values() for v in held.values() if isinstance(v, torch.Tensor)]
    batches = [t for batch in objective.batches for t in tensors_of(batch)]
    for tensor in [*objective.model.parameters(), *objective.model.buffers(), *state, *batches]:
        found.update(repr((tensor.shape, tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
