"""The length of the gradient, as often as it fits: :class:`NormCadence`."""

from __future__ import annotations

import math

import torch

from dyntune.monitor.budget import DISPLACED
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

    def decide(self, seconds: float, permitted: float) -> str | None:
        """How often it is taken from now on.

        Args:
            seconds: That one takes.
            permitted: Seconds that a step may cost.

        Returns:
            What is not seen, and why; None where every step is.
        """
        seconds *= DISPLACED
        room = SHARE * permitted
        every = math.ceil(seconds / room) if room > 0 else MOST + 1
        self.every = every if every <= MOST else None
        if every <= 1:
            return None
        often = "between bursts" if self.every is None else f"on {every - 1} of {every} steps"
        return f"{often}: it takes {1e6 * seconds:.0f} microseconds, and {1e6 * room:.0f} a step are allowed"

    def before(self, optimizer: torch.optim.Optimizer, step: Step) -> None:
        """Gradients are there, the step is not made; unscaled, no device synchronisation."""
        if self.every is None or step.number % self.every:
            return
        grads = own_gradients(optimizer)
        if not grads:
            return
        total = gradient_norm(grads)
        scale = getattr(optimizer, "grad_scale", None)
        step.put("grad/norm", kept_scalar(total / scale if isinstance(scale, torch.Tensor) else total))
