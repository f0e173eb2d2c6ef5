"""Consecutive steps looked at closely: :class:`Burst`, and what several of them say together: :class:`Bursts`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from dyntune.dynamics.autocorrelation import Autocorrelation, GradientAutocorrelation
from dyntune.dynamics.edge import EdgeReading, classify, step_curvature
from dyntune.dynamics.momentum import moment_cosine, moment_products
from dyntune.dynamics.noise import noise_scale, noise_terms_of_halves
from dyntune.errors import InvalidArgumentError
from dyntune.monitor.curves import CurvatureProbe
from dyntune.monitor.gradients import gradient_norm, read_gradients, real
from dyntune.monitor.look import TensorLook
from dyntune.monitor.pending import Step, kept_scalar, read_scalars
from dyntune.numerics.sketch import CountSketch
from dyntune.numerics.student import student_interval
from dyntune.objective.dtensor import local
from dyntune.objective.objective import Objective
from dyntune.records import Estimate, Status
from dyntune.stability.thresholds import recurrence, threshold

__all__ = ["LAGS", "Burst", "Bursts", "stability_limit"]

# The largest lag, and with it the length: a burst of LAGS + 1 steps has one pair of it, eight of lag 1. Eight pairs are
# what one unit of an interval takes (dyntune.dynamics.autocorrelation).
LAGS = 8
# Recent bursts that the intervals are over. Two records are kept, each begun when the other is half full, so that the
# older one always holds between half of this and all of it.
WINDOW = 16
MOMENTS = ("exp_avg", "momentum_buffer")


def stability_limit(optimizer: torch.optim.Optimizer) -> float | None:
    """Largest stable learning rate times curvature along a step; None where none is known.

    Coupled weight decay adds to the curvature of the loss; where that is preconditioned, by how much is not known here.
    """
    try:
        rule = recurrence(optimizer)
    except InvalidArgumentError:
        return None
    edge = threshold(rule).value
    if edge is None or (rule.preconditioned and rule.coupled_decay):
        return None
    return edge - rule.lr * rule.coupled_decay


class Bursts:
    """What recent bursts say together.

    Args:
        seed: Of the sketch.
    """

    def __init__(self, seed: int) -> None:
        self.sketch = CountSketch(seed=seed)
        self.count = 0
        self._plain, self._paired = _Rolling(), _Rolling()
        self._terms: deque[tuple[float, float]] = deque(maxlen=WINDOW * (LAGS + 1))
        self._curvatures: deque[float] = deque(maxlen=WINDOW)

    def take(self, burst: Burst) -> None:
        """One more burst; waits for the device."""
        self.count += 1
        self._plain.add([(step, sketch, None) for step, sketch in burst.sketches])
        if burst.halves:
            self._paired.add([(step, (a + b) / 2, (a, b)) for step, a, b in burst.halves])
            terms = [noise_terms_of_halves(a, b, burst.rows) for _, a, b in burst.halves]
            values = read_scalars([t for pair in terms for t in (pair.signal, pair.noise)])
            self._terms.extend(zip(values[::2], values[1::2], strict=True))
        if burst.curvature is not None:
            self._curvatures.append(burst.curvature)

    def values(self, limit: float | None) -> dict[str, float | Estimate | None]:
        """Columns of a burst's end that are over recent bursts."""
        found: dict[str, float | Estimate | None] = {}
        raw, paired = self._plain.reading, self._paired.reading
        if raw is None:
            return found
        for name, reading in (("autocorr_raw", raw.raw), ("autocorr", (paired or raw).best)):
            found |= {f"grad/{name}_lag{k}": estimate for k, estimate in enumerate(reading, start=1)}
        found["grad/amplitude"] = (paired or raw).amplitude
        if paired is not None and self._terms:
            found["grad/noise_scale"] = noise_scale(*zip(*self._terms, strict=True))
            if paired.noise_to_signal is not None:
                found["grad/noise_to_signal"] = paired.noise_to_signal
        if (curvature := self.curvature()) is not None:
            found["stability/step_curvature"] = curvature
            if limit is not None:
                found["stability/step_curvature.limit"] = limit
        return found

    def curvature(self) -> Estimate | None:
        """Learning rate times curvature along the step, over recent bursts."""
        known = [c for c in self._curvatures if math.isfinite(c)]
        if not known:
            return None
        mean, low, high = student_interval(known)
        return Estimate(
            value=mean,
            low=low,
            high=high,
            level=0.95 if len(known) > 1 else None,
            unit="1",
            method=f"one batch before and after a step, {len(known)} bursts",
            covers="sampling",
            status=Status.OK if len(known) > 1 else Status.UNCERTAIN,
            reason="" if len(known) > 1 else "one burst has no interval",
        )

    def regime(self, limit: float | None, *, loss_above_start: bool | None) -> EdgeReading:
        """See :func:`dyntune.dynamics.edge.classify`."""
        raw, paired = self._plain.reading, self._paired.reading
        assert raw is not None  # a burst was taken
        best = paired or raw
        return classify(
            best.best[0],
            best.best[1],
            best.amplitude,
            raw_lag_one=raw.raw[0],
            directional=None if limit is None else self.curvature(),
            limit=2.0 if limit is None else limit,
            loss_above_start=loss_above_start,
        )


