"""What can be changed in a replay, from the smallest change to the largest: :class:`Change` and its kinds.

Smaller is what leaves more of a healthy training as it is: one batch of many left out, then settings that a healthy
training hardly feels, then those that slow it down. The order is a convention, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from dyntune.records import short_number

__all__ = [
    "UNCHANGED",
    "Beta2",
    "Change",
    "Clip",
    "Drop",
    "Eps",
    "Freeze",
    "FreshMoments",
    "FullPrecision",
    "GroupLr",
    "NoDecay",
    "ScaleLr",
    "SettingsHeld",
]

Settings = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """Nothing: a replay with it has to be the training itself.

    Attributes:
        size: Place in the order; of two changes that avert an alarm, the smaller one is the cause.
        cause: What is wrong if it averts the alarm, in the words of the detectors.
        title: The name, with fields in braces.
        full_precision: Whether mixed precision is left out.
    """

    size: ClassVar[int] = 0
    cause: ClassVar[str] = ""
    title: ClassVar[str] = "nothing changed"
    full_precision: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """For a reader."""
        fields = {key: short_number(value) if isinstance(value, float) else value for key, value in vars(self).items()}
        return self.title.format(**fields)

    @property
    def where(self) -> tuple[str, ...]:
        """Parameters that it is about; empty: all of them, or none."""
        return ()

    def skips(self, _step: int, /) -> bool:
        """Whether a step is left out, forward pass and all."""
        return False

    def begin(self, state: dict[torch.Tensor, Settings]) -> None:
        """Before the first step: the optimizer's state, in place."""

    def settings(self, index: int, present: Settings, first: Settings, /) -> None:
        """Before every step: a group's settings, in place; `first` are those of the window's first step."""

    def gradients(self, parameters: dict[str, torch.Tensor]) -> None:
        """Before every step, after clipping."""


UNCHANGED = Change()


@dataclass(frozen=True)
class FullPrecision(Change):
    """Without autocast and loss scaling."""

    size, cause, title = 1, "not finite", "full precision"
    full_precision = True


@dataclass(frozen=True)
class Drop(Change):
    """Some steps left out with their batches."""

    steps: frozenset[int]
    size, cause = 2, "bad batches"

    @property
    def name(self) -> str:
        """See :class:`Change`."""
        listed = ", ".join(map(str, sorted(self.steps)[:4])) + (", ..." if len(self.steps) > 4 else "")
        return f"batch of step {listed} left out" if len(self.steps) == 1 else f"batches of steps {listed} left out"

    def skips(self, step: int, /) -> bool:
        """See :class:`Change`."""
        return step in self.steps


@dataclass(frozen=True)
class SettingsHeld(Change):
    """Learning rates as they were at the window's first step."""

    size, cause, title = 3, "lr too high", "learning rate held where it was"

    def settings(self, _index: int, present: Settings, first: Settings, /) -> None:
        """See :class:`Change`."""
        present["lr"] = first["lr"]


@dataclass(frozen=True)
class NoDecay(Change):
    """One group without weight decay."""

    group: int
    where: tuple[str, ...] = field(default=(), repr=False)
    size, cause, title = 4, "wrong weight decay of a group", "no weight decay in group {group}"

    def settings(self, index: int, present: Settings, _first: Settings, /) -> None:
        """See :class:`Change`."""
        if index == self.group:
            present["weight_decay"] = 0.0


@dataclass(frozen=True)
class Beta2(Change):
    """Another memory of the second moment; a shorter one means that it was stale, a longer one that it was noisy."""

    beta2: float
    shorter: bool
    size, title = 5, "beta2 = {beta2}"

    @property
    def cause(self) -> str:  # type: ignore[override]
        """See :class:`Change`."""
        return "stale second moment" if self.shorter else "beta2 too small"

    def settings(self, _index: int, present: Settings, _first: Settings, /) -> None:
        """See :class:`Change`."""
        if "betas" in present:
            present["betas"] = (present["betas"][0], self.beta2)
        elif "alpha" in present:
            present["alpha"] = self.beta2


@dataclass(frozen=True)
class FreshMoments(Change):
    """The optimizer's state forgotten at the window's start."""

    size, cause, title = 6, "stale second moment", "optimizer state begun afresh"

    def begin(self, state: dict[torch.Tensor, Settings]) -> None:
        """See :class:`Change`."""
        state.clear()


@dataclass(frozen=True)
class Eps(Change):
    """A larger eps: entries whose second moment has died away no longer take whole steps."""

    eps: float
    size, cause, title = 7, "stale second moment", "eps = {eps}"

    def settings(self, _index: int, present: Settings, _first: Settings, /) -> None:
        """See :class:`Change`."""
        present["eps"] = self.eps


@dataclass(frozen=True)
class GroupLr(Change):
    """The learning rate of one group divided."""

    group: int
    divisor: float
    where: tuple[str, ...] = field(default=(), repr=False)
    size, cause, title = 8, "wrong lr of a group", "learning rate of group {group} / {divisor}"

    def settings(self, index: int, present: Settings, _first: Settings, /) -> None:
        """See :class:`Change`."""
        if index == self.group:
            present["lr"] = present["lr"] / self.divisor


@dataclass(frozen=True)
class Freeze(Change):
    """One layer not trained."""

    layer: str
    names: tuple[str, ...] = field(repr=False)
    size, cause, title = 9, "exploding gradients", "{layer} frozen"

    @property
    def where(self) -> tuple[str, ...]:
        """See :class:`Change`."""
        return self.names

    def gradients(self, parameters: dict[str, torch.Tensor]) -> None:
        """See :class:`Change`."""
        for name in self.names:
            parameters[name].grad = None


@dataclass(frozen=True)
class Clip(Change):
    """The whole gradient clipped."""

    norm: float
    size, cause, title = 10, "exploding gradients", "gradient norm clipped at {norm}"

    def gradients(self, parameters: dict[str, torch.Tensor]) -> None:
        """See :class:`Change`."""
        nn.utils.clip_grad_norm_([p for p in parameters.values() if p.grad is not None], self.norm)


@dataclass(frozen=True)
class ScaleLr(Change):
    """All learning rates divided."""

    divisor: float
    cause, title = "lr too high", "learning rate / {divisor}"

    @property
    def size(self) -> int:  # type: ignore[override]
        """See :class:`Change`: 11 for two, 12 for four, and so on."""
        return 10 + max(1, round(self.divisor).bit_length() - 1)

    def settings(self, _index: int, present: Settings, _first: Settings, /) -> None:
        """See :class:`Change`."""
        present["lr"] = present["lr"] / self.divisor
