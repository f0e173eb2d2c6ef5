"""Faults of the optimizer and the schedule."""

from __future__ import annotations

import math

from benchmarks.faults.fault import Fault, regroup
from benchmarks.faults.parts import hidden, parameters_of
from benchmarks.faults.training import Training
from benchmarks.faults.workloads import Workload
from dyntune.monitor.alerts import Cause

SMALL_BATCH = 2
WARMUP = 100  # steps of which the learning rate is too high
CLEAN_BETA2 = 0.999
LARGEST_GROWTH = 1e12  # of gradients: their squares are far from the largest float32


class LrHigh(Fault):
    """All learning rates too high from the first step."""

    family, cause, unit = "lr-high", Cause.LR_TOO_HIGH, "factor on the learning rate"
    weakest, strongest = 2.0, 2000.0

    def build(self, run: Training) -> None:
        factor = run.factor
        run.factor = lambda step: factor(step) * (self.strength if step >= self.onset else 1.0)


class LrJump(LrHigh):
    """The learning rate jumps: a restart, or a schedule in the wrong unit."""

    family, mid_run = "lr-jump", True


class LrLow(LrHigh):
    """All learning rates too low from the first step."""

    family, cause, unit = "lr-low", Cause.LR_TOO_LOW, "divisor of the learning rate"
    weakest, strongest = 2.0, 1e5

    def build(self, run: Training) -> None:
        factor = run.factor
        run.factor = lambda step: factor(step) / self.strength


class LrDecaysEarly(Fault):
    """An exponential decay that is much too fast: stepped once a batch where once an epoch was meant."""

    family, cause, unit = "lr-decays-early", Cause.LR_TOO_LOW, "e-foldings of the learning rate in the run"
    weakest, strongest = 2.0, 1000.0

    def build(self, run: Training) -> None:
        factor = run.factor
        run.factor = lambda step: factor(step) * math.exp(-self.strength * step / run.steps)


class WarmupMissing(Fault):
    """The first 100 steps, where a warm-up belongs, are too large; the rate afterwards is the healthy one."""

    family, cause, unit = "no-warmup", Cause.WARMUP_MISSING, "factor on the learning rate in the first 100 steps"
    weakest, strongest = 2.0, 5000.0

    def build(self, run: Training) -> None:
        factor = run.factor
        run.factor = lambda step: self.strength * factor(max(step, WARMUP)) if step < WARMUP else factor(step)


class NoisePlateau(Fault):
    """Batches of two and a learning rate that stays where it is: the loss stops at the level of the noise."""

    family, cause, unit = "noise-plateau", Cause.NOISE_PLATEAU, "factor on the learning rate, which does not decay"
    weakest, strongest = 1.0, 100.0

    @classmethod
    def setting(cls, workload: Workload) -> Workload:
        """Two rows a batch, a decaying learning rate that fits them: square root for Adam, linear for SGD."""
        share = SMALL_BATCH / workload.scenario.batch
        lr = workload.lr * (math.sqrt(share) if workload.is_adam else share)
        return workload.changed(lr=lr, batch=SMALL_BATCH, schedule="cosine")

    def build(self, run: Training) -> None:
        warmup = max(run.workload.scenario.warmup, 1)
        run.factor = lambda step: self.strength * min(1.0, (step + 1) / warmup)


class GroupLr(Fault):
    """One layer in a parameter group of its own, whose learning rate is too high."""

    family, cause, unit = "group-lr", Cause.GROUP_LR, "factor on the learning rate of one layer"
    weakest, strongest = 3.0, 1e5

    def build(self, run: Training) -> None:
        self.where = parameters_of([self.pick(run)])
        regroup(run, self.where)
        run.base_lrs[1] *= self.strength


class GroupLrLow(Fault):
    """All layers but the head in a group whose learning rate is too low: fine-tuning's rates in pre-training."""

    family, cause, unit = "group-lr-low", Cause.GROUP_LR, "divisor of the learning rate of all layers but the head"
    weakest, strongest = 3.0, 1e5

    def build(self, run: Training) -> None:
        self.where = parameters_of(hidden(run.model))
        regroup(run, self.where)
        run.base_lrs[1] /= self.strength


