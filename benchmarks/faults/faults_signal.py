"""Faults of the signal through the network, forwards and backwards."""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.faults.fault import Fault
from benchmarks.faults.parts import below, head, hidden, on_output, parameters_of, spine, weights
from benchmarks.faults.training import Training
from dyntune.monitor.alerts import Cause

DEAD_BIAS = 30.0  # standard deviations below zero at initialisation: no input of the data reaches over it
LARGEST_FACTOR = 1e6  # of what grows at every step: beyond lies overflow, which is another fault


class TinyInit(Fault):
    """Hidden weights start too small: each layer divides signal and gradient once more."""

    family, cause, unit = "tiny-init", Cause.VANISHING, "divisor of all hidden weights at the start"
    architectures = ("mlp", "cnn", "gru")
    weakest, strongest = 2.0, 1e4

    @torch.no_grad()
    def build(self, run: Training) -> None:
        self.where = parameters_of(hidden(run.model))
        for _, module in hidden(run.model):
            for parameter in module.parameters():
                parameter.div_(self.strength)


class Saturation(Fault):
    """A saturating function with too large a gain on the way: its derivative stops the gradient for all below."""

    family, cause, unit = "saturation", Cause.VANISHING, "gain before a tanh"
    weakest, strongest = 3.0, 1e5

    def build(self, run: Training) -> None:
        last = len(spine(run.model)) - 1
        self.where = below(run.model, last)
        on_output(spine(run.model)[last][1], lambda out: torch.tanh(self.strength * out))


class InitGain(Fault):
    """Hidden weights start too large."""

    family, cause, unit = "init-gain", Cause.EXPLODING, "factor on all hidden weights at the start"
    weakest, strongest = 1.5, 300.0

    @torch.no_grad()
    def build(self, run: Training) -> None:
        self.where = parameters_of(hidden(run.model))
        for _, module in hidden(run.model):
            for parameter in weights(module):
                parameter.mul_(self.strength)


class GainOnset(Fault):
    """A layer's output grows by a factor: a normalisation that was switched off. The gradient grows with it."""

    family, cause, unit = "gain-onset", Cause.EXPLODING, "factor on the output of one layer"
    mid_run = True
    weakest, strongest = 2.0, 1e5

    def build(self, run: Training) -> None:
        layers = spine(run.model)
        name, module = layers[self.seed % len(layers)]
        self.where = parameters_of([(name, module)])
        on_output(module, lambda out: out * self.strength if self.is_on(run) else out)


def _push(module: nn.Module, amount: float, units: torch.Tensor | slice = slice(None)) -> None:
    """Shift the biases of units so that they do not answer any more; of a GRU, so that they keep their state."""
    with torch.no_grad():
        if isinstance(module, nn.GRU):  # gates are stacked as reset, update, new; update -> 1 keeps the old state
            bias, width = module.bias_ih_l0, module.hidden_size
            bias[width : 2 * width][units] += amount
        else:
            bias = module.bias
            assert isinstance(bias, torch.Tensor)
            bias[units] -= amount


def _answering(run: Training) -> list[tuple[str, nn.Module]]:
    """Layers followed by an activation that can go silent."""
    if run.workload.architecture == "transformer":
        return [(name, module) for name, module in hidden(run.model) if name.endswith("mlp.0")]
    return [(name, module) for name, module in hidden(run.model) if not isinstance(module, nn.Embedding)]


def _width(module: nn.Module) -> int:
    if isinstance(module, nn.GRU):
        return module.hidden_size
    assert isinstance(module, nn.Linear | nn.Conv2d)
    return module.weight.shape[0]


class DeadUnits(Fault):
    """Biases that start far below zero: units that no input switches on."""

    family, cause, unit = "dead-units", Cause.DEAD_UNITS, "how far the biases of all hidden units are shifted"
    weakest, strongest = 0.1, 100.0

    def build(self, run: Training) -> None:
        layers = _answering(run)
        self.where = parameters_of(layers)
        for _, module in layers:
            _push(module, self.strength)


