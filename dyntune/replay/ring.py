"""The last steps of a training, kept so that they can be made again: :class:`Ring` and :class:`Window`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.objective.batches import map_tensors, tensors_of
from dyntune.objective.context import unwrap
from dyntune.objective.dtensor import is_distributed_tensor
from dyntune.objective.state import own_generators
from dyntune.replay.randomness import RandomState, random_state
from dyntune.replay.snapshot import Snapshot, num_bytes, stepped_parameters

__all__ = ["Ring", "Step", "Window"]

Number: TypeAlias = "float | torch.Tensor"

# A window of 8 steps has a tail of 4, the fewest whose median one outlier does not move beyond the others.
MIN_LENGTH = 8
# Losses before the window that its noise is measured by: eight windows of 64 steps, each an outcome of health.
HISTORY = 512
# Steps between two gradient norms that are recorded, and how many are kept: they tell of clipping.
NORM_EVERY, NUM_NORMS = 32, 32
# While an alarm is waited for, steps are kept beyond the ring's length, to twice that; then the ring goes on.
HELD = 2
# Snapshots' worth of memory that a replay takes: parameters and state of a twin, where it started, and a gradient.
TWIN = 2


@dataclass
class Step:
    """What one optimizer step was made from.

    Args:
        number: Of the step.
        batches: One, or several whose gradients add up; copies.
        randomness: Random state before each batch's forward pass.
        settings: Of every parameter group when the step was made.
        frozen: Identities of the optimizer's parameters that did not require a gradient.
        scale: Of the loss, by a gradient scaler; None without one.
        losses: As the training loop told them; numbers, or tensors that are read later.
        before: Random state at the end of the step before, where no fetch tells that of the forward pass.
    """

    number: int
    batches: list[Any] = field(default_factory=list)
    randomness: list[RandomState] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    frozen: frozenset[int] = frozenset()
    scale: torch.Tensor | None = None
    losses: list[Number] = field(default_factory=list)
    before: RandomState | None = None

    @property
    def loss(self) -> float | None:
        """Mean of what was told; None if nothing was."""
        return sum(map(float, self.losses)) / len(self.losses) if self.losses else None

    @property
    def num_bytes(self) -> int:
        """Of the batches and the random states."""
        return num_bytes(t for batch in self.batches for t in tensors_of(batch)) + sum(
            num_bytes((state.cpu, *state.cuda)) for state in self.randomness
        )


@dataclass(frozen=True)
class Window:
    """The part of a training that can be made again.

    Args:
        snapshot: Where it begins.
        steps: Every step made since, in order.
        history: Losses of the steps before, in order; NaN where none was told.
        norms: Of gradients as the optimizer took them, of some steps in and before the window.
        accumulate: Batches per step.
    """

    snapshot: Snapshot
    steps: tuple[Step, ...]
    history: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    accumulate: int = 1


class Ring:
    """Two snapshots, the older between half a ring and a ring of steps old, and every batch since.

    It has hooks to be called, and installs none: :meth:`fetched` before a forward pass, :meth:`before_step` and
    :meth:`after_step` around the optimizer's step, :meth:`observed` with the loss. Snapshots are taken after a step:
    before it, BatchNorm has seen a batch already that the replay is to begin with. Where the ring cannot be kept,
    :attr:`refusal` says why and the hooks do nothing.

    Args:
        model: The model.
        optimizer: What steps it.
        length: Steps, at least 8; the older snapshot is at most that old.
        device: Where snapshots are kept: with the ``"parameters"``, or in ``"cpu"`` memory.
        memory_share: Share of the memory that is free now which the ring and a twin may take, in (0, 1].
        accumulate: Batches per step.
        scaler: A gradient scaler.
        number: Of the first step.

    Raises:
        InvalidArgumentError: An argument out of range.

    Attributes:
        refusal: Why nothing is kept; None where the ring is kept.

    Cost:
        Memory: two copies of parameters, buffers and optimizer state, and the batches of up to `length` steps. Time: a
        copy of each batch, a few dictionaries, and one pass over the state every ``length / 2`` steps.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ring = Ring(model, optimizer, length=8)
        >>> for _ in range(20):
        ...     batch = torch.ones(3, 2)
        ...     ring.fetched(batch)
        ...     loss = model(batch).square().mean()
        ...     loss.backward()
        ...     ring.before_step(optimizer)
        ...     optimizer.step()
        ...     ring.after_step()
        ...     optimizer.zero_grad()
        ...     ring.observed(loss)
        >>> window = ring.window()
        >>> 4 <= len(window.steps) <= 8, window.steps[-1].number
        (True, 19)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        length: int = 64,
        device: Literal["parameters", "cpu"] = "parameters",
        memory_share: float = 0.25,
        accumulate: int = 1,
        scaler: Any = None,
        number: int = 0,
    ) -> None:
        if length < MIN_LENGTH:
            raise InvalidArgumentError(f"replay={length}: a window of fewer than {MIN_LENGTH} steps shows no outcome.")
        if not 0 < memory_share <= 1:
            raise InvalidArgumentError(f"memory_share={memory_share}: a share of the free memory lies in (0, 1].")
        if device not in ("parameters", "cpu"):
            raise InvalidArgumentError(
                f"device={device!r}: snapshots are kept with the 'parameters' or in 'cpu' memory."
            )
        self.model, self.length, self.accumulate, self.scaler = unwrap(model), length, accumulate, scaler
        self.refusal = _refusal(self.model, optimizer)
        self._limit = memory_share * _free_bytes(_device_of(self.model) if device == "parameters" else None)
        self._snapshots = [Snapshot(in_memory=device == "cpu") for _ in range(2)]  # the older first
        self._generators = own_generators(self.model)
        self._optimizer = optimizer
        self._steps: deque[Step] = deque()
        self._history: deque[list[Number]] = deque(maxlen=HISTORY)
        self._norms: deque[torch.Tensor] = deque(maxlen=NUM_NORMS)
        self._open = Step(number)
        self._last: Step | None = None
        self._bytes = 0
        self._fetching = self._held = False
        if self.refusal is None:
            self._check_memory(0)

    # -- what the training tells ---------------------------------------------------------------------------------------

    def fetched(self, batch: Any) -> None:
        """A batch goes to the training loop; its forward pass comes next."""
        if self.refusal is not None:
            return
        self._fetching = True
        if self._snapshots[1].step is None and not self._open.batches:
            self._take(self._open.number)
        self._keep(self._open, batch, random_state(self._generators))

    def forward_begins(self) -> None:
        """A forward pass comes next, of a batch that is told after it."""
        if self.refusal is None:
            self._open.before = random_state(self._generators)

    def observed(self, loss: Any = None, batch: Any = None) -> None:
        """The loop tells a loss, before its step or after; without :meth:`fetched`, its batch, too."""
        if self.refusal is not None:
            return
        step = self._target()
        if batch is not None and not self._fetching and step.before is not None:
            self._keep(step, batch, step.before)
            if self.accumulate > 1:  # the next batch's forward pass begins where this one's has ended
                step.before = random_state(self._generators)
        if loss is not None:
            step.losses.append(_number(loss))

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are there, the step is not made."""
        if self.refusal is not None:
            return
        step = self._open
        step.settings = [_settings(group) for group in optimizer.param_groups]
        step.frozen = frozenset(
            id(p) for group in optimizer.param_groups for p in group["params"] if not p.requires_grad
        )
        scale = getattr(self.scaler, "_scale", None)
        if isinstance(scale, torch.Tensor):
            step.scale = scale.detach().clone()
        if step.number % NORM_EVERY == 0:
            self._norms.append(_norm(optimizer))

    def after_step(self) -> None:
        """The step is made."""
        if self.refusal is not None:
            return
        step = self._open
        self._history.append(step.losses)
        if self._snapshots[1].step is not None:
            self._steps.append(step)
        self._open, self._last = Step(step.number + 1), step
        newest = self._snapshots[1].step
        if not self._held and (newest is None or self._open.number - newest >= self.length // 2):
            self._take(self._open.number)
        if len(self._steps) > HELD * self.length:
            self.release()
        if not self._fetching:
            self._open.before = random_state(self._generators)

    # -- after an alarm ------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Keep the older snapshot until :meth:`release`: what follows an alarm shows what it did."""
        self._held = True

    def release(self) -> None:
        """Go on; a ring that was held for twice its length does so by itself."""
        self._held = False

    @property
    def number(self) -> int:
        """Of the next step."""
        return self._open.number

    @property
    def num_bytes(self) -> int:
        """What is kept at present: snapshots and batches."""
        return sum(snapshot.num_bytes for snapshot in self._snapshots) + self._bytes

    def window(self) -> Window | None:
        """From the oldest snapshot to the last step; None before there is a step. What it holds is not copied."""
        snapshot = next((s for s in self._snapshots if s.step is not None), None)
        if self.refusal is not None or snapshot is None or snapshot.step is None:
            return None
        steps = tuple(step for step in self._steps if step.number >= snapshot.step)
        if not steps:
            return None
        before = list(self._history)[: -len(steps)]
        history = tuple(sum(map(float, told)) / len(told) if told else float("nan") for told in before)
        return Window(snapshot, steps, history, tuple(map(float, self._norms)), self.accumulate)

    # -- keeping -------------------------------------------------------------------------------------------------------

    def _target(self) -> Step:
        """The step that a loss is of: the open one if its batch is known, else the last if that has none yet."""
        last = self._last
        if self._open.batches or last is None or (last.losses and not self._fetching):
            return self._open
        return last

    def _keep(self, step: Step, batch: Any, randomness: RandomState) -> None:
        # Loaders and in-place augmentations write to the same memory again.
        step.batches.append(map_tensors(batch, lambda tensor: tensor.detach().clone()))
        step.randomness.append(randomness)
        added = num_bytes(tensors_of(batch)) + num_bytes((randomness.cpu, *randomness.cuda))
        self._bytes += added
        if self._bytes > self._limit:
            self._check_memory(0)

    def _take(self, number: int) -> None:
        older = self._snapshots[0]
        older.take(number, self.model, self._optimizer)
        self._snapshots.reverse()
        first = self._snapshots[0].step
        while first is not None and self._steps and self._steps[0].number < first:
            self._bytes -= self._steps.popleft().num_bytes
        steps = len(self._steps)
        self._check_memory(self._bytes * self.length // steps if steps else 0)

    def _check_memory(self, batches: int) -> None:
        """Refuse where snapshots, a twin and the batches of a whole ring take more than the share of free memory."""
        one = max(num_bytes(stepped_parameters(self.model, self._optimizer).values()), self._snapshots[1].num_bytes)
        need = (2 + TWIN) * one + max(batches, self._bytes)
        if need > self._limit:
            self.refusal = (
                f"memory is short: {self.length} steps would take {need / 2**20:.3g} MiB, and a ring may take "
                f"{self._limit / 2**20:.3g} of what is free. Give a smaller replay=K, or free memory before."
            )
            self._snapshots = [Snapshot(), Snapshot()]
            self._steps.clear()
            self._history.clear()
            self._open, self._bytes = Step(self._open.number), 0


def _number(loss: Any) -> Number:
    """As it is now; of a device, a copy that stays there and is read after an alarm."""
    if isinstance(loss, torch.Tensor):
        return float(loss.item()) if loss.is_cpu else loss.detach().clone()
    return float(loss)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters; a learning rate that is a tensor is written to in place."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}


def _norm(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    dense = [g if g.layout == torch.strided else g.coalesce().values() for g in gradients]
    return nn.utils.get_total_norm(dense)


def _device_of(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters()), None)


def _free_bytes(device: torch.device | None) -> float:
    """Memory that is free where snapshots go; infinite where nobody says."""
    if device is not None and device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * float(found[0]) if found else float("inf")


def _refusal(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Why the steps of this training cannot be made again; None where they can."""
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    if initialised and torch.distributed.get_world_size() > 1:
        return "gradients are averaged over processes, and a replay runs on one"
    if any(is_distributed_tensor(p) for p in model.parameters()):
        return "the parameters are sharded, and a replay runs on one process"
    if isinstance(optimizer, torch.optim.LBFGS):
        return "L-BFGS evaluates its closure several times within a step, at points that no hook sees"
    if not stepped_parameters(model, optimizer):
        return "the optimizer steps none of the model's trainable parameters"
    return None


def losses_of(steps: Sequence[Step]) -> list[float]:
    """As they were told; NaN where none was, infinite where it was NaN."""
    told = [step.loss for step in steps]
    return [math.nan if loss is None else math.inf if math.isnan(loss) else loss for loss in told]
