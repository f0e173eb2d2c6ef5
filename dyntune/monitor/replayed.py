"""The last steps kept beside a training, and replayed after an alert: :class:`Explaining`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dyntune.errors import AmbiguousLossError, DyntuneError, InvalidArgumentError, OptimizerMismatchError
from dyntune.monitor.alerts import Alert
from dyntune.monitor.session import Session
from dyntune.objective.losses import Criterion, LossFunction

if TYPE_CHECKING:
    from dyntune.replay.answering import Answering

__all__ = ["Explaining", "check_length"]

PART = "replay"  # on whose account it all is, in the budget and in the record
# After which more steps show no more: the loss is no number.
AT_ONCE = "non-finite"
LATE = (
    "The trouble began at step {since}, and the window only at step {first}: this is what would have helped by then, "
    "not what began it. A larger replay=K reaches further back."
)


def check_length(steps: int) -> None:
    """See that a window of so many steps can show an outcome, before anything is made.

    Raises:
        InvalidArgumentError: It cannot.
    """
    from dyntune.replay.ring import MIN_LENGTH  # replaying is imported by those who ask for it

    if isinstance(steps, bool) or not isinstance(steps, int) or (steps != 0 and steps < MIN_LENGTH):
        raise InvalidArgumentError(
            f"replay={steps!r}: a whole number of steps, 0 (off) or at least {MIN_LENGTH}; in a shorter window no "
            "outcome shows."
        )


class Explaining:
    """A ring of the last steps, and an ``explained`` event for alerts that it can answer.

    Errors are the monitor's, on the part ``"replay"``; the ring is begun again after each, since it may lack a step. An
    answer that is refused, or a ring that cannot be kept, is a ``blind`` event. A warning is looked into as long as all
    answers together have taken no more than the monitor's share of training time; a critical alert always.

    Args:
        session: The training.
        model: The model.
        loss_fn: See :func:`dyntune.hessian`.
        criterion: See there.
        length: Steps that are kept.
        accumulate: Batches per step.
        scaler: A gradient scaler.
        clip_norm: What the loop clips the gradient to.
        autocast: Dtype of the loop's mixed precision.

    Cost:
        See :class:`dyntune.replay.ring.Ring`, and for an answer :func:`dyntune.replay.investigating.investigate`.
    """

    def __init__(
        self,
        session: Session,
        model: nn.Module,
        loss_fn: LossFunction | None,
        criterion: Criterion | None,
        *,
        length: int,
        accumulate: int,
        scaler: Any,
        clip_norm: float | None,
        autocast: torch.dtype | None,
    ) -> None:
        self._session = session
        self._make = partial(
            _answering, model, session.optimizer, loss_fn, criterion, clip_norm=clip_norm, autocast=autocast
        )
        self._options = {"length": length, "accumulate": accumulate, "scaler": scaler}
        self._answering: Answering | None = None  # made at the first step that is told
        self._heard = 0  # alerts
        self._about: Alert | None = None
        self._answers = 0.0  # seconds that they took

    # -- what the training tells ---------------------------------------------------------------------------------------

    def fetched(self, batch: Any) -> None:
        """A batch goes to the loop."""
        self._do(lambda kept: kept.ring.fetched(batch))

    def forward_begins(self) -> None:
        """A forward pass comes next, of a batch that is told after it."""
        self._do(lambda kept: kept.ring.forward_begins())

    def observed(self, loss: Any, batch: Any) -> None:
        """The loop speaks of a step."""
        self._do(lambda kept: kept.ring.observed(loss, batch))

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are there, the step is not made."""
        self._do(lambda kept: kept.ring.before_step(optimizer), number=self._session.last)  # it has been counted

    def after_step(self) -> None:
        """The step is made; alerts that came with it are heard, and one that waited long enough is answered."""
        self._do(self._step_made)

    def restart(self) -> None:
        """Begin again at the session's step."""
        self._answering = self._about = None
        self._heard = len(self._session.recorder.alerts)

    def end(self) -> None:
        """No step follows: what waits is answered from what there is."""
        if self._answering is not None:
            self._do(self._last_words)
        self.restart()

    # -- how -----------------------------------------------------------------------------------------------------------

    def _do(self, action: Callable[[Answering], None], *, number: int | None = None) -> None:
        """Keep or answer on this part's account; `number` is that of the step which is under way."""
        session = self._session
        if not session.breaker.closed(PART):
            return
        began, booked = perf_counter(), session.budget.spent
        try:
            kept = self._answering
            if kept is None:
                kept = self._answering = self._make(
                    number=session.number if number is None else number, **self._options
                )
            action(kept)
            if kept.refusal is not None:
                self._do_without(kept.refusal)
        except Exception as error:
            self.restart()
            self._blind(f"it failed with {type(error).__name__}: {error}")
            session.breaker.failed(PART, error)
        except BaseException:  # the loop may go on after Ctrl-C, and what is kept may lack a step
            self.restart()
            raise
        finally:
            session.budget.book(PART, max(perf_counter() - began - (session.budget.spent - booked), 0.0))

    def _do_without(self, reason: str) -> None:
        self.restart()
        self._session.breaker.switch_off(PART, reason)
        self._blind(reason)

    def _blind(self, reason: str) -> None:
        self._session.recorder.blind(PART, reason, step=max(self._session.last, 0))

    def _step_made(self, kept: Answering) -> None:
        due = kept.after_step()
        if kept.ring.number != self._session.number:  # a step that only one of them has seen
            self.restart()
            return
        if len(self._session.recorder.alerts) > self._heard:
            self._hear(kept)
        if due:
            self._answer(kept)

    def _last_words(self, kept: Answering) -> None:
        self._hear(kept)
        if self._about is not None:
            self._answer(kept)

    def _hear(self, kept: Answering) -> None:
        alerts = self._session.recorder.alerts
        new, self._heard = alerts[self._heard :], len(alerts)
        for alert in new:
            if self._affords(alert) and kept.alarm(alert, at_once=alert.kind == AT_ONCE):
                self._about = alert

    def _affords(self, alert: Alert) -> bool:
        budget = self._session.budget
        return alert.severity == "critical" or self._answers <= budget.overhead * budget.training

    def _answer(self, kept: Answering) -> None:
        session, about, self._about = self._session, self._about, None
        window = kept.ring.window()
        began = perf_counter()
        try:
            with session.probe():
                found = kept.answer()
        except DyntuneError as error:  # no loss, a batch that is not known: not an accident
            if session.breaker.strict:
                raise
            self.restart()
            if isinstance(error, (AmbiguousLossError, OptimizerMismatchError)):
                self._do_without(str(error))
            else:
                self._blind(str(error))
            return
        finally:
            self._answers += perf_counter() - began
        if found is not None and about is not None and window is not None:
            alert = {"kind": about.kind, "step": about.step, "severity": about.severity}
            first, since = window.steps[0].number, about.step if about.since is None else about.since
            told = found.to_dict()
            if first > since:
                told["text"] += f" {LATE.format(since=since, first=first)}"
            session.event("explained", alert=alert, window=[first, window.steps[-1].number], **told)
        session.breaker.succeeded(PART)


def _answering(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFunction | None,
    criterion: Criterion | None,
    *,
    clip_norm: float | None,
    autocast: torch.dtype | None,
    **options: Any,
) -> Answering:
    from dyntune.replay.answering import Answering
    from dyntune.replay.replaying import Recipe

    recipe = Recipe(clip_norm, autocast)
    return Answering(model, optimizer, loss_fn, criterion=criterion, recipe=recipe, **options)
