"""A twin of the user's training: the same model function, cloned parameters, a rebuilt optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dyntune.numerics.random import stream_seed
from dyntune.numerics.vectors import Vector
from dyntune.objective.objective import Objective, differentiate
from dyntune.objective.state import BorrowedBuffers
from dyntune.pilot.optimizers import OptimizerLike, twin_optimizer
from dyntune.stability.scales import diagonal_scale, group_ratios

__all__ = ["CostMeter", "Training", "Twin"]

# Gradient-equivalents: a backward pass costs about two forward passes.
FORWARD_COST = 1 / 3
GRADIENT_COST = 1.0


class CostMeter:
    """Counts gradient-equivalents: one forward and backward pass on one training batch."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.spent = 0.0

    def charge(self, cost: float) -> None:
        """Add to what was spent."""
        self.spent += cost

    @property
    def left(self) -> float:
        """What may still be spent."""
        return self.limit - self.spent


@dataclass(frozen=True)
class Training:
    """How the user trains, as far as it changes which learning rates are stable.

    Args:
        optimizer: A name, an Optimizer, or a factory.
        clip_norm: Gradient norm that steps are clipped to; None for none.
        accumulate: Batches whose gradients are averaged per step.
        autocast: Dtype of mixed precision in the forward pass; None for none.
    """

    optimizer: OptimizerLike
    clip_norm: float | None = None
    accumulate: int = 1
    autocast: torch.dtype | None = None


class Twin:
    """Cloned parameters with an optimizer, stepped on an objective's batches.

    Live only inside ``objective.measuring()``, whose borrowed buffers it writes to: BatchNorm statistics move along
    with the twin and never reach the user's model.

    Args:
        objective: The user's loss; its parameters are read once, here.
        training: How steps are made.
        buffers: Of the enclosing ``measuring()``.
        meter: Where costs go.
        seed: Seed of dropout during the steps.
    """

    def __init__(
        self, objective: Objective, training: Training, buffers: BorrowedBuffers, meter: CostMeter, *, seed: int
    ) -> None:
        self.objective = objective
        self.training = training
        self.buffers = buffers
        self.meter = meter
        self.seed = seed
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in objective.parameters.items()}
        self.optimizer = twin_optimizer(training.optimizer, objective.parameters, self.parameters)
        # Ratios between groups are the user's choice and are kept; the first group's rate is the one that is set.
        self.ratios = group_ratios(self.optimizer)
        self.steps = 0

    @property
    def typical_ratio(self) -> float:
        """Geometric mean over parameters of their learning rate relative to the first group's; zeros left out."""
        logs = sizes = 0.0
        for group, ratio in zip(self.optimizer.param_groups, self.ratios, strict=True):
            size = sum(p.numel() for p in group["params"]) if ratio > 0 else 0
            logs += size * math.log(ratio or 1.0)
            sizes += size
        return math.exp(logs / sizes) if sizes else 1.0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The cloned parameters, in order."""
        return list(self.parameters.values())

    def set_lr(self, lr: float) -> None:
        """Set the first group's learning rate, the others in proportion."""
        for group, ratio in zip(self.optimizer.param_groups, self.ratios, strict=True):
            rate = lr * ratio
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], torch.Tensor) else rate

    def gradient(self, index: int) -> tuple[float, Vector]:
        """Loss and gradient on one batch, as training computes them."""
        self.meter.charge(GRADIENT_COST)
        seed = stream_seed(self.seed, self.steps, index)
        with self.objective.training_pass(index, self.parameters, autocast=self.training.autocast, seed=seed) as loss:
            return float(loss.value.detach()), differentiate(loss.value, self.tensors)

    def step(self, lr: float) -> float:
        """One optimizer step at `lr`; returns the loss before it (NaN or inf are returned, not raised)."""
        count = len(self.objective.batches)
        losses = []
        total: Vector = []
        for micro in range(self.training.accumulate):
            loss, gradient = self.gradient((self.steps * self.training.accumulate + micro) % count)
            losses.append(loss)
            if total:
                torch._foreach_add_(total, gradient)
            else:
                total = gradient
        if self.training.accumulate > 1:
            torch._foreach_div_(total, self.training.accumulate)
        for p, g in zip(self.tensors, total, strict=True):
            p.grad = g
        if self.training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.tensors, self.training.clip_norm)
        self.set_lr(lr)
        self.optimizer.step()
        self.steps += 1
        return sum(losses) / len(losses)

    def loss_at(self, index: int, direction: Sequence[torch.Tensor] | None, lr: float) -> float:
        """Loss on one batch after moving by ``-lr * direction`` (or where the twin is)."""
        self.meter.charge(FORWARD_COST)
        moved = {name: p.detach() for name, p in self.parameters.items()}
        if direction is not None:
            moved = {name: torch.sub(p, d, alpha=lr) for (name, p), d in zip(moved.items(), direction, strict=True)}
        seed = stream_seed(self.seed, index)
        with (
            torch.no_grad(),
            self.objective.training_pass(index, moved, autocast=self.training.autocast, seed=seed) as loss,
        ):
            return float(loss.value)

    def preconditioner(self) -> Vector | None:
        """Diagonal P of the optimizer's step, learning-rate ratios included; None where it is the identity.

        In the steady state: without the factor ``1 - beta1^t`` of momentum's bias correction.
        """
        return diagonal_scale(self.optimizer, self.tensors, ratios=self.ratios)

    @property
    def stepped(self) -> bool:
        """Whether the optimizer has a state to read a preconditioner from."""
        return bool(self.optimizer.state)
