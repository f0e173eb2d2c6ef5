"""Published rules that watch a training, written anew from their descriptions, and two that are no tool's.

All see what their authors let them see, at every step, and none sees later ones. Where a rule has one number that says
how sensitive it is, it is tried at several, its own default among them: that gives a curve. A rule that changes what it
remembers by its verdicts is run anew at each level; the others give every step a strength once.

What a rule needs and no run records is left out and named in `missing`. Alarms of all rules are critical: their authors
know one severity.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.faults.alarm import Alarm, Block, Looker
from dyntune.monitor.alerts import Cause
from dyntune.monitor.rows import Array, Rows

FIXED_RULE = "loss > mean + 6 sd of 128"
PLACEBO = "random"
SIGMAS = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 25.0, 50.0)
FACTORS = (1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)


class _Window:
    """The last values of a series before each new one, for a block at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._past = np.empty(0)

    def before(self, new: Array) -> tuple[Array, Array]:
        """New values with a full window before them, and their windows, shape (values, size)."""
        joined = np.concatenate([self._past, new])
        self._past = joined[-self.size :]
        if len(joined) <= self.size:
            return np.empty(0), np.empty((0, self.size))
        return joined[self.size :], sliding_window_view(joined, self.size)[:-1]


def _last(block: Block, values: Array) -> range:
    """Steps of the last of a block's values."""
    return range(block.time + 1 - len(values), block.time + 1)


class SpikeOfSigmas:
    """Above the mean of the last values by so many standard deviations; what was flagged enters them, too."""

    at_least = False

    def __init__(self, levels: Sequence[float], columns: Sequence[str], window: int = 128, least_sd: float = 0.0):
        self.levels, self.columns, self.least_sd = tuple(levels), tuple(columns), least_sd
        self._windows = {name: _Window(window) for name in columns}

    def update(self, block: Block) -> Iterator[Alarm]:
        for name in self.columns:
            new, windows = self._windows[name].before(getattr(block, name))
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                mean, sd = windows.mean(1), windows.std(1)
                z = np.where(sd >= self.least_sd, (new - mean) / sd, -np.inf)
            for step, strength in zip(_last(block, new), z, strict=True):
                if strength > min(self.levels):
                    yield Alarm(step, f"{name} spike", strength=float(strength))


class PersistentLoss:
    """llm-foundry: five losses in a row at least twice the mean of 100 (flagged ones included), or half of 100 > 10."""

    at_least = True
    WINDOW, IN_A_ROW, CAP = 100, 5, 10.0

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels = tuple(levels)
        self._window = _Window(self.WINDOW)
        self._ratios: deque[float] = deque(maxlen=self.IN_A_ROW)

    def update(self, block: Block) -> Iterator[Alarm]:
        new, windows = self._window.before(block.loss)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            ratios = new / windows.mean(1)
        high = (windows > self.CAP).sum(1) >= self.WINDOW / 2
        for step, ratio, is_high in zip(_last(block, new), ratios.tolist(), high, strict=True):
            self._ratios.append(ratio)
            lasting = min(self._ratios) if not any(map(math.isnan, self._ratios)) else -math.inf
            if len(self._ratios) == self.IN_A_ROW and lasting >= min(self.levels):
                yield Alarm(step, "loss spike", causes=(Cause.LR_TOO_HIGH,), strength=lasting)
            elif step >= 2 * self.WINDOW and is_high:
                yield Alarm(step, "high loss", causes=(Cause.LR_TOO_HIGH,))


class RelativeSpike:
    """Lightning: rising, and farther from the mean of the last ten accepted losses than twice that; or not finite."""

    at_least = False
    WINDOW, WARMUP = 10, 1

    def __init__(self, level: float) -> None:
        self.levels = (level,)
        self._accepted: deque[float] = deque(maxlen=self.WINDOW)
        self._previous = 0.0

    def update(self, block: Block) -> Iterator[Alarm]:
        for step, loss in enumerate(block.loss.tolist(), start=block.first):
            if step >= self.WARMUP and self._is_spike(loss):
                yield Alarm(step, "loss spike")
            else:
                self._accepted.append(loss)
                self._previous = loss

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if not self._accepted or loss <= self._previous:
            return False
        mean = math.fsum(self._accepted) / len(self._accepted)
        return abs(loss - mean) >= self.levels[0] * abs(mean)