class WeightDecay(Fault):
    """Weight decay meant for another optimizer or scale, on the group of all layers but the head."""

    family, cause, unit = "weight-decay", Cause.GROUP_WEIGHT_DECAY, "weight decay of the group"
    weakest, strongest = 1e-3, 1e3

    def build(self, run: Training) -> None:
        self.where = parameters_of(hidden(run.model))
        regroup(run, self.where)
        run.optimizer.param_groups[1]["weight_decay"] = self.strength


def _betas(run: Training, beta2: float) -> None:
    for group in run.optimizer.param_groups:
        group["betas"] = (group["betas"][0], beta2)


class Beta2Small(Fault):
    """Batches of two with a second moment that hardly averages."""

    family, cause, unit = "beta2-small", Cause.BETA2_TOO_SMALL, "1 - beta2"
    kind = "adam"
    weakest, strongest = 0.02, 1.0

    @classmethod
    def setting(cls, workload: Workload) -> Workload:
        """Two rows a batch, beta2 = 0.999."""
        lr = workload.lr * math.sqrt(SMALL_BATCH / workload.scenario.batch)
        return workload.changed(lr=lr, batch=SMALL_BATCH, betas=(0.9, CLEAN_BETA2))

    def build(self, run: Training) -> None:
        _betas(run, 1.0 - self.strength)


class StaleMoment(Fault):
    """beta2 = 0.9999, and gradients that grow from step to step: scaled for half precision and never scaled back.

    With gradients that grow by e^r a step the second moment lags: after t steps of training it is their mean, and steps
    are up to sqrt(2 r t) times too large for as long as that lasts; with beta2 = 0.99, sqrt(200 r) times. The learning
    rate is three times the workload's, which is healthy by itself. A single jump, however large, did no harm that
    lasts: the second moment holds it a step later.
    """

    family, cause, unit = "stale-moment", Cause.STALE_SECOND_MOMENT, "growth of the gradient per step, in nats"
    kind, mid_run, judged = "adam", True, "lost"
    weakest, strongest = 1e-2, 1.0
    beta2 = 0.9999

    @classmethod
    def setting(cls, workload: Workload) -> Workload:
        """Without clipping, which would hide the growth; with the largest learning rate that is healthy."""
        return workload.changed(lr=3 * workload.lr, clip=None)

    def build(self, run: Training) -> None:
        _betas(run, self.beta2)
        self.where = self.grown(run)
        for name in self.where:
            run.model.get_parameter(name).register_hook(lambda gradient: gradient * self.factor(run))

    def grown(self, run: Training) -> list[str]:
        """Names of the parameters whose gradients grow."""
        return [name for name, _ in run.model.named_parameters()]

    def factor(self, run: Training) -> float:
        """On the gradient at the present step."""
        return math.exp(min(self.strength * max(run.step - self.onset, 0), math.log(LARGEST_GROWTH)))


class StaleLayer(StaleMoment):
    """The same in one layer only."""

    family, unit = "stale-layer", "growth of one layer's gradient per step, in nats"

    def grown(self, run: Training) -> list[str]:
        return parameters_of([self.pick(run)])


class EpsLarge(Fault):
    """Adam's eps above the size of the gradients: the step becomes that of plain momentum with a tiny rate."""

    family, cause, unit = "eps-large", Cause.EPS_TOO_LARGE, "eps"
    kind = "adam"
    weakest, strongest = 1e-5, 1e3

    def build(self, run: Training) -> None:
        for group in run.optimizer.param_groups:
            group["eps"] = self.strength


class ClipLow(Fault):
    """The gradient is clipped to a norm far below what it has; only SGD's kind notices."""

    family, cause, unit = "clip-low", Cause.CLIP_TOO_LOW, "1 / largest norm of the gradient"
    kind = "sgd"
    weakest, strongest = 1.0, 1e6

    def build(self, run: Training) -> None:
        run.clip = 1.0 / self.strength


FAMILIES: list[type[Fault]] = [
    *(LrHigh, LrJump, LrLow, LrDecaysEarly, WarmupMissing, NoisePlateau, GroupLr, GroupLrLow, WeightDecay),
    *(Beta2Small, StaleMoment, StaleLayer, EpsLarge, ClipLow),
]
