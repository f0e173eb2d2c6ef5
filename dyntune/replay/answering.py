"""From an alarm to its explanation while training goes on: :class:`Answering`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dyntune.objective.losses import Criterion, LossFunction
from dyntune.replay.explanation import Alarm, Explanation, explain
from dyntune.replay.investigating import investigate
from dyntune.replay.replaying import Recipe, Stage
from dyntune.replay.ring import Ring
from dyntune.replay.verdict import tail_length

__all__ = ["Answering"]


class Answering:
    """A ring, and what becomes of alarms: each waits until its harm can show, then the window is replayed.

    Of alarms that come while one waits, or before a ring of steps is made after an answer, none is looked into: they
    would be answered from the same steps.

    Args:
        model: The model.
        optimizer: What steps it.
        loss_fn: See :func:`dyntune.hessian`.
        criterion: See there.
        recipe: How the loop makes its steps, as far as no hook sees it.
        **options: See :class:`Ring`.

    Attributes:
        ring: Whose :meth:`~Ring.fetched`, :meth:`~Ring.observed` and :meth:`~Ring.before_step` are to be called.
        refusal: Why there are no answers; None where there are.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction | None = None,
        *,
        criterion: Criterion | None = None,
        recipe: Recipe | None = None,
        **options: Any,
    ) -> None:
        self.ring = Ring(model, optimizer, **options)
        self._model, self._optimizer, self._loss_fn, self._criterion = model, optimizer, loss_fn, criterion
        self._recipe = recipe or Recipe()
        self._alarm: Alarm | None = None
        self._wait = 0  # steps until the answer, or until the next alarm is heard

    @property
    def refusal(self) -> str | None:
        """See above."""
        return self.ring.refusal

    def alarm(self, alarm: Alarm, *, at_once: bool = False) -> bool:
        """Something is wrong; whether it is going to be looked into.

        Args:
            alarm: What, and since which step.
            at_once: Answer at the next step: the loss is not finite, and more steps would show no more.
        """
        if self.refusal is not None or self._alarm is not None or self._wait > 0 or self.ring.window() is None:
            return False
        self.ring.hold()
        self._alarm, self._wait = alarm, 1 if at_once else tail_length(self.ring.length)
        return True

    def after_step(self) -> bool:
        """The step is made; whether :meth:`answer` is due."""
        self.ring.after_step()
        self._wait = max(self._wait - 1, 0)
        return self._alarm is not None and self._wait == 0

    def answer(self) -> Explanation | None:
        """Replay the window of the alarm that waits; None where none does. Runs the model.

        Raises:
            DyntuneError: See :func:`dyntune.replay.replaying.replay`.
        """
        alarm, window = self._alarm, self.ring.window()
        self._alarm, self._wait = None, self.ring.length
        try:
            if alarm is None or window is None:
                return None
            stage = Stage(window, self._model, self._optimizer, self._loss_fn, self._criterion, self._recipe)
            return explain(alarm, investigate(stage))
        finally:
            self.ring.release()