class ClippedNorm:
    """ZClip: the gradient's norm is so many moving standard deviations above its moving mean, which see it clipped."""

    at_least = False
    ALPHA, WARMUP, EPS = 0.97, 25, 1e-6

    def __init__(self, level: float) -> None:
        self.levels = (level,)
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def update(self, block: Block) -> Iterator[Alarm]:
        for step, norm in enumerate(block.norm.tolist(), start=block.first):
            if len(self._first) < self.WARMUP:
                self._first.append(norm)
                if len(self._first) == self.WARMUP:
                    self._mean, self._variance = float(np.mean(self._first)), float(np.var(self._first))
                continue
            sd, level = math.sqrt(self._variance), self.levels[0]
            z = (norm - self._mean) / (sd + self.EPS)
            if z > level:
                yield Alarm(step, "gradient norm spike")
                norm = self._mean + level * sd * level / z  # what it is clipped to
            self._mean = self.ALPHA * self._mean + (1 - self.ALPHA) * norm
            self._variance = self.ALPHA * self._variance + (1 - self.ALPHA) * (norm - self._mean) ** 2


class LargestOfFirst:
    """Megatron: above ten times the largest of the first 100 losses."""

    at_least = False
    FIRST = 100

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels = tuple(levels)
        self._largest = -math.inf

    def update(self, block: Block) -> Iterator[Alarm]:
        for step, loss in enumerate(block.loss.tolist(), start=block.first):
            if step < self.FIRST:
                self._largest = max(self._largest, loss)
            elif loss > min(self.levels) * self._largest:
                yield Alarm(step, "loss spike", strength=loss / self._largest if self._largest else math.inf)


def _latest(rows: Rows, prefix: str) -> Iterator[dict[str, float]]:
    """Values by the rest of the name, at every row that has any column of a prefix."""
    names = [name for name in rows.names if name.startswith(prefix)]
    if names:
        columns = {name.removeprefix(prefix): rows.column(name).tolist() for name in names}
        has = np.any([rows.has(name) for name in names], axis=0)
        for place in np.flatnonzero(has).tolist():
            yield {name: column[place] for name, column in columns.items()}


class AutoTrainer:
    """Gradients of the first weights against those of the last, dead units, and losses that are not finite or huge."""

    levels, at_least = (0.0,), False
    VANISH_RATIO, VANISH_FIRST, EXPLODE_RATIO, DEAD, HUGE = 1e-3, 1e-4, 70.0, 0.7, 1e5

    def update(self, block: Block) -> Iterator[Alarm]:
        for step, loss in enumerate(block.loss.tolist(), start=block.first):
            if not loss < self.HUGE:
                yield Alarm(step, "not finite", causes=(Cause.EXPLODING,))
        for found in _latest(block.rows, "grad/log_rms/"):
            weights = [value for name, value in found.items() if "weight" in name and "norm" not in name]
            if len(weights) < 2:
                continue
            ratio = weights[0] - weights[-1]
            if ratio < math.log(self.VANISH_RATIO) and weights[0] < math.log(self.VANISH_FIRST):
                yield Alarm(block.time, "vanishing", causes=(Cause.VANISHING,))
            if ratio > math.log(self.EXPLODE_RATIO):
                yield Alarm(block.time, "exploding", causes=(Cause.EXPLODING,))
        for found in _latest(block.rows, "units/dead_max"):
            if any(value >= self.DEAD for value in found.values()):
                yield Alarm(block.time, "dying ReLU", causes=(Cause.DEAD_UNITS,))


class NeuralDbg:
    """Loss far above, or equal to, the last five; gradient norms beyond absolute limits; dead units."""

    levels, at_least = (0.0,), False
    LAST, LEAST, SPIKE, PLATEAU, VANISHING, EXPLODING, DEAD = 5, 3, 10.0, 1e-4, 1e-6, 1e3, 0.9

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.LAST + 1)
        self._state = "stable"

    def update(self, block: Block) -> Iterator[Alarm]:
        for step, loss, norm in zip(_last(block, block.loss), block.loss.tolist(), block.norm.tolist(), strict=True):
            self._losses.append(loss)
            state = self._classified()
            if state not in ("stable", self._state):  # it speaks of changes
                yield Alarm(step, state)
            self._state = state
            if norm < self.VANISHING:
                yield Alarm(step, "vanishing", causes=(Cause.VANISHING,))
            elif norm > self.EXPLODING:
                yield Alarm(step, "exploding", causes=(Cause.EXPLODING,))
        for found in _latest(block.rows, "units/dead_max"):
            if any(value > self.DEAD for value in found.values()):
                yield Alarm(block.time, "dead", causes=(Cause.DEAD_UNITS,))

    def _classified(self) -> str:
        *before, latest = self._losses
        recent = [*before, latest][-self.LAST :]
        if len(recent) < self.LEAST:
            return "stable"
        if not all(map(math.isfinite, recent)):
            return "diverging"
        if len(recent) == self.LAST and 0 < self.SPIKE * np.mean(before) < latest:
            return "loss spike"
        mean = float(np.mean(recent))
        return "plateau" if mean and np.std(recent) < self.PLATEAU * abs(mean) else "stable"


