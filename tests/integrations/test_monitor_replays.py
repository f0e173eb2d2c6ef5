"""Replays under Lightning and Transformers: the trainer's clipping, precision and dropout are made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dyntune.integrations.lightning import MonitorCallback as LightningMonitor
from dyntune.integrations.transformers import MonitorCallback as TransformersMonitor
from dyntune.monitor.monitor import Monitor
from dyntune.monitor.run import Event
from tests.integrations import test_monitor_lightning as lightning
from tests.integrations import test_monitor_transformers as transformers
from tests.monitor.test_monitor_replay import At
from tests.suggest.problems import same

pytestmark = lightning.pytestmark


def answer(monitor: Monitor | None) -> Event:
    assert monitor is not None
    (found,) = [event for event in monitor.run.events if event.name == "explained"]
    return found


def told(**more: Any) -> dict[str, Any]:
    """Of 50 steps with an alert at the 30th; epochs, whose shuffling draws random numbers, are of ten."""
    return {"replay": 16, "detectors": [At(30)], "on_error": "raise", **more}


LIGHTNING: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.3},
    "clipped by value": {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("setting", LIGHTNING)
def test_lightning(setting: str) -> None:
    """Clipped by value is not made again, and the answer says so; what it would take for that is not known to torch."""
    callback = LightningMonitor(criterion=lightning.CE, **told())
    bare, watched = lightning.trained(**LIGHTNING[setting]), lightning.trained(callback, **LIGHTNING[setting])
    assert same(bare, watched)
    expected = "not_reproduced" if setting == "clipped by value" else "nothing_to_avert"
    assert answer(callback.monitor).detail["verdict"] == expected


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "plain": {"max_grad_norm": 0.0},
    "clipped": {"max_grad_norm": 0.3},
    "bf16": {"bf16": True},
}


def as_the_trainer(model: Any, batch: Any) -> Any:
    """The trainer divides by all labels of a step, the model by those that it predicts: one less a row."""
    labels = batch["labels"]
    return model(**batch).loss * (labels[:, 1:] != -100).sum() / (labels != -100).sum()


@pytest.mark.parametrize("setting", TRANSFORMERS)
def test_transformers(setting: str, tmp_path: Path) -> None:
    trainer = transformers.made(tmp_path, **TRANSFORMERS[setting])
    callback = TransformersMonitor(trainer, as_the_trainer, **told())
    watched, bare = (
        transformers.trained(trainer),
        transformers.trained(transformers.made(tmp_path, **TRANSFORMERS[setting])),
    )
    assert same(bare, watched)
    assert answer(callback.monitor).detail["verdict"] == "nothing_to_avert"


def test_a_loss_that_is_not_the_trainers_is_noticed(tmp_path: Path) -> None:
    """That which the model itself returns is a third larger on rows this short: no answer rather than a wrong one."""
    trainer = transformers.made(tmp_path)
    callback = TransformersMonitor(trainer, **told())
    transformers.trained(trainer)
    assert answer(callback.monitor).detail["verdict"] == "not_reproduced"


def test_off_by_default() -> None:
    callback = LightningMonitor(criterion=lightning.CE)
    lightning.trained(callback)
    assert callback.monitor is not None
    assert callback.monitor._replay is None
