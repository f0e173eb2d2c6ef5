"""Alerts: their vocabulary, and on their way into the log."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dyntune
from dyntune.detect import default_detectors
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Rows


def test_the_vocabulary_keeps_its_order() -> None:
    """The benchmark's halves go by it (benchmarks/faults/split.py): a new cause goes to the end."""
    assert list(map(str, Cause)) == [
        "lr too high",
        "lr too low",
        "warm-up missing",
        "plateau from noise",
        "wrong lr of a group",
        "wrong weight decay of a group",
        "beta2 too small",
        "stale second moment",
        "adam eps too large",
        "clipping too low",
        "vanishing gradients",
        "exploding gradients",
        "dead units",
        "attention logits grow",
        "output logits drift",
        "not finite",
        "frozen parameters",
        "disconnected parameters",
        "bad batches",
        "data order",
        "labels do not belong to inputs",
        "gradients not cleared",
        "wrong loss",
        "wrong scale of the loss",
    ]


def test_defaults_are_new_ones_at_each_call() -> None:
    assert not set(map(id, default_detectors())) & set(map(id, default_detectors()))


class Once:
    def __init__(self) -> None:
        self.alert: Alert | None = Alert(
            kind="no-progress",
            severity="warning",
            step=3,
            since=1,
            text="it stands still.",
            advice="do something.",
            causes=(Cause.LR_TOO_LOW, Cause.CLIP_TOO_LOW),
            where=("0.weight",),
            recommender="dyntune.suggest_lr",
        )

    def update(self, rows: Rows) -> list[Alert]:
        found, self.alert = self.alert, None
        return [found] if found else []


@pytest.mark.parametrize("with_log", [False, True])
def test_all_of_an_alert_is_in_the_run(tmp_path: Path, with_log: bool) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = tmp_path / "run.jsonl" if with_log else None
    with dyntune.Monitor(model, optimizer, detectors=[Once()], log=log) as monitor:
        for _ in range(20):
            loss = model(torch.ones(4, 2)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.observe(loss)
    run = monitor.run if log is None else dyntune.load_run(log)
    (event,) = (event for event in run.events if event.name == "alert")
    assert event.step == 3
    assert event.detail["causes"] == ["lr too low", "clipping too low"]
    assert event.detail["where"] == ["0.weight"]
    assert event.detail["since"] == 1
    assert event.detail["recommender"] == "dyntune.suggest_lr"