class GradTracer:
    """A gradient above, or updates below, absolute limits."""

    levels, at_least = (0.0,), False
    EXPLODING, STAGNATION, IN_A_ROW = 100.0, 1e-7, 5

    def __init__(self) -> None:
        self._still: dict[str, int] = {}

    def update(self, block: Block) -> Iterator[Alarm]:
        for step, norm in enumerate(block.norm.tolist(), start=block.first):
            if norm > self.EXPLODING:
                yield Alarm(step, "gradient explosion", causes=(Cause.EXPLODING,))
        for found in _latest(block.rows, "update/ratio/"):
            for name, ratio in found.items():
                self._still[name] = self._still.get(name, 0) + 1 if ratio < self.STAGNATION else 0
            if max(self._still.values()) >= self.IN_A_ROW:
                yield Alarm(block.time, "stagnation", causes=(Cause.FROZEN,))


class Placebo:
    """Alarms at random, each naming a random cause; the level is the mean number of steps between them."""

    at_least = False
    CAUSES = tuple(Cause)

    def __init__(self, levels: Sequence[float], name: str) -> None:
        self.levels = tuple(levels)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        self._random = np.random.default_rng(seed)

    def update(self, block: Block) -> Iterator[Alarm]:
        for step in range(block.first, block.time + 1):
            strength, cause = 1 / (1 - self._random.random()), self._random.integers(len(self.CAUSES))
            if strength > min(self.levels):
                yield Alarm(step, "random", causes=(self.CAUSES[cause],), strength=strength)


@dataclass(frozen=True)
class Baseline:
    """A rule in the harness.

    Args:
        make: Fresh lookers at the run of a name, one for each level or one for all.
        default: The level as published; None: there is none.
        levels: All that are tried.
        source: Where the rule is described.
        missing: What it does besides that no run records, and what stands in for something.
    """

    make: Callable[[str], Iterable[Looker]]
    default: float | None
    levels: tuple[float, ...]
    source: str
    missing: str = ""


BETWEEN = tuple(round(10 ** (power / 8), 3) for power in range(8, 57))  # 10 to 10,000,000 steps, 8 a decade
BASELINES: dict[str, Baseline] = {
    FIXED_RULE: Baseline(
        lambda _: [SpikeOfSigmas(SIGMAS, ["loss"])], 6.0, SIGMAS, "the rule that lead times are measured against"
    ),
    "OLMo-core": Baseline(
        # Windows of a standard deviation below 1e-10 are passed over.
        lambda _: [SpikeOfSigmas(SIGMAS, ["loss", "norm"], least_sd=1e-10)],
        6.0,
        SIGMAS,
        "StabilityMonitorCallback: window 128, 6 sd, loss or gradient norm",
    ),
    "llm-foundry": Baseline(
        lambda _: [PersistentLoss(FACTORS)],
        2.0,
        FACTORS,
        "KillLossSpike: window 100, multiplier 2, patience 4, loss cap 10",
    ),
    "Lightning": Baseline(
        lambda _: [RelativeSpike(level) for level in FACTORS],
        2.0,
        FACTORS,
        "SpikeDetection: window 10, warm-up 1, rtol 2",
        "it stops training at the first alarm; here it goes on",
    ),
    "ZClip": Baseline(
        lambda _: [ClippedNorm(level) for level in (2.5, *SIGMAS)],
        2.5,
        (2.5, *SIGMAS),
        "arXiv 2504.02507: z 2.5, alpha 0.97, warm-up 25",
        "it clips what it flags; here only its own statistics see that",
    ),
    "Megatron": Baseline(
        lambda _: [LargestOfFirst(FACTORS)],
        10.0,
        FACTORS,
        "rerun_state_machine: 10 times the largest of the first 100 losses",
        "it repeats the step to tell a fault of the hardware",
    ),
    "AutoTrainer": Baseline(
        lambda _: [AutoTrainer()],
        0.0,
        (0.0,),
        "Zhang et al., ICSE 2021: beta 1e-3, 1e-4 and 70, gamma 0.7",
        "accuracies are not recorded: no oscillation, no slow convergence, and no accuracy that excuses a gradient; "
        "RMS for norms, dead units for zero gradients",
    ),
    "neuraldbg": Baseline(
        lambda _: [NeuralDbg()],
        0.0,
        (0.0,),
        "neuraldbg 1.3.2 without its closed engine: 10 times the mean of 5, sd below 1e-4 of it, norms of 1e-6 and 1e3",
        "activations are not recorded: no saturation, no distribution shift; the whole gradient for single layers",
    ),
    "gradtracer": Baseline(
        lambda _: [GradTracer()],
        0.0,
        (0.0,),
        "gradtracer 0.9.0: norm above 100, velocity below 1e-7 five times",
        "no signal-to-noise ratio, no share of weights near zero; the whole gradient for single tensors, relative "
        "updates for absolute ones",
    ),
    PLACEBO: Baseline(lambda name: [Placebo(BETWEEN, name)], None, BETWEEN, "as many alarms as dyntune, at random"),
}
