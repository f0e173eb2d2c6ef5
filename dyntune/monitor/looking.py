"""What is seen of gradients around a step: their length, one step tensor by tensor, and bursts: :class:`Looking`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from dyntune.dynamics.edge import EdgeReading
from dyntune.errors import InvalidArgumentError
from dyntune.monitor.burst import Burst, Bursts, stability_limit
from dyntune.monitor.curves import halves_of
from dyntune.monitor.gradients import read_gradients
from dyntune.monitor.landing import Landing
from dyntune.monitor.look import TensorLook
from dyntune.monitor.measuring import Measuring
from dyntune.monitor.norms import NormCadence
from dyntune.monitor.pending import Step
from dyntune.monitor.session import Session
from dyntune.records import Estimate

__all__ = ["Looking"]


class Looking:
    """Looks at gradients before and after steps.

    Args:
        session: The training.
        landing: Holds the batches of the present step.
        measuring: Knows the loss.
        flush: Writes the steps that wait.
        above_start: Whether the loss is above its start.
        seed: Of the sketch.
    """

    def __init__(
        self,
        session: Session,
        landing: Landing,
        measuring: Measuring,
        *,
        flush: Callable[[], None],
        above_start: Callable[[], bool | None],
        seed: int,
    ) -> None:
        self._session, self._landing, self._measuring = session, landing, measuring
        self._flush, self._above_start = flush, above_start
        self.bursts = Bursts(seed)
        self._norms = NormCadence()
        self._burst: Burst | None = None
        self._look: TensorLook | None = None
        self.kind: str | None = None  # what the next steps are looked at for; None: nothing but their length
        self._began = 0.0  # spent on that kind before this one

    @property
    def kinds(self) -> tuple[str, ...]:
        """What can be looked at here."""
        if not self._session.place.bursts:
            return ()
        return tuple(kind for kind in ("burst", "tensors") if self._session.breaker.closed(kind))

    def begin(self, kind: str) -> None:
        """Look at the next step, or the next few."""
        session = self._session
        self._began = session.budget.kinds[kind]
        if kind == "burst":
            if self._measuring.refusal() is None:
                session.guarded("curvature", self._measuring.prepare)
            self._burst = Burst(self.bursts, session.names, self._measuring.curves)
        self.kind = kind

    def economise(self) -> None:
        """Take norms less often, where steps cost too much."""
        if (unseen := self._norms.economise(self._session.budget)) is not None:
            self._session.recorder.blind("grad/norm", unseen, step=self._session.last)

    def drop(self) -> None:
        """Do not go on with what is under way."""
        self._burst = self._look = self.kind = None

    def failed(self) -> None:
        """What is under way has failed: that was one, too, and is not begun again at once."""
        if self.kind is not None:
            self._session.budget.cost(self.kind, self._session.budget.kinds[self.kind] - self._began)
        self.drop()

    def before(self, optimizer: torch.optim.Optimizer, step: Step) -> None:
        """Gradients are there, the step is not made."""
        if self.kind is None:
            self._norms.before(optimizer, step)
        elif self.kind == "tensors":
            found = read_gradients(optimizer, self._session.names)
            if not found.tensors:
                raise InvalidArgumentError("no parameter of the optimizer has a gradient: step() without backward()?")
            self._look = TensorLook(optimizer, found)
            self._norms.before(optimizer, step)
        else:
            self._burst_before(optimizer, step)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """The step is made."""
        if self._burst is not None:
            with self._session.probe():
                self._burst.after(optimizer)
            if self._burst.done:
                burst, self._burst, self.kind = self._burst, None, None
                self._burst_ends(optimizer, burst)
        elif self._look is not None:
            look, self._look, self.kind = self._look, None, None
            began = perf_counter()
            look.end()
            self._ends("tensors", dict(look.values()), {}, began)

    def _burst_before(self, optimizer: torch.optim.Optimizer, step: Step) -> None:
        assert self._burst is not None
        batches: list[Any] = []
        halves = None
        curves = self._measuring.curves
        if curves is not None:
            batches = [curves.moved(batch) for batch in self._landing.batches]
            given = self._landing.microbatches
            halves = halves_of(batches, given and [curves.moved(batch) for batch in given])
        with self._session.probe():
            self._burst.before(optimizer, step, batches, halves)

    def _burst_ends(self, optimizer: torch.optim.Optimizer, burst: Burst) -> None:
        began = perf_counter()
        self.bursts.take(burst)
        limit = stability_limit(optimizer)
        values: dict[str, float | Estimate | None] = {**self.bursts.values(limit), **burst.tensors()}
        self._session.guarded("log", self._flush)
        reading: EdgeReading = self.bursts.regime(limit, loss_above_start=self._above_start())
        labels = {"regime": reading.regime.name.lower(), "regime_reason": reading.reason}
        self._ends("burst", values, labels, began)
        if self.bursts.count == 1:
            self._after_first_burst(burst)

    def _ends(
        self, kind: str, values: dict[str, float | Estimate | None], labels: dict[str, str], began: float
    ) -> None:
        session = self._session
        session.recorder.row(session.last, values | session.own(), labels=labels)
        session.breaker.succeeded(kind)
        session.budget.cost(kind, session.budget.kinds[kind] - self._began + perf_counter() - began)

    def _after_first_burst(self, burst: Burst) -> None:
        recorder = self._session.recorder
        seconds = statistics.median(burst.norm_seconds)
        if (unseen := self._norms.decide(seconds, self._session.budget.permitted)) is not None:
            recorder.blind("grad/norm", unseen)
        if burst.halves == []:
            reason = self._measuring.refusal() or "no batch was known before the step that could be cut in two"
            recorder.blind("grad/noise_scale", reason)
