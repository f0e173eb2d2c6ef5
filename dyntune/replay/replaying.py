"""The steps of a window made again on a twin: :func:`replay`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.objective.batches import to_device
from dyntune.objective.context import unwrap
from dyntune.objective.losses import Criterion, LossFunction, LossRule
from dyntune.objective.resolve import resolve_loss
from dyntune.objective.state import own_generators, parameter_slots, preserved_state, swapped
from dyntune.pilot.optimizers import twin_optimizer
from dyntune.replay.changes import UNCHANGED, Change
from dyntune.replay.randomness import set_host_state, set_random_state
from dyntune.replay.ring import Step, Window
from dyntune.replay.snapshot import stepped_parameters

__all__ = ["Recipe", "Replayed", "Stage", "replay", "survey"]


@dataclass(frozen=True)
class Recipe:
    """How the loop made its steps, as far as no hook sees it.

    Args:
        clip_norm: What the global gradient norm is clipped to; None: it is not.
        autocast: Dtype of mixed precision in the forward pass; None: none.
    """

    clip_norm: float | None = None
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Replayed:
    """What came of a window.

    Args:
        change: What was changed.
        steps: Numbers of the steps.
        losses: Before each step; NaN where the change leaves the step out.
        norms: Of the gradient before clipping; likewise.
        updates: By how much each parameter moved over the window, relative to its length.
    """

    change: Change
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    updates: Mapping[str, float]

    def at(self, steps: tuple[int, ...]) -> list[float]:
        """Losses of some of the steps."""
        place = dict(zip(self.steps, self.losses, strict=True))
        return [place[step] for step in steps]


@dataclass(frozen=True)
class Stage:
    """The user's side of a replay; nothing of it is changed.

    Args:
        window: What is made again.
        model: The model, wrapped or not.
        optimizer: What steps it.
        loss_fn: See :func:`dyntune.hessian`.
        criterion: See there.
        recipe: How the loop made its steps.
    """

    window: Window
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFunction | None = None
    criterion: Criterion | None = None
    recipe: Recipe = Recipe()

    def made_by(self, recipe: Recipe) -> Stage:
        """The same with another recipe."""
        return replace(self, recipe=recipe)


def replay(stage: Stage, change: Change = UNCHANGED) -> Replayed:
    """Train a twin from the window's snapshot over its batches, with one change.

    Without a change, and with a recipe that is the loop's, it makes the same steps to the last bit, wherever the
    kernels themselves repeat: the same batches, random states, settings of every group, optimizer state, and the same
    operations in the same order. Hooks on parameters are not called, as they may be the user's bookkeeping.

    Args:
        stage: The window, and the user's model, optimizer and loss.
        change: What is done differently.

    Raises:
        InvalidArgumentError: A step of the window whose batch is not known; an optimizer that cannot be rebuilt.
        OptimizerMismatchError: The optimizer holds parameters that are not the model's.
        AmbiguousLossError: No loss was given and the outputs do not determine one.

    Cost:
        A forward and a backward pass and a step of the optimizer for every step of the window, and a twin: parameters,
        gradient and optimizer state once more.
    """
    with _Twin(stage, change).running() as twin:
        losses, norms = [], []
        for step in stage.window.steps:
            loss, norm = (math.nan, math.nan) if change.skips(step.number) else twin.step(step)
            losses.append(loss)
            norms.append(norm)
        return Replayed(change, _numbers(stage), tuple(losses), tuple(norms), twin.updates())


def survey(stage: Stage) -> Replayed:
    """Losses and gradient norms of every batch of the window at the parameters of its first step.

    What training did to the loss shows on the same batches, with the same dropout masks, without their differences.

    Args:
        stage: See :func:`replay`; the same errors, and the same cost but for the steps of the optimizer.
    """
    with _Twin(stage, UNCHANGED).running() as twin:
        found = [twin.look(step) for step in stage.window.steps]
    losses, norms = zip(*found, strict=True)
    return Replayed(UNCHANGED, _numbers(stage), losses, norms, {})


def _numbers(stage: Stage) -> tuple[int, ...]:
    return tuple(step.number for step in stage.window.steps)


class _Twin:
    def __init__(self, stage: Stage, change: Change) -> None:
        self.stage, self.change = stage, change
        window, snapshot = stage.window, stage.window.snapshot
        unknown = [step.number for step in window.steps if len(step.batches) < window.accumulate]
        if unknown:
            raise InvalidArgumentError(
                f"the batch of step {unknown[0]} is not known, so it cannot be made again: iterate over "
                "monitor.watch(loader), or call monitor.observe(loss, batch=batch) once a step."
            )
        self.model = unwrap(stage.model)
        originals = stepped_parameters(self.model, stage.optimizer)
        gone = [name for name in originals if name not in snapshot.parameters]
        if gone:
            raise InvalidArgumentError(
                f"the optimizer did not hold parameter {gone[0]!r} when the snapshot was taken: the window cannot be "
                "made again."
            )
        self.device = next(iter(originals.values())).device
        self.parameters = {name: snapshot.parameter(name, p).detach().requires_grad_() for name, p in originals.items()}
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = twin_optimizer(stage.optimizer, originals, self.parameters)
        self.optimizer.state.clear()
        for name, p in originals.items():
            moments = snapshot.moments(name, p, stage.optimizer.state.get(p, {}))
            if moments:
                self.optimizer.state[self.parameters[name]] = moments
        change.begin(self.optimizer.state)
        self.identities = {id(p): name for name, p in originals.items()}
        self.slots = parameter_slots(self.model, originals.values())
        self.generators = own_generators(self.model)
        self.autocast = None if change.full_precision else stage.recipe.autocast
        self.rule: LossRule

    @contextmanager
    def running(self) -> Iterator[_Twin]:
        """The scope of its steps: the snapshot's buffers in the place of the user's, which come back at the end."""
        snapshot, first = self.stage.window.snapshot, self.stage.window.steps[0].batches[0]
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            preserved_state(self.model, others=True),
            swapped([slot for slots in self.slots for slot in slots], self._stand_ins()),
        ):
            self.rule = resolve_loss(
                self.model, to_device(first, self.device), self.stage.loss_fn, self.stage.criterion
            )
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    if name in snapshot.buffers:
                        buffer.copy_(snapshot.buffers[name])
            if snapshot.host is not None:
                set_host_state(snapshot.host)
            yield self

    def _stand_ins(self) -> list[torch.Tensor]:
        tensors = self.parameters.values()
        return [tensor for tensor, slots in zip(tensors, self.slots, strict=True) for _ in slots]

    def step(self, step: Step) -> tuple[float, float]:
        """Make a step; its loss and the norm of its gradient."""
        loss = self._gradient(step)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if self.stage.recipe.clip_norm is not None and gradients:
            nn.utils.clip_grad_norm_(list(self.parameters.values()), self.stage.recipe.clip_norm)
        self.change.gradients(self.parameters)
        first = self.stage.window.steps[0].settings
        for index, group in enumerate(self.optimizer.param_groups):
            settings = {k: _own(v) for k, v in step.settings[index].items()}
            self.change.settings(index, settings, first[index])
            group.update(settings)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def look(self, step: Step) -> tuple[float, float]:
        """Loss and norm of the gradient of a step's batches, without the step; buffers stay what they were."""
        before = [buffer.detach().clone() for buffer in self.model.buffers()]
        loss = self._gradient(step)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, old in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(old)
        return loss, norm

    def _gradient(self, step: Step) -> float:
        """Forward and backward passes over the step's batches; those that a scaler skipped, forward only."""
        parts = self.stage.window.accumulate
        frozen = {self.identities[key] for key in step.frozen if key in self.identities}
        for name, p in self.parameters.items():
            p.requires_grad_(name not in frozen)
        trained = [p for p in self.parameters.values() if p.requires_grad]
        skipped = len(step.batches) - parts
        losses = []
        scale = None if self.autocast is None else step.scale
        for index, (batch, randomness) in enumerate(zip(step.batches, step.randomness, strict=True)):
            set_random_state(randomness, self.generators)
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                loss = self.rule.evaluate(self.model, to_device(batch, self.device)).value
            if index < skipped:
                continue
            losses.append(loss.detach())
            part = loss / parts if parts > 1 else loss
            part = part if scale is None else part * scale
            if part.requires_grad and trained:
                part.backward(inputs=trained)  # type: ignore[no-untyped-call]
        if scale is not None:
            inverse = scale.double().reciprocal().float()
            for p in self.parameters.values():
                if p.grad is not None:
                    p.grad.mul_(inverse)
        return sum(map(float, losses)) / len(losses)

    @torch.no_grad()
    def updates(self) -> dict[str, float]:
        """By how much each parameter moved, relative to its length at the start (1 where that is zero)."""
        found = {}
        for name, p in self.parameters.items():
            length = float(self.start[name].norm()) or 1.0
            found[name] = float((p - self.start[name]).norm()) / length
        return found


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
