"""Faults whose severity is their size: values that are not finite, frozen and disconnected parameters."""

from __future__ import annotations

import math

import torch

from benchmarks.faults.fault import Fault, regroup
from benchmarks.faults.parts import below, hidden, on_output, parameters_of, spine
from benchmarks.faults.training import Training
from dyntune.monitor.alerts import Cause


class NanLog(Fault):
    """The logarithm of a number that is not positive in one layer.

    Severe: at every step. Medium and mild: at one step in 10 and in 100, in a loop that replaces the gradients that
    are not finite by zero, as many do, so that the weights survive.
    """

    family, cause, unit = "nan-log", Cause.NON_FINITE, "share of steps"
    mid_run, judged = True, "size"
    sizes = (0.01, 0.1, 1.0)

    def build(self, run: Training) -> None:
        self.fires = False
        run.sanitises = self.strength < 1.0
        layers = spine(run.model)
        name, module = layers[self.seed % len(layers)]
        self.where = parameters_of([(name, module)])
        on_output(module, lambda out: self.corrupted(out) if self.fires else out)

    def before(self, run: Training) -> None:
        every = round(1 / self.strength)
        self.fires = (run.step - self.onset) % every == 0

    def corrupted(self, out: torch.Tensor) -> torch.Tensor:
        return out + torch.log(-out.abs())


class HalfOverflow(NanLog):
    """Half precision overflows in one layer: infinite, and NaN where two of them meet."""

    family = "half-overflow"

    def corrupted(self, out: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(torch.float16).max
        scale = largest / out.detach().abs().median().clamp_min(1e-6)  # half of the entries overflow
        return (out * scale).half().float() / scale


class NanBackward(NanLog):
    """The square root's derivative at zero in one layer: the loss is finite, the gradient below is not."""

    family = "nan-backward"

    def corrupted(self, out: torch.Tensor) -> torch.Tensor:
        return out + torch.sqrt(0.0 * out)


class Frozen(Fault):
    """`requires_grad` is off for layers from the onset on, until a share of the hidden parameters is frozen."""

    family, cause, unit = "frozen", Cause.FROZEN, "share of the hidden parameters, rounded up to whole layers"
    mid_run, judged = True, "size"

    def build(self, run: Training) -> None:
        layers = sorted(hidden(run.model), key=lambda item: sum(p.numel() for p in item[1].parameters()))
        total, chosen = sum(p.numel() for _, module in layers for p in module.parameters()), []
        frozen = 0
        for item in layers:
            if frozen >= self.strength * total - 1e-6:
                break
            chosen.append(item)
            frozen += sum(p.numel() for p in item[1].parameters())
        self.where = parameters_of(chosen)

    def begin(self, run: Training) -> None:
        for name in self.where:
            parameter = run.model.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None


class NotInOptimizer(Frozen):
    """The optimizer was never given these layers; they have gradients, and stay as they were initialised."""

    family, mid_run = "not-in-optimizer", False

    def build(self, run: Training) -> None:
        super().build(run)
        regroup(run, self.where)
        del run.optimizer.param_groups[1]
        del run.base_lrs[1]

    def begin(self, run: Training) -> None: ...


class Detached(Fault):
    """A `detach()` on the way: nothing below has a gradient. Which layer: by the share of those there are."""

    family, cause, unit = "detached", Cause.DISCONNECTED, "how far up, as a share of the layers"
    judged = "size"

    def build(self, run: Training) -> None:
        layers = spine(run.model)
        index = math.ceil(self.strength * len(layers) - 1e-6) - 1
        self.where = below(run.model, index)
        on_output(layers[index][1], lambda out: out.detach() if self.is_on(run) else out)


class DetachedOnset(Detached):
    """The same from an onset on."""

    family, mid_run = "detached-onset", True


FAMILIES: list[type[Fault]] = [NanLog, HalfOverflow, NanBackward, Frozen, NotInOptimizer, Detached, DetachedOnset]
