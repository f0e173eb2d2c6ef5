"""Of healthy trainings of the faults benchmark, alarms at steps of no meaning get no cause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.faults.training import Batch, Training
from benchmarks.faults.workloads import WORKLOADS
from dyntune.replay.answering import Answering
from dyntune.replay.explanation import Explanation
from dyntune.replay.verdict import Verdict

STEPS = 400
ALARMS = range(100, STEPS - 20, 90)


@dataclass
class Alarm:
    step: int
    text: str = "an alarm without a reason."


class Watching:
    """As much of a monitor as a training calls."""

    def __init__(self, training: Training) -> None:
        self.training, self.answers = training, list[Explanation]()
        self.answering = Answering(training.model, training.optimizer, criterion=training.criterion, length=64)
        training.optimizer.register_step_pre_hook(lambda optimizer, *_: self.answering.ring.before_step(optimizer))
        training.optimizer.register_step_post_hook(self._after)

    def watch(self, loader: Training, *, progress: bool) -> Iterator[Batch]:
        del progress
        for batch in loader:
            self.answering.ring.fetched(batch)
            yield batch

    def observe(self, loss: torch.Tensor) -> None:
        self.answering.ring.observed(loss)
        if self.training.step in ALARMS:
            assert self.answering.alarm(Alarm(self.training.step))

    def _after(self, *_: Any) -> None:
        if self.answering.after_step() and (answer := self.answering.answer()) is not None:
            self.answers.append(answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, workload in WORKLOADS.items() if workload.half == "tune"])
def test_health_is_reproduced_and_has_no_cause(name: str) -> None:
    """Four windows each; of 312 windows of the tune half's healthy runs two were given a cause."""
    monitor: Any = Watching(training := Training(WORKLOADS[name].changed(steps=STEPS), 0))
    training.loop(monitor)
    verdicts = [answer.verdict for answer in monitor.answers]
    assert len(verdicts) == len(ALARMS)
    assert set(verdicts) <= {Verdict.NOTHING_TO_AVERT, Verdict.NOTHING_AVERTS}
