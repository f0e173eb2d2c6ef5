"""The length of the gradient, as often as it fits: :class:`NormCadence`."""

from __future__ import annotations

import math

import torch

from dyntune.monitor.budget import DISPLACED, TIMED, WINDOW, Budget
from dyntune.monitor.gradients import gradient_norm, own_gradients
from dyntune.monitor.pending import Step, kept_scalar

__all__ = ["NormCadence"]

# Of what a step may cost.
SHARE = 0.25
# A norm that is seen less often tells nothing of spikes, and is left to bursts.
MOST = 16


class NormCadence:
    """Records the length of the gradient at every step, or at every second, third, ... one."""

    def __init__(self) -> None:
        self.every: int | None = None  # None: not between bursts
        self._seconds = 0.0  # that one costs
        self._due = 4 * WINDOW  # step from which on what all steps cost shows what the present cadence does

    def decide(self, seconds: float, permitted: float) -> str | None:
        """How often it is taken from now on.

        Args:
            seconds: That one takes.
            permitted: Seconds that a step may cost.

        Returns:
            What is not seen, and why; None where every step is.
        """
        self._seconds = DISPLACED * seconds
        return self._take(SHARE * permitted)

    def economise(self, budget: Budget) -> str | None:
        """Take it less often, but not never, where what every step costs leaves nothing for measurements.

        Args:
            budget: What steps cost, once they are past the first, which are dearer.

        Returns:
            What is not seen from now on, and why; None where nothing changed.
        """
        if self.every is None or self.every == MOST or budget.steps < self._due:
            return None
        self._due = budget.steps + 2 * WINDOW
        above = budget.always - budget.aimed_always
        return self._take(max(self._seconds / self.every - above, self._seconds / MOST)) if above > 0 else None

    def _take(self, room: float) -> str | None:
        """With so many seconds a step for it."""
        every = math.ceil(self._seconds / room) if room > 0 else MOST + 1
        every += every % TIMED == 0  # else the steps whose hooks are timed would all take one, or none
        self.every = every if every <= MOST else None
        if every <= 1:
            return None
        often = "between bursts" if self.every is None else f"on {every - 1} of {every} steps"
        return (
            f"{often}: it takes {1e6 * self._seconds:.0f} microseconds, and {1e6 * max(room, 0.0):.0f} a step are left "
            "for it"
        )

    def before(self, optimizer: torch.optim.Optimizer, step: Step) -> None:
        """Gradients are there, the step is not made; unscaled, no device synchronisation."""
        if self.every is None or step.number % self.every:
            return
        grads = own_gradients(optimizer)
        if not grads:
            return
        total = gradient_norm(grads)
        scale = getattr(optimizer, "grad_scale", None)
        step.put("grad/norm", kept_scalar(total / scale) if isinstance(scale, torch.Tensor) else total)
