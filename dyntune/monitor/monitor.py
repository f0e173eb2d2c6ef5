"""Watching a training: :class:`Monitor`."""

from __future__ import annotations

import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter, thread_time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dyntune.dynamics.edge import EdgeReading
from dyntune.errors import DyntuneError, InvalidArgumentError
from dyntune.monitor.alerts import Alert, Detector, default_detectors
from dyntune.monitor.breaker import Breaker, OnFailure
from dyntune.monitor.budget import Budget
from dyntune.monitor.burst import Burst, Bursts, stability_limit
from dyntune.monitor.curves import CurvatureProbe, halves_of
from dyntune.monitor.gradients import parameter_names
from dyntune.monitor.hooks import attach, base_optimizer
from dyntune.monitor.pending import Pending, Step, kept_scalar
from dyntune.monitor.processes import Place, place_of
from dyntune.monitor.provenance import provenance
from dyntune.monitor.recorder import Recorder
from dyntune.monitor.run import Run
from dyntune.monitor.sink import Sink
from dyntune.monitor.watching import Batch, Watched
from dyntune.monitor.writer import RunWriter
from dyntune.objective.context import unwrap
from dyntune.objective.dtensor import local
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.records import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Monitor"]

STATE = 1  # version of what state_dict() returns
# Steps before the first burst and the first probe: moments exist after one, and the first passes of a process warm up.
FIRST_BURST = 3
# Steps between decisions until everything was measured once.
FIRST_INTERVAL = 8
# Of what tier 0 leaves: bursts tell noise, edge and divergence apart; of probes, the eigenvalue costs the most.
SHARES = {"burst": 0.5, "batch": 0.2, "largest": 0.3}
PROBES = ("batch", "largest")
# The norm of the gradient is taken at every step if that is at most this share of what a step may cost.
NORM_SHARE = 0.25
# Losses whose median is "the start", and as many that are "now": one spike is neither.
LOSSES = 10
# A signal that is measured less often than this is reported as blind to what passes in between.
RARE = 1000.0
MANY_PARTS = 64  # batches of one accumulated step that are remembered


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
        seed: Of sketches and search directions; the global generators are not touched.

    Raises:
        InvalidArgumentError: No torch optimizer, or an argument out of range.
        RunFileError: The log exists, and ``resume`` is false.

    Attributes:
        alerts: What is wrong with training, in order.
        overhead: See above.

    Cost:
        Both hooks together take about 10 microseconds on a step on which nothing is measured, and a record of the step
        some 20 (``benchmarks/monitor_overhead.py``). Two copies of the parameters at the end of a burst, and up to four
        batches for the whole run.

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
        seed: int = 0,
    ) -> None:
        if accumulate < 1:
            raise InvalidArgumentError(f"accumulate={accumulate}: a step is made of at least one batch.")
        if loss_fn is not None and criterion is not None:
            raise InvalidArgumentError("both loss_fn and criterion were given: which one is minimised? Pass one.")
        self.optimizer = base_optimizer(optimizer)
        self.overhead = overhead
        self._model, self._loss_fn, self._criterion = unwrap(model), loss_fn, criterion
        self._scaler, self._accumulate, self._seed = scaler, accumulate, seed
        self._budget = Budget(overhead)
        self._place: Place = place_of(model)
        self._breaker = Breaker(on_error, lambda name, **detail: self._recorder.event(name, step=self._last, **detail))
        options = {"overhead": overhead, "accumulate": accumulate, "seed": seed, "clipped": clipped}
        about = provenance(what="Monitor", optimizer=self.optimizer, **options)
        writer = RunWriter(
            log,
            about,
            resume=resume,
            on_error="warn",
            run_id=self._place.run_id,
            rank=self._place.rank,
            world=self._place.world,
        )
        found: Sequence[Detector] = default_detectors() if isinstance(detectors, str) else tuple(detectors)
        self._recorder = Recorder(writer, sinks, found, self._breaker.failed, self._breaker.closed)
        clipping = "unknown" if clipped is None else "clipped" if clipped else "not clipped"
        self._assumed = {"gradients": "as the optimizer takes them", "clipping": clipping, "scope": self._place.scope}
        self._introduced = False

        self._names = parameter_names(model, self.optimizer)
        self._bursts = Bursts(seed)
        self._burst: Burst | None = None
        self._burst_began = 0.0
        self._curves: CurvatureProbe | None = None
        self._num_probes = 0
        self._probing = self._closed = False
        steps = writer.run.steps if resume else ()
        self._number = int(max(steps)) + 1 if len(steps) else 0  # of the next step
        self._began = self._number
        self._log, self._open = Pending(), Step(self._number)
        self._countdown = 1
        self._watching = self._in_iteration = False
        self._lands_after: bool | None = None  # whether observe() comes after step(); None: not known yet
        self._passes = 0
        self._skips = 0.0
        self._batches: list[Any] = []  # of the present step
        self._microbatches: Sequence[Any] | None = None
        self._start: list[float] = []
        self._recent: deque[float] = deque(maxlen=LOSSES)
        self._ratio = math.nan
        self._elsewhere = 0.0  # seconds of this hook that other accounts bear
        self._norm_always = False
        self._since = perf_counter()
        self._detach: Callable[[], None] = attach(self.optimizer, self)

    # -- what a user calls ---------------------------------------------------------------------------------------------

    @property
    def is_probing(self) -> bool:
        """Whether the monitor runs the model at this moment: forward hooks of your own fire then, too."""
        return self._probing

    @property
    def alerts(self) -> list[Alert]:
        """What is wrong with training, in order."""
        return self._recorder.alerts

    @property
    def run(self) -> Run:
        """What was recorded so far; copies the numbers."""
        if not self._closed:
            self._guarded("log", self._flush)
        return self._recorder.run

    def watch(self, loader: Iterable[Batch], *, progress: bool | None = None) -> Watched[Batch]:
        """The loader's batches, each remembered for what is measured at its step.

        Args:
            loader: A DataLoader or any iterable.
            progress: Whether to show a bar with the stability ratio; None: where the output is a terminal.

        Returns:
            What to iterate over, any number of times.
        """
        return Watched(loader, fetched=self._fetched, ratio=lambda: self._ratio, progress=progress)

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
        if self._closed or self._probing:
            return
        began = thread_time()
        try:
            step = self._landing()
            self._passes += not self._watching
            if loss is not None:
                step.add("train/loss", kept_scalar(loss))
            if batch is not None:
                self._remember(batch)
            if microbatches is not None:
                self._microbatches = list(microbatches)
        except Exception as error:
            self._breaker.failed("observe", error)
        finally:
            self._budget.book("hooks", thread_time() - began)

    def measure(self, *quantities: Literal["largest", "batch", "blocks"]) -> dict[str, float | Estimate | None]:
        """Measure curvature now, whatever the budget says, with proof, and record it.

        Args:
            *quantities: ``"largest"`` eigenvalue, ``"batch"`` sharpness (default: both), ``"blocks"``: the largest
                eigenvalue of every parameter's block.

        Returns:
            By column.

        Raises:
            InvalidArgumentError: An unknown quantity, or no batch is known.
            DyntuneError: As :func:`dyntune.hessian`.
        """
        wanted = quantities or ("largest", "batch")
        if not set(wanted) <= {"largest", "batch", "blocks"}:
            raise InvalidArgumentError(f'quantities={wanted!r}: choose from "largest", "batch", "blocks".')
        if (reason := self._no_curvature()) is not None:
            raise InvalidArgumentError(f"curvature cannot be measured: {reason}")
        began = perf_counter()
        found: dict[str, float | Estimate | None] = {}
        try:
            with self._probe():
                curves = self._curvature()
                if "largest" in wanted:
                    found |= curves.largest_values(prove=True)
                if "batch" in wanted:
                    found |= curves.batch_values()
                if "blocks" in wanted:
                    found |= curves.block_values()
        finally:
            self._budget.book("measure", perf_counter() - began)
        if not self._closed:
            self._flush()
            self._recorder.row(max(self._last, 0), found)
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
        self._guarded("log", self._flush_all)
        writer = self._recorder.writer.state_dict(step=self._last if self._last >= 0 else None)
        return {"version": STATE, "steps": self._number, "start": list(self._start), "run": writer}

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
        self._recorder.writer.load_state_dict(state["run"])
        self._number = self._began = steps
        self._start = [float(loss) for loss in start]
        self._log, self._open = Pending(), Step(steps)
        self._burst = None

    def close(self) -> None:
        """Remove the hooks, record what is left, close the log and the sinks. May be called again."""
        if self._closed:
            return
        self._detach()
        self._burst = None
        try:
            self._guarded("log", self._flush_all)
            self._guarded("log", self._summary)
        finally:
            self._closed = True
            self._guarded("log", lambda: self._recorder.close(max(self._last, 0)))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and not self._closed:
            self._guarded("log", lambda: self._recorder.event("stopped", step=self._last, error=kind.__name__))
        self.close()

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """For the optimizer's hook: gradients are there, the step is not made."""
        wall, began = perf_counter(), thread_time()
        kind = "hooks"
        try:
            self._budget.step_begins(wall)
            step = self._open
            self._log.steps.append(step)
            self._number += 1
            self._open = Step(self._number)
            for index, group in enumerate(optimizer.param_groups):
                lr = group["lr"]
                if index == 0 or lr != optimizer.param_groups[0]["lr"]:
                    name = "train/lr" if index == 0 else f"train/lr/{index}"
                    step.columns[name] = [lr if type(lr) is float else kept_scalar(lr)]
            if self._scaler is not None:
                self._count_skips(optimizer, step)
            if self._burst is not None:
                kind = "burst"
                self._burst_before(optimizer, step)
            elif self._norm_always:
                step.columns["grad/norm"] = [_norm(optimizer)]
        except Exception as error:
            self._abort(kind, error)
        except BaseException:
            self._burst = None
            raise
        finally:
            self._budget.book(kind, thread_time() - began if kind == "hooks" else perf_counter() - wall)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """For the optimizer's hook: the step is made."""
        began = thread_time()
        kind = "hooks"
        self._elsewhere = 0.0
        try:
            self._in_iteration = True
            if self._burst is not None:
                kind = "burst"
                self._timed("burst", partial(self._burst_after, optimizer))
                kind = "hooks"
            self._microbatches = None
            if not self._watching or len(self._batches) > 1:
                self._batches = self._batches[-1:]
            self._countdown -= 1
            if self._countdown <= 0:
                self._decide()
        except Exception as error:
            self._abort(kind, error)
        except BaseException:
            self._burst = None
            raise
        finally:
            self._budget.book("hooks", max(thread_time() - began - self._elsewhere, 0.0))

    def _abort(self, kind: str, error: Exception) -> None:
        self._burst = None
        if kind == "burst":  # one that fails was one, too: it is not begun again at once
            self._budget.cost(kind, self._budget.kinds[kind] - self._burst_began)
        self._breaker.failed(kind, error)

    # -- steps ---------------------------------------------------------------------------------------------------------

    @property
    def _last(self) -> int:
        """Number of the last step; one below the first before it."""
        return self._number - 1

    def _fetched(self, batch: Any) -> None:
        """A batch is handed to the loop."""
        if self._closed:
            return
        began = thread_time()
        try:
            self._watching = True
            if self._in_iteration:
                self._batches = []
            self._in_iteration = False
            self._passes += 1
            self._remember(batch)
        except Exception as error:
            self._breaker.failed("observe", error)
        finally:
            self._budget.book("hooks", thread_time() - began)

    def _remember(self, batch: Any) -> None:
        if not self._watching:
            self._batches = []
        if len(self._batches) < MANY_PARTS:
            self._batches.append(batch)
        if self._curves is not None and self._curves.wants_batches:
            self._curves.keep(batch)

    def _landing(self) -> Step:
        """The step that is spoken of."""
        if self._watching:
            after = self._in_iteration
        else:
            if self._lands_after is None:
                self._lands_after = self._number > self._began
            after = self._lands_after
        return self._log.steps[-1] if after and self._log.steps else self._open

    def _count_skips(self, optimizer: torch.optim.Optimizer, step: Step) -> None:
        found = getattr(optimizer, "found_inf", None)
        if isinstance(found, torch.Tensor):  # a fused optimizer skips within its kernel, and its hooks run
            step.columns["skipped"] = [kept_scalar(found)]
            return
        before = self._watching or not self._lands_after
        expected = (self._passes - before) // self._accumulate
        self._skips = max(self._skips, float(expected - (step.number - self._began)))
        step.columns["train/skipped"] = [self._skips]

    def _decide(self) -> None:
        """Write what waits, and begin what fits; of several, what has had the least of its share."""
        self._guarded("log", self._flush)
        kinds = self._kinds()
        first = any(kind not in self._budget.costs for kind in kinds)
        self._countdown = min(self._budget.interval, FIRST_INTERVAL) if first else self._budget.interval
        if self._burst is not None or self._number - self._began < FIRST_BURST:
            return
        for kind in sorted(kinds, key=lambda kind: self._budget.kinds[kind] / SHARES[kind]):
            if self._affords(kind):
                if kind == "burst":
                    self._begin_burst()
                else:
                    self._guarded("curvature", partial(self._measure, kind), book=kind)
                return

    def _kinds(self) -> list[str]:
        """What can be measured at present."""
        bursts = ["burst"] if self._place.bursts and self._breaker.closed("burst") else []
        return bursts + ([] if self._no_curvature() else list(PROBES))

    def _begin_burst(self) -> None:
        objective = None
        if not self._no_curvature():
            self._guarded("curvature", self._prepare)
            objective = None if self._curves is None else self._curves.objective
        self._burst = Burst(self._bursts, self._names, objective)
        self._burst_began = self._budget.kinds["burst"]

    def _affords(self, kind: str) -> bool:
        share = SHARES[kind] if self._no_curvature() is None else 1.0
        return self._budget.affords(kind, share=share)

    def _flush(self, upto: int | None = None) -> None:
        """Write steps that nothing can be added to any more."""
        if not self._introduced:
            self._introduce()
        stride = self._budget.stride
        for number, columns in self._log.take(self._last if upto is None else upto):
            skipped = columns.pop("skipped", None)
            if skipped is not None:
                self._skips += skipped
                columns["train/skipped"] = self._skips
            loss = columns.get("train/loss")
            if loss is not None:
                if len(self._start) < LOSSES:
                    self._start.append(loss)
                self._recent.append(loss)
            sound = all(map(math.isfinite, columns.values()))
            if number % stride == 0 or "grad/cos_moment" in columns or not sound:
                self._recorder.row(number, columns)
                self._budget.records += 1

    def _flush_all(self) -> None:
        self._flush(self._number)

    # -- bursts --------------------------------------------------------------------------------------------------------

    def _burst_before(self, optimizer: torch.optim.Optimizer, step: Step) -> None:
        assert self._burst is not None
        batches: list[Any] = []
        halves = None
        if self._curves is not None:
            batches = [self._curves.moved(batch) for batch in self._batches]
            parts = self._microbatches and [self._curves.moved(batch) for batch in self._microbatches]
            halves = halves_of(batches, parts)
        with self._probe():
            self._burst.before(optimizer, step, batches, halves)

    def _burst_after(self, optimizer: torch.optim.Optimizer) -> None:
        burst = self._burst
        assert burst is not None
        with self._probe():
            burst.after(optimizer)
        if not burst.done:
            return
        self._burst = None
        began = perf_counter()
        self._bursts.take(burst)
        limit = stability_limit(optimizer)
        values: dict[str, float | Estimate | None] = {**self._bursts.values(limit), **burst.tensors()}
        self._guarded("log", self._flush)
        above = statistics.median(self._recent) > statistics.median(self._start) if self._start else None
        reading: EdgeReading = self._bursts.regime(limit, loss_above_start=above)
        labels = {"regime": reading.regime.name.lower(), "regime_reason": reading.reason}
        self._recorder.row(self._last, values | self._own(), labels=labels)
        self._breaker.succeeded("burst")
        self._budget.cost("burst", self._budget.kinds["burst"] - self._burst_began + perf_counter() - began)
        if self._bursts.count == 1:
            self._after_first_burst(burst)

    def _after_first_burst(self, burst: Burst) -> None:
        permitted = self._budget.permitted
        self._norm_always = burst.norm_seconds <= NORM_SHARE * permitted
        if not self._norm_always:
            self._recorder.blind(
                "grad/norm",
                f"between bursts: it takes {1e6 * burst.norm_seconds:.0f} microseconds a step, of which "
                f"{1e6 * NORM_SHARE * permitted:.0f} are allowed",
            )
        if burst.halves == []:
            reason = self._no_curvature() or "no batch was known before the step that could be cut in two"
            self._recorder.blind("grad/noise_scale", reason)
        self._say_if_rare("burst", "bursts")

    # -- curvature -----------------------------------------------------------------------------------------------------

    def _no_curvature(self) -> str | None:
        """Why there is none; None where it can be measured."""
        if self._place.no_curvature:
            return self._place.no_curvature
        if "curvature" in self._breaker.off:
            return self._breaker.off["curvature"]
        if self._curves is None and not self._batches:
            return "no batch is known: iterate over monitor.watch(loader), or call monitor.observe(loss, batch=batch)"
        return None

    def _prepare(self) -> None:
        try:
            with self._probe():
                self._curvature()
        except DyntuneError as error:  # no loss, a model that cannot be differentiated twice: not an accident
            if self._breaker.strict:
                raise
            self._breaker.switch_off("curvature", str(error))
            self._recorder.blind("curvature", str(error), step=self._last)

    def _curvature(self) -> CurvatureProbe:
        if self._curves is None:
            self._curves = CurvatureProbe(
                self._model, self.optimizer, self._loss_fn, self._criterion, self._batches[-1], seed=self._seed
            )
            self._assumed |= self._curves.objective.describe()
            self._recorder.writer.assume(**self._assumed)
        else:
            self._curves.refreshed()
        return self._curves

    def _measure(self, kind: str) -> None:
        began = perf_counter()
        self._budget.cost(kind, 0.0)  # one that fails was one, too
        self._prepare()
        if self._curves is None:
            return
        with self._probe():
            curves = self._curves
            found = curves.batch_values() if kind == "batch" else curves.largest_values()
        self._num_probes += 1
        for name in ("stability/batch_ratio", "stability/lr_ratio"):
            value = found.get(name)
            if isinstance(value, float):
                self._ratio = value
        self._budget.cost(kind, perf_counter() - began)
        self._recorder.row(self._last, found | self._own())
        self._say_if_rare(kind, {"batch": "curvature/batch_sharpness", "largest": "curvature/lambda_max"}[kind])

    @contextmanager
    def _probe(self) -> Iterator[None]:
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    # -- the monitor itself --------------------------------------------------------------------------------------------

    def _guarded(self, part: str, action: Callable[[], None], *, book: str | None = None) -> None:
        """Do something that may fail, on this part's account."""
        if not self._breaker.closed(part):
            return
        try:
            self._timed(book or part, action)
            self._breaker.succeeded(part)
        except Exception as error:
            self._breaker.failed(part, error)

    def _timed(self, kind: str, action: Callable[[], None]) -> None:
        """Do something on this account.

        What waits for the device or for memory counts by the wall clock. Hooks and records do not, and count by this
        thread's: on a busy machine the wall clock would add other programs' time to a few microseconds of theirs.
        """
        wall, own, elsewhere = perf_counter(), thread_time(), self._elsewhere
        inner = self._budget.spent
        try:
            action()
        finally:
            spent = thread_time() - own
            inner = self._budget.spent - inner  # booked by what was called
            self._budget.book(kind, max((spent if kind == "log" else perf_counter() - wall) - inner, 0.0))
            self._elsewhere = elsewhere + spent

    def _own(self) -> dict[str, float | Estimate | None]:
        budget = self._budget
        return {
            "monitor/overhead": budget.share,
            "monitor/overhead_s": budget.spent,
            "monitor/step_s": budget.bare,
            "monitor/errors": self._breaker.errors,
        }

    def _summary(self) -> None:
        if self._bursts.count == 0:
            self._recorder.blind("bursts", f"the run ended after {self._number - self._began} steps")
        if self._curves is None and (reason := self._no_curvature()) is not None:
            self._recorder.blind("curvature", reason)
        self._recorder.event(
            "closed",
            step=self._last if self._last >= 0 else None,
            steps=self._number - self._began,
            seconds=perf_counter() - self._since,
            overhead=_finite(self._budget.share),
            bursts=self._bursts.count,
            probes=self._num_probes,
            errors=self._breaker.errors,
        )

    def _introduce(self) -> None:
        """What is known from the start; not written before it is known whether this goes on from a checkpoint."""
        self._introduced = True
        self._recorder.writer.assume(**self._assumed)
        if self._place.no_curvature:
            self._recorder.blind("curvature", self._place.no_curvature)
        if not self._place.bursts:
            self._recorder.blind("bursts", "gradients are the same on all processes: rank 0 looks at them")
        if self._scaler is None:
            self._recorder.blind("train/skipped", "no gradient scaler was given: Monitor(..., scaler=scaler)")

    def _say_if_rare(self, kind: str, signal: str) -> None:
        period = self._budget.period(kind, share=SHARES[kind])
        if period > RARE:
            often = f"once in about {period:.0f} steps" if math.isfinite(period) else "only once"
            self._recorder.blind(
                signal,
                f"to what passes quickly: with overhead={self.overhead:g} measured {often}, since it takes "
                f"{1e3 * self._budget.costs[kind]:.3g} ms",
                step=self._last,
            )


def _norm(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Length of the whole gradient (of this process's shards), unscaled; no device synchronisation."""
    parts = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    with torch.no_grad():
        total = torch.stack(torch._foreach_norm(parts)).double().square().sum().sqrt()
    scale = getattr(optimizer, "grad_scale", None)
    return total / scale if isinstance(scale, torch.Tensor) else total


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
