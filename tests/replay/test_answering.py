"""From an alarm to its answer, and only then a cost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dyntune.replay.answering import Answering
from dyntune.replay.explanation import Explanation
from dyntune.replay.verdict import Verdict
from tests.replay.loops import CE, images, plain_mlp, seeded
from tests.suggest.problems import same, snapshot


@dataclass
class Alarm:
    step: int
    text: str = "the loss is far above its usual range."


def run(alarms: list[int], *, bad: int = -1, at_once: bool = False) -> list[tuple[int, Explanation]]:
    """Train 140 steps with alarms at some of them; the answers with their steps."""
    model = seeded(plain_mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    answering = Answering(model, optimizer, criterion=CE, length=32, number=1000)
    answers = []
    for step, (x, y) in enumerate(images(140)):
        batch = (1000 * x if step == bad else x), y
        answering.ring.fetched(batch)
        loss = CE(model(batch[0]), y)
        loss.backward()
        answering.ring.observed(loss)
        answering.ring.before_step(optimizer)
        optimizer.step()
        due = answering.after_step()
        if step in alarms:
            answering.alarm(Alarm(1000 + step), at_once=at_once)
        if due:
            before = snapshot(model, optimizer)
            answer = answering.answer()
            assert same(before, snapshot(model, optimizer))
            assert answer is not None
            answers.append((step, answer))
        optimizer.zero_grad()
    return answers


def test_an_alarm_waits_for_its_harm() -> None:
    """A quarter of the ring later there is something to see, with the numbers of the training's steps."""
    ((step, answer),) = run([102], bad=101)
    assert step == 110
    assert answer.cause == "bad batches"
    assert "batch of step 1101 left out" in answer.text


def test_one_answer_for_alarms_of_the_same_steps() -> None:
    """Alarms while one waits, and in the ring's length after an answer, are not looked into."""
    assert [step for step, _ in run([60, 61, 70, 90, 105])] == [68, 113]


def test_at_once() -> None:
    """Where waiting shows no more."""
    ((step, answer),) = run([60], at_once=True)
    assert step == 61
    assert answer.verdict is Verdict.NOTHING_TO_AVERT


def test_no_answers_where_the_ring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes: said once, and no alarm is taken."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = nn.Linear(2, 1)
    answering = Answering(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert answering.refusal is not None
    assert "averaged over processes" in answering.refusal
    assert not answering.alarm(Alarm(3))
    assert not answering.after_step()
