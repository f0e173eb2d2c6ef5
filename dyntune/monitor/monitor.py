"""Watching a training: :class:`Monitor`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter, thread_time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dyntune.errors import InvalidArgumentError
from dyntune.monitor.alerts import Alert, Detector, default_detectors
from dyntune.monitor.breaker import Breaker, OnFailure
from dyntune.monitor.budget import Budget
from dyntune.monitor.gradients import parameter_names
from dyntune.monitor.hooks import attach, base_optimizer
from dyntune.monitor.landing import Landing
from dyntune.monitor.looking import Looking
from dyntune.monitor.losses import Losses
from dyntune.monitor.measuring import Measuring, OnRequest
from dyntune.monitor.processes import place_of
from dyntune.monitor.provenance import provenance
from dyntune.monitor.recorder import Recorder
from dyntune.monitor.replayed import Explaining, check_length
from dyntune.monitor.run import Run
from dyntune.monitor.session import Session
from dyntune.monitor.settings import Settings
from dyntune.monitor.sink import Sink
from dyntune.monitor.watching import Batch, Watched
from dyntune.monitor.wiring import Wiring
from dyntune.monitor.writer import RunWriter
from dyntune.objective.context import unwrap
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.records import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Monitor"]

STATE = 1  # version of what state_dict() returns
# Steps before the first measurement: moments exist after one, and the first passes of a process warm up.
FIRST = 3
# Steps between decisions until everything was measured once.
FIRST_INTERVAL = 8
# Of what tier 0 leaves: bursts tell noise, edge and divergence apart; of what runs the model, the eigenvalue costs the
# most. What cannot be measured leaves its share to the others.
SHARES = {"burst": 0.4, "tensors": 0.15, "inside": 0.1, "batch": 0.15, "largest": 0.2}
# Steps between decisions while the loss is unusually high, so that detectors see it at once.
UNEASY = 4
# The signal of each kind that is blind to what passes between two measurements.
SIGNALS = {
    "burst": "bursts",
    "tensors": "statistics of single tensors",
    "inside": "attention, units, logits and activations",
    "batch": "curvature/batch_sharpness",
    "largest": "curvature/lambda_max",
}


class Monitor:
    """Watch a training through its optimizer's step hooks.

    Training is not changed: parameters, buffers, optimizer state, gradients and random states are the same bits as
    without the monitor, at every step. Whatever goes wrong in the monitor is recorded and does not reach the training
    loop, unless that is asked for. What is recorded, and at which steps, is in :doc:`/concepts/monitor`.

    Args:
        model: The model, wrapped or not (DDP, ``torch.compile``).
        optimizer: What steps it, wrapped (Accelerate) or not.
        loss_fn: ``(model, batch) -> mean or Loss``; see :func:`dyntune.hessian`. With a batch known, it makes curvature
            measurable.
        criterion: ``(outputs, targets) -> mean``; see there.
        overhead: Share of training time that the monitor may take: 0.02 is 2% where a step takes 2.5 ms or more, up to
            5% at 1 ms. By its own clock, kept by measuring less often. 0: tier 0 and one measurement of each kind.
        log: File to append the run to (JSON lines); None: in memory only. Of several processes each writes its own.
        resume: Go on with a log that exists.
        sinks: Where rows go besides; see :class:`dyntune.monitor.sink.Sink`.
        detectors: ``"default"``, or :class:`~dyntune.monitor.alerts.Detector` objects; they see every row and raise
            alerts.
        on_error: ``"warn"`` once and switch a part off after three errors in a row, ``"disable"`` it at the first, or
            ``"raise"``, as does ``DYNTUNE_STRICT=1`` in the environment.
        scaler: A gradient scaler, to count the steps that it skips.
        accumulate: Batches per step, for that count.
        clipped: Whether gradients are clipped before the step; None: unknown, and recorded as that.
        replay: Keep the last so many steps, at least 8, and after an alert replay them on a copy with one change each,
            to find the smallest that averts it; see :doc:`/concepts/replay`. 0: off.
        clip_norm: What the loop clips the gradient's norm to, for replays; None: it does not, or they find out.
        autocast: Dtype of the loop's mixed precision, for replays; None: none.
        seed: Of sketches and search directions; the global generators are not touched.

    Raises:
        InvalidArgumentError: No torch optimizer, or an argument out of range.
        RunFileError: The log exists, and ``resume`` is false.

    Attributes:
        alerts: What is wrong with training, in order.
        overhead: See above.

    Cost:
        Both hooks together take some 10 microseconds on a step on which nothing is measured, and its part of a record 5
        to 10; where that is above the budget, records are written less often, and the norm of the gradient is taken
        at some steps only (``benchmarks/monitor_overhead.py``). Two copies of the parameters at the end of a burst, and
        up to five batches for the whole run. With ``replay``: two copies of parameters and optimizer state, the last
        batches, and after an alert some ten times the kept steps.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Monitor(model, optimizer, criterion=nn.MSELoss()) as monitor:
        ...     for x, y in monitor.watch([(torch.ones(4, 3), torch.ones(4, 1))] * 20):
        ...         loss = nn.functional.mse_loss(model(x), y)
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         monitor.observe(loss)
        >>> monitor.run.series("train/loss")[0].size, monitor.alerts
        (20, [])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        loss_fn: LossFunction | None = None,
        *,
        criterion: Criterion | None = None,
        overhead: float = 0.02,
        log: str | os.PathLike[str] | None = None,
        resume: bool = False,
        sinks: Sequence[Sink] = (),
        detectors: Literal["default"] | Sequence[Detector] = "default",
        on_error: OnFailure = "warn",
        scaler: Any = None,
        accumulate: int = 1,
        clipped: bool | None = None,
        replay: int = 0,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        if accumulate < 1:
            raise InvalidArgumentError(f"accumulate={accumulate}: a step is made of at least one batch.")
        if loss_fn is not None and criterion is not None:
            raise InvalidArgumentError("both loss_fn and criterion were given: which one is minimised? Pass one.")
        check_length(replay)
        clipped = True if clipped is None and clip_norm is not None else clipped
        self.optimizer = base_optimizer(optimizer)
        self.overhead = overhead
        place, budget = place_of(model), Budget(overhead)
        breaker = Breaker(on_error, lambda name, **detail: self._session.event(name, **detail))
        options = {"overhead": overhead, "accumulate": accumulate, "seed": seed, "clipped": clipped}
        options |= {"replay": replay} if replay else {}
        writer = RunWriter(
            log,
            provenance(what="Monitor", optimizer=self.optimizer, **options),
            resume=resume,
            on_error="warn",
            run_id=place.run_id,
            rank=place.rank,
            world=place.world,
        )
        found: Sequence[Detector] = default_detectors() if isinstance(detectors, str) else tuple(detectors)
        steps = writer.run.steps if resume else ()
        self._session = session = Session(
            optimizer=self.optimizer,
            names=parameter_names(model, self.optimizer),
            place=place,
            budget=budget,
            breaker=breaker,
            recorder=Recorder(writer, sinks, found, breaker.failed, breaker.closed),
            number=int(max(steps)) + 1 if len(steps) else 0,
        )
        self._landing = Landing(session, accumulate=accumulate, scaler=scaler)
        clipping = "unknown" if clipped is None else "clipped" if clipped else "not clipped"
        assumed = {"gradients": "as the optimizer takes them", "clipping": clipping, "scope": place.scope}
        self._measuring = Measuring(
            session, self._landing, unwrap(model), loss_fn, criterion, assumed=assumed, seed=seed
        )
        self._losses = Losses()
        self._settings = Settings(self.optimizer, session.names)
        self._wiring = Wiring(unwrap(model), self.optimizer, session.names)
        self._looking = Looking(
            session,
            self._landing,
            self._measuring,
            flush=self._flush,
            above_start=lambda: self._losses.above_start,
            seed=seed,
        )
        self._replay = (
            Explaining(
                session,
                model,
                loss_fn,
                criterion,
                length=replay,
                accumulate=accumulate,
                scaler=scaler,
                clip_norm=clip_norm,
                autocast=autocast,
            )
            if replay
            else None
        )
        self._counts_skips = scaler is not None
        self._introduced = self._closed = False
        self._countdown, self._waited = 1, 0  # steps to the next decision, and since the last one
        self._said: set[str] = set()  # kinds of which it is known whether they are rare
        self._since = perf_counter()
        self._detach: Callable[[], None] = attach(self.optimizer, self)

    # -- what a user calls ---------------------------------------------------------------------------------------------

    @property
    def is_probing(self) -> bool:
        """Whether the monitor runs the model at this moment: forward hooks of your own fire then, too."""
        return self._session.probing

    @property
    def alerts(self) -> list[Alert]:
        """What is wrong with training, in order."""
        return self._session.recorder.alerts

    @property
    def run(self) -> Run:
        """What was recorded so far; copies the numbers."""
        if not self._closed:
            self._session.guarded("log", self._flush)
        return self._session.recorder.run

    def watch(self, loader: Iterable[Batch], *, progress: bool | None = None) -> Watched[Batch]:
        """The loader's batches, each remembered for what is measured at its step.

        Args:
            loader: A DataLoader or any iterable.
            progress: Whether to show a bar with the stability ratio; None: where the output is a terminal.

        Returns:
            What to iterate over, any number of times.
        """
        return Watched(
            loader,
            begun=self._landing.pass_begins,
            fetched=self._fetched,
            ratio=lambda: self._measuring.ratio,
            progress=progress,
        )

    def observe(self, loss: Any = None, batch: Any = None, microbatches: Sequence[Any] | None = None) -> None:
        """Tell the monitor about a step, before or after ``optimizer.step()``: it lands on the same step.

        Within :meth:`watch` that is the step of the same batch (or the next step, while batches are accumulated).
        Without it, the first call decides: if no step was made before it, every call is about the next step, else about
        the last one; so with accumulated batches call it before the step, or use :meth:`watch`. Of several losses for
        one step the mean is recorded.

        Args:
            loss: A number, or a tensor with one element, which is copied where it is and read later.
            batch: What the loss is of, if :meth:`watch` is not used; for what is measured before the step, give it
                before the step.
            microbatches: Parts that the step's batch consists of, for the noise between them; likewise.
        """
        if self._closed or self._session.probing:
            return
        budget = self._session.budget
        try:
            began = thread_time() if budget.timing else None
            self._landing.observed(loss, batch, microbatches)
            if batch is not None and self._measuring.wants_batches:
                self._measuring.keep(batch)
            if began is not None:
                budget.book_hooks(thread_time() - began)
            if self._replay is not None:
                self._replay.observed(loss, batch)
        except Exception as error:
            self._session.breaker.failed("observe", error)

    def measure(self, *quantities: OnRequest) -> dict[str, float | Estimate | None]:
        """Measure now, whatever the budget says, and record it.

        Args:
            *quantities: Of curvature, with proof: ``"largest"`` eigenvalue, ``"batch"`` sharpness (default: both),
                ``"blocks"``, the largest eigenvalue of every parameter's block. Of the inside of the network, on one
                early batch: ``"attention"``, ``"heads"``, ``"units"``, ``"logits"``, ``"activations"``,
                ``"alignment"``; see :doc:`/concepts/inside-the-network`.

        Returns:
            By column.

        Raises:
            InvalidArgumentError: An unknown quantity, or no batch is known.
            DyntuneError: As :func:`dyntune.hessian`.
        """
        began = perf_counter()
        try:
            found = self._measuring.on_request(quantities or ("largest", "batch"))
        finally:
            self._session.budget.book("measure", perf_counter() - began)
        if not self._closed:
            self._flush()
            self._session.recorder.row(max(self._session.last, 0), found)
        return found

    def plot(self, name: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw a column over the steps; see :meth:`dyntune.Run.plot`."""
        return self.run.plot(name, ax=ax)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write the run as one self-contained HTML page."""
        from dyntune.report import run_page, write

        write(run_page(self.run), path)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to hold for the record to go on from it; plain values that JSON takes."""
        session = self._session
        session.guarded("log", self._flush_all)
        writer = session.recorder.writer.state_dict(step=session.last if session.last >= 0 else None)
        return {"version": STATE, "steps": session.number, "start": list(self._losses.start), "run": writer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; see :meth:`dyntune.monitor.writer.RunWriter.load_state_dict`.

        Raises:
            InvalidArgumentError: It is not what :meth:`state_dict` returns.
            RunFileError: It is another run's, and this one has rows already.
        """
        steps, start = (state.get(key) for key in ("steps", "start")) if isinstance(state, Mapping) else (None, None)
        if not isinstance(steps, int) or steps < 0 or not isinstance(start, list) or state.get("version") != STATE:
            raise InvalidArgumentError(
                f"state with steps {steps!r}: this is not what Monitor.state_dict() of version {STATE} returns, so the "
                "record cannot go on from it. Give that, or none to begin anew."
            )
        self._session.recorder.writer.load_state_dict(state["run"])
        self._session.number = self._session.began = steps
        self._losses.start = [float(loss) for loss in start]
        self._landing.restart()
        self._looking.drop()
        if self._replay is not None:
            self._replay.restart()

    def close(self) -> None:
        """Remove the hooks, record what is left, close the log and the sinks. May be called again."""
        if self._closed:
            return
        self._detach()
        session = self._session
        try:
            session.guarded("log", self._looking.drop)
            session.guarded("log", self._flush_all)
            if self._replay is not None:
                self._replay.end()
            session.guarded("log", self._summary)
        finally:
            self._closed = True
            session.guarded("log", lambda: session.recorder.close(max(session.last, 0)))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and not self._closed:
            self._session.guarded("log", lambda: self._session.event("stopped", error=kind.__name__))
            if self._replay is not None and not issubclass(kind, Exception):  # Ctrl-C: whoever it was waits for the end
                self._replay.restart()
        self.close()

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """For the optimizer's hook: gradients are there, the step is not made."""
        session, looking = self._session, self._looking
        kind = looking.kind
        try:
            wall = perf_counter()
            timed = kind is None and session.budget.timing
            began = thread_time() if timed else 0.0
            session.budget.step_begins(wall)
            try:
                looking.before(optimizer, self._landing.begins(optimizer))
            finally:
                if timed:
                    session.budget.book_hooks(thread_time() - began)
                elif kind is not None:
                    session.budget.book(kind, perf_counter() - wall)
            if self._replay is not None:
                self._replay.before_step(optimizer)
        except Exception as error:
            self._abort(kind, error)
        except BaseException:
            looking.drop()
            raise

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """For the optimizer's hook: the step is made."""
        session = self._session
        kind = self._looking.kind
        try:
            timed = kind is None and session.budget.timing
            began = thread_time() if timed else 0.0
            session.elsewhere = 0.0
            self._landing.made()
            try:
                if kind is not None:
                    session.timed(kind, partial(self._looking.after, optimizer))
                self._countdown -= 1
                self._waited += 1
                if self._countdown <= 0 or (self._landing.uneasy and self._waited >= UNEASY):
                    self._decide()
            finally:
                if timed:
                    session.budget.book_hooks(max(thread_time() - began - session.elsewhere, 0.0))
            if self._replay is not None:
                self._replay.after_step()
        except Exception as error:
            self._abort(kind, error)
        except BaseException:
            self._looking.drop()
            raise

    def _abort(self, kind: str | None, error: Exception) -> None:
        if kind is None:
            self._looking.drop()
        else:
            self._looking.failed()
        self._session.breaker.failed(kind or "hooks", error)

    def _fetched(self, batch: Any) -> None:
        """A batch is handed to the loop."""
        if self._closed:
            return
        try:
            self._landing.fetched(batch)
            if self._measuring.wants_batches:
                self._measuring.keep(batch)
            if self._replay is not None:
                self._replay.fetched(batch)
        except Exception as error:
            self._session.breaker.failed("observe", error)

    def _forward_begins(self) -> None:
        """For callbacks of frameworks, which tell the batch after its forward pass."""
        if self._replay is None or self._closed:
            return
        try:
            self._replay.forward_begins()
        except Exception as error:
            self._session.breaker.failed("observe", error)

    # -- decisions -----------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        """Write what waits, and begin what fits; of several, what has had the least of its share."""
        session, budget = self._session, self._session.budget
        self._waited, self._landing.uneasy = 0, False
        session.guarded("log", self._flush)
        kinds = self._looking.kinds + self._measuring.kinds
        first = any(kind not in budget.costs for kind in kinds)
        self._countdown = min(budget.interval, FIRST_INTERVAL) if first else budget.interval
        if self._looking.kind is not None or session.made < FIRST:
            return
        session.guarded("wiring", self._look_at_parameters)
        self._looking.economise()
        shares = {kind: SHARES[kind] / sum(SHARES[other] for other in kinds) for kind in kinds}
        self._say_what_is_rare(shares)
        for kind in budget.in_turn(shares):
            if not budget.affords(kind, share=shares[kind]):
                continue
            if kind in self._looking.kinds:
                self._looking.begin(kind)
            else:
                self._measuring.begin(kind)
            return

    def _look_at_parameters(self) -> None:
        """Who takes part, and with which settings, where that changed."""
        last = self._session.last
        (values, labels), (more, names) = self._wiring.look(last), self._settings.look()
        if values or more:
            self._session.recorder.row(last, values | more, labels=labels | names)
        if self._wiring.due > last:
            self._countdown = min(self._countdown, self._wiring.due - last)

    def _say_what_is_rare(self, shares: Mapping[str, float]) -> None:
        """Once for each kind, after its first measurement."""
        for kind in shares:
            if kind in self._session.budget.costs and kind not in self._said:
                self._said.add(kind)
                self._session.say_if_rare(kind, SIGNALS[kind], share=shares[kind])

    def _flush(self, upto: int | None = None) -> None:
        """Write steps that nothing can be added to any more."""
        if not self._introduced:
            self._introduce()
        block = self._landing.pending.take(self._session.last if upto is None else upto)
        if block is None:
            return
        if "skipped" in block.columns:  # by a fused kernel, one by one
            at, numbers = block.columns.pop("skipped")
            block.columns["train/skipped"] = at, self._landing.total_skipped(numbers)
        self._losses.take(block.columns.get("train/loss", ((), ()))[1])
        self._landing.calm = self._losses.calm
        self._session.recorder.rows(block.first, block.count, block.values())

    def _flush_all(self) -> None:
        self._flush(self._session.number)

    def _summary(self) -> None:
        session, looked = self._session, self._looking.bursts.count
        if looked == 0:
            session.recorder.blind("bursts", f"the run ended after {session.made} steps")
        if self._measuring.curves is None and (reason := self._measuring.refusal()) is not None:
            session.recorder.blind("curvature", reason)
        share = session.budget.share
        session.event(
            "closed",
            steps=session.made,
            seconds=perf_counter() - self._since,
            overhead=share if math.isfinite(share) else None,
            bursts=looked,
            probes=self._measuring.count,
            errors=session.breaker.errors,
        )

    def _introduce(self) -> None:
        """What is known from the start; not written before it is known whether this goes on from a checkpoint."""
        self._introduced = True
        recorder, place = self._session.recorder, self._session.place
        recorder.writer.assume(**self._measuring.assumed)
        if place.no_curvature:
            recorder.blind("curvature", place.no_curvature)
        if not place.bursts:
            recorder.blind("bursts", "gradients are the same on all processes: rank 0 looks at them")
        if not self._counts_skips:
            recorder.blind("train/skipped", "no gradient scaler was given: Monitor(..., scaler=scaler)")