class _Rolling:
    """Autocorrelation over the latest bursts."""

    def __init__(self) -> None:
        self._records = [GradientAutocorrelation(lags=LAGS), GradientAutocorrelation(lags=LAGS)]
        self._counts = [0, 0]
        self.reading: Autocorrelation | None = None  # of the older record; None where nothing was recorded

    def add(self, steps: Sequence[tuple[int, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]]) -> None:
        if self._counts[0] >= WINDOW:
            self._records = [self._records[1], GradientAutocorrelation(lags=LAGS)]
            self._counts = [self._counts[1], 0]
        young = self._counts[0] >= WINDOW // 2
        for record in self._records if young else self._records[:1]:
            for step, sketch, halves in steps:
                record.update(sketch, step=step, halves=halves)
        self._counts = [self._counts[0] + 1, self._counts[1] + young]
        self.reading = self._records[0].read()


class Burst:
    """LAGS + 1 consecutive steps, the last of which is looked at tensor by tensor.

    Args:
        bursts: Holds the sketch.
        names: Names by the identity of the parameter.
        curves: Has the loss for gradients of our own: noise of half-batches, curvature along the step; None without.
    """

    def __init__(self, bursts: Bursts, names: dict[int, str], curves: CurvatureProbe | None) -> None:
        self.sketches: list[tuple[int, torch.Tensor]] = []
        self.halves: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.rows = 0
        self.curvature: float | None = None
        self.norm_seconds: list[float] = []  # that the norm of the gradient takes
        self._sketch, self._names, self._curves = bursts.sketch, names, curves
        self._objective = None if curves is None else curves.objective
        self._look: TensorLook | None = None
        self._before: tuple[Objective, list[torch.Tensor], list[torch.Tensor]] | None = None

    @property
    def last(self) -> bool:
        """Whether the next step is the last one."""
        return len(self.sketches) == LAGS

    @property
    def done(self) -> bool:
        """Whether all steps were taken."""
        return len(self.sketches) > LAGS

    def before(
        self, optimizer: torch.optim.Optimizer, step: Step, batches: Sequence[Any], halves: Sequence[Any] | None
    ) -> None:
        """Gradients are there, the step is not made."""
        last = self.last
        with torch.no_grad():
            found = read_gradients(optimizer, self._names)
            if not found.tensors:
                raise InvalidArgumentError("no parameter of the optimizer has a gradient: step() without backward()?")
            began = perf_counter()
            step.put("grad/norm", gradient_norm(found.tensors))
            self.norm_seconds.append(perf_counter() - began)
            moments = [_moment(optimizer, p) for p in found.parameters]
            if all(m is not None for m in moments):
                products = moment_products(found.tensors, [real(local(m)) for m in moments if m is not None])
                step.put("grad/cos_moment", kept_scalar(moment_cosine(products)))
            sketch = self._sketch(found.tensors, found.names, offsets=found.offsets)
            if last:
                self._look = TensorLook(optimizer, found)
        if self._objective is not None and batches:
            self._own_gradients(step.number, batches, halves, last=last)
        self.sketches.append((step.number, sketch))

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """The step is made."""
        if not self.done or self._look is None:
            return
        self._look.end()
        if self._before is not None:
            objective, gradient, weights = self._before
            self._before = None
            after = objective.gradient()
            with torch.no_grad():
                moved = torch._foreach_sub([p.detach() for p in objective.tensors], weights)
                assert self._curves is not None
                scale, known = self._curves.scale()
                lr = float(optimizer.param_groups[0]["lr"])
                if known:
                    self.curvature = float(step_curvature(after, gradient, list(moved), lr=lr, scale=scale))

    def tensors(self) -> dict[str, float]:
        """Statistics of every tensor at the last step; waits for the device."""
        return {} if self._look is None else self._look.values()

    def _own_gradients(self, number: int, batches: Sequence[Any], halves: Sequence[Any] | None, *, last: bool) -> None:
        assert self._objective is not None
        names = tuple(self._objective.parameters)
        if halves is not None:
            parts = []
            for index, half in enumerate(halves):
                objective = self._objective.on(half)
                objective.seed = self._objective.seed + 2 * number + index + 1  # other dropout masks in the other half
                parts.append(self._sketch(objective.gradient(), names))
                self.rows = objective.num_rows if index == 0 else self.rows + objective.num_rows
            self.halves.append((number, parts[0], parts[1]))
        if last:
            objective = self._objective.on(batches)
            gradient = objective.gradient()
            self._before = (objective, gradient, [p.detach().clone() for p in objective.tensors])


def _moment(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Tensor | None:
    state = optimizer.state.get(parameter, {})
    return next((state[name] for name in MOMENTS if state.get(name) is not None), None)
