"""What is measured by running the model, as far as it can be: :class:`Measuring`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any, Literal, TypeAlias, cast, get_args

from torch import nn

from dyntune.errors import AmbiguousLossError, DyntuneError, InvalidArgumentError, NonFiniteError
from dyntune.monitor.curves import CurvatureProbe
from dyntune.monitor.inside import EVERY_PASS, InsideProbe, InsideQuantity
from dyntune.monitor.landing import Landing
from dyntune.monitor.session import Session
from dyntune.objective.batches import map_tensors
from dyntune.objective.losses import Criterion, LossFunction
from dyntune.records import Estimate

__all__ = ["Measuring", "OnRequest"]

Curvature: TypeAlias = Literal["largest", "batch", "blocks"]
OnRequest: TypeAlias = Curvature | InsideQuantity
Values = dict[str, "float | Estimate | None"]


class Measuring:
    """Curvature, and the inside of the network, on batches of the training.

    Args:
        session: The training.
        landing: Holds the batches of the present step.
        model: The model, unwrapped.
        loss_fn: See :func:`dyntune.hessian`.
        criterion: See there.
        assumed: Of the whole run; what the loss assumes is added.
        seed: Of search directions and dropout.
    """

    def __init__(
        self,
        session: Session,
        landing: Landing,
        model: nn.Module,
        loss_fn: LossFunction | None,
        criterion: Criterion | None,
        *,
        assumed: dict[str, Any],
        seed: int,
    ) -> None:
        self._session, self._landing, self._model = session, landing, model
        self._loss_fn, self._criterion, self._seed = loss_fn, criterion, seed
        self.assumed = assumed
        self.curves: CurvatureProbe | None = None
        self.wants_batches = False
        self._inside: InsideProbe | None = None
        self._rows: Any = None  # that the inside is looked at with, always the same, so that what changes is the model
        self.count = 0
        self.ratio = float("nan")  # the latest stability ratio

    @property
    def kinds(self) -> tuple[str, ...]:
        """What can be measured at present."""
        curvature = () if self.refusal() is not None else ("batch", "largest")
        inside = () if self._no_inside() is not None else ("inside",)
        return curvature + inside

    def refusal(self) -> str | None:
        """Why there is no curvature; None where it can be measured."""
        if self._session.place.no_curvature:
            return self._session.place.no_curvature
        if "curvature" in self._session.breaker.off:
            return self._session.breaker.off["curvature"]
        return None if self.curves is not None else self._no_batch()

    def _no_inside(self) -> str | None:
        if self._session.place.no_curvature:
            return self._session.place.no_curvature
        if "inside" in self._session.breaker.off:
            return self._session.breaker.off["inside"]
        return None if self._inside is not None else self._no_batch()

    def _no_batch(self) -> str | None:
        if self._landing.batches:
            return None
        return "no batch is known: iterate over monitor.watch(loader), or call monitor.observe(loss, batch=batch)"

    def prepare(self) -> None:
        """Make the loss measurable; where it cannot be, curvature is switched off with the reason."""
        try:
            with self._session.probe():
                self._curvature()
        except NonFiniteError:
            self._not_finite("curvature")
        except DyntuneError as error:  # no loss, a model that cannot be differentiated twice: not an accident
            self._do_without("curvature", error)

    def _not_finite(self, part: str) -> None:
        """Nothing of the monitor's is wrong, and training may go back to where there are numbers."""
        session = self._session
        session.recorder.blind(part, "the loss or the weights are not finite", step=session.last)

    def _do_without(self, part: str, error: DyntuneError) -> None:
        session = self._session
        if session.breaker.strict:
            raise error
        # Without a loss it is not known how the model is called, either.
        for lost in (part, "inside") if isinstance(error, AmbiguousLossError) and part != "inside" else (part,):
            session.breaker.switch_off(lost, str(error))
            session.recorder.blind(lost, str(error), step=session.last)

    def keep(self, batch: Any) -> None:
        """Keep a batch for batch sharpness."""
        if self.curves is not None:
            self.curves.keep(batch)
            self.wants_batches = self.curves.wants_batches

    def begin(self, kind: str) -> None:
        """Measure one kind and record it; errors are the breaker's."""
        part = "inside" if kind == "inside" else "curvature"
        self._session.guarded(part, partial(self._measure, kind), book=kind)

    def _measure(self, kind: str) -> None:
        session = self._session
        began = perf_counter()
        session.budget.cost(kind, 0.0)  # one that fails was one, too
        if kind == "inside":
            try:
                with session.probe():
                    found = self._inside_values(EVERY_PASS)
            except NonFiniteError:
                self._not_finite("inside")
                return
            except DyntuneError as error:
                self._do_without("inside", error)
                return
        else:
            self.prepare()
            if self.curves is None:
                return
            try:
                with session.probe():
                    found = self.curves.batch_values() if kind == "batch" else self.curves.largest_values()
            except NonFiniteError:
                self._not_finite("curvature")
                return
        self.count += 1
        for name in ("stability/batch_ratio", "stability/lr_ratio"):
            value = found.get(name)
            if isinstance(value, float):
                self.ratio = value
        session.budget.cost(kind, perf_counter() - began)
        if found:
            session.recorder.row(session.last, found | session.own())

    def on_request(self, wanted: Sequence[str]) -> Values:
        """Measure now, with proof.

        Raises:
            InvalidArgumentError: An unknown quantity, or no batch is known.
            DyntuneError: As :func:`dyntune.hessian`.
        """
        known = get_args(Curvature), get_args(InsideQuantity)
        if not set(wanted) <= {*known[0], *known[1]}:
            raise InvalidArgumentError(f"quantities={wanted!r}: choose from {', '.join((*known[0], *known[1]))}.")
        curvature, inside = ([name for name in wanted if name in names] for names in known)
        reason = self.refusal() if curvature else None
        if reason is None and inside:
            reason = self._no_inside()
        if reason is not None:
            raise InvalidArgumentError(f"{' and '.join(wanted)} cannot be measured: {reason}")
        found: Values = {}
        with self._session.probe():
            if curvature:
                curves = self._curvature()
                found |= curves.largest_values(prove=True) if "largest" in wanted else {}
                found |= curves.batch_values() if "batch" in wanted else {}
                found |= curves.block_values() if "blocks" in wanted else {}
            if inside:
                found |= self._inside_values(cast("list[InsideQuantity]", inside))
        return found

    def _inside_values(self, wanted: Sequence[InsideQuantity]) -> Values:
        if self._inside is None:
            self._inside = InsideProbe(self._model, self._loss_fn, self._criterion, seed=self._seed)
            self._rows = self._landing.batches[-1] if self.curves is None else self.curves.first_batch
            self._rows = map_tensors(self._rows, lambda tensor: tensor.detach().clone())
        found = self._inside.values(self._rows, wanted)
        for signal, reason in self._inside.blind.items():
            self._session.recorder.blind(signal, reason, step=self._session.last)
        return found

    def _curvature(self) -> CurvatureProbe:
        if self.curves is None:
            self.curves = CurvatureProbe(
                self._model,
                self._session.optimizer,
                self._loss_fn,
                self._criterion,
                self._landing.batches[-1],
                seed=self._seed,
            )
            self.wants_batches = self.curves.wants_batches
            self.assumed |= self.curves.objective.describe()
            self._session.recorder.writer.assume(**self.assumed)
        else:
            self.curves.refreshed()
        return self.curves