class DeadOnset(Fault):
    """A share of the units of each layer dies at once, as after a step that was much too large."""

    family, cause, unit = "dead-onset", Cause.DEAD_UNITS, "share of the units of each layer"
    mid_run = True
    weakest, strongest = 0.05, 1.0

    def build(self, run: Training) -> None:
        self.where = parameters_of(_answering(run))

    def begin(self, run: Training) -> None:
        for _, module in _answering(run):
            width = _width(module)
            units = torch.randperm(width, generator=self.random)[: math.ceil(self.strength * width)]
            _push(module, DEAD_BIAS, units)


class LogitGrowth(Fault):
    """Queries and keys of all blocks are scaled by a growing factor: attention sharpens until it is one key."""

    family, cause, unit = "logit-growth", Cause.ATTENTION_LOGITS, "growth of q and k per 100 steps, in nats"
    architectures = ("transformer",)
    mid_run = True
    weakest, strongest = 0.03, 30.0

    def build(self, run: Training) -> None:
        layers = [(name, module) for name, module in hidden(run.model) if name.endswith("qkv")]
        self.where = parameters_of(layers)

        def grown(out: torch.Tensor) -> torch.Tensor:
            if not self.is_on(run):
                return out
            factor = math.exp(min(self.strength * (run.step - self.onset) / 100, math.log(LARGEST_FACTOR)))
            queries_and_keys = 2 * out.shape[-1] // 3
            return torch.cat([out[..., :queries_and_keys] * factor, out[..., queries_and_keys:]], -1)

        for _, module in layers:
            on_output(module, grown)


def _grow(tensors: list[torch.Tensor], factor: float, elapsed: int) -> None:
    if elapsed * math.log(factor) < math.log(LARGEST_FACTOR):
        with torch.no_grad():
            for tensor in tensors:
                tensor.mul_(factor)


class EntropyCollapse(Fault):
    """The weights of queries and keys of one block grow at every step, as under a wrong reparametrisation."""

    family, cause, unit = "entropy-collapse", Cause.ATTENTION_LOGITS, "relative growth of one block's weights a step"
    architectures = ("transformer",)
    mid_run = True
    weakest, strongest = 1e-3, 1.0

    def build(self, run: Training) -> None:
        layers = [(name, module) for name, module in hidden(run.model) if name.endswith("qkv")]
        name, self.module = layers[self.seed % len(layers)]
        self.where = parameters_of([(name, self.module)])

    def before(self, run: Training) -> None:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        _grow([weight[: 2 * len(weight) // 3]], 1 + self.strength, run.step - self.onset)


class HeadDrift(Fault):
    """The output layer's weights grow at every step."""

    family, cause, unit = "head-drift", Cause.OUTPUT_LOGITS, "relative growth of the head a step"
    mid_run = True
    weakest, strongest = 3e-4, 1.0

    def build(self, run: Training) -> None:
        self.where = parameters_of([head(run.model)])

    def before(self, run: Training) -> None:
        _grow(list(head(run.model)[1].parameters()), 1 + self.strength, run.step - self.onset)


class HeadScale(Fault):
    """A temperature on the output that falls at every step: logits grow though no weight does."""

    family, cause, unit = "head-scale", Cause.OUTPUT_LOGITS, "growth of the logits per 100 steps, in nats"
    mid_run = True
    weakest, strongest = 0.03, 30.0

    def build(self, run: Training) -> None:
        name, module = head(run.model)
        self.where = parameters_of([(name, module)])

        def grown(out: torch.Tensor) -> torch.Tensor:
            if not self.is_on(run):
                return out
            return out * math.exp(min(self.strength * (run.step - self.onset) / 100, math.log(LARGEST_FACTOR)))

        on_output(module, grown)


FAMILIES: list[type[Fault]] = [
    *(TinyInit, Saturation, InitGain, GainOnset, DeadUnits, DeadOnset),
    *(LogitGrowth, EntropyCollapse, HeadDrift, HeadScale),
]
