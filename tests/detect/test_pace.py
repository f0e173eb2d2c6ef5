"""Steps that are too small or too large."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dyntune.detect.pace import FAR, FIRST, LARGE, LATEST, LEAST, LOOKS, SETTLED, SMALL, SMALL_CLIPPED, Pace
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row
from tests.detect.series import hostile, run_of_rows, told_of

N = 640
NORM = np.exp(0.2 * np.random.default_rng(0).standard_normal(4000))


def looks(ratio: float, at: Any = range(40, N, 60), *, extra: dict[str, float] | None = None) -> list[Row]:
    """Five tensors, the median of which is `ratio`."""
    every = dict(zip("abcde", (1e-9, 1e-9, ratio, 1.0, 1.0), strict=True))
    values = {"update/ratio_median": ratio} | {f"update/ratio/{name}": x for name, x in every.items()}
    return [Row(step=step, values=values | (extra or {})) for step in at]


def told(
    rows: list[Row], *, loss: Any = 1.0, lr: Any = 0.1, norm: Any = None, steps: int = N, first: int = 0
) -> list[Alert]:
    columns = {"train/loss": loss, "train/lr": lr, "grad/norm": NORM[:steps] if norm is None else norm}
    return told_of(Pace, run_of_rows(steps, columns, rows, first=first))


@pytest.mark.parametrize(("ratio", "alarm"), [(0.99 * SMALL, True), (1.01 * SMALL, False)])
@pytest.mark.parametrize("first", [0, 5000])
def test_too_slow_is_said_once(ratio: float, alarm: bool, first: int) -> None:
    found = told(looks(ratio, range(first + 40, first + N, 60)), first=first)
    assert [(alert.kind, alert.severity) for alert in found] == ([("too-slow", "warning")] if alarm else [])
    for alert in found:
        assert alert.cause is Cause.LR_TOO_LOW
        assert first + SETTLED <= alert.step < first + SETTLED + 64


@pytest.mark.parametrize(("share", "alarm"), [(0.99 * FAR, False), (1.01 * FAR, True)])
def test_slow_steps_of_a_loss_that_has_come_down_are_none(share: float, alarm: bool) -> None:
    loss = np.where(np.arange(N) < 10, 1.0, share)
    assert bool(told(looks(0.5 * SMALL), loss=loss)) == alarm


def test_slow_steps_need_three_looks() -> None:
    assert len(told(looks(0.5 * SMALL, (40, 100, 160)))) == 1
    assert told(looks(0.5 * SMALL, (40, 100)[: LOOKS - 1])) == []


def test_slow_steps_in_a_warm_up_or_late_are_none() -> None:
    ramp = np.minimum(np.arange(1, N + 1) / N, 1.0)
    assert told(looks(0.5 * SMALL), lr=ramp) == []
    late = range(LATEST, LATEST + 400, 60)
    assert told(looks(0.5 * SMALL, late), steps=LATEST + 500) == []


def test_a_network_that_has_died_has_small_steps_and_another_trouble() -> None:
    assert told([*looks(3.1 * SMALL, (40,)), *looks(0.5 * SMALL, range(100, N, 60))]) == []
    assert len(told([*looks(2.9 * SMALL, (40,)), *looks(0.5 * SMALL, range(100, N, 60))])) == 1


@pytest.mark.parametrize(("ratio", "alarm"), [(0.99 * SMALL_CLIPPED, True), (1.01 * SMALL_CLIPPED, False)])
def test_where_clipping_makes_every_gradient_of_one_length_the_limit_is_higher(ratio: float, alarm: bool) -> None:
    found = told(looks(ratio), norm=np.full(N, 0.1))
    assert [alert.cause for alert in found] == ([Cause.CLIP_TOO_LOW] if alarm else [])
    adam = Row(step=2, values={"optimizer/beta2": 0.99})
    assert told([adam, *looks(ratio)], norm=np.full(N, 0.1)) == []


def test_what_explains_slow_steps() -> None:
    (silent,) = told(looks(0.5 * SMALL, extra={"units/dead/0": 0.7, "units/dead_max": 0.7}))
    assert silent.cause is Cause.DEAD_UNITS
    (hidden,) = told(looks(0.5 * SMALL, extra={"adam/below_eps/a": 0.9}))
    assert hidden.cause is Cause.EPS_TOO_LARGE
    (quiet,) = told(looks(0.5 * SMALL), norm=0.02 * NORM[:N] / NORM.max())
    assert quiet.cause is Cause.WRONG_LOSS
    thrown = np.where(np.arange(N) == 5, 3.0, 1.0)
    (warm,) = told(looks(0.5 * SMALL), loss=thrown, lr=np.where(np.arange(N) < 10, 1.0, 0.1))
    assert warm.cause is Cause.WARMUP_MISSING


@pytest.mark.parametrize(("ratio", "alarm"), [(0.99 * LARGE, False), (1.01 * LARGE, True)])
@pytest.mark.parametrize("first", [0, 5000])
def test_too_fast_is_said_once(ratio: float, alarm: bool, first: int) -> None:
    found = told(looks(ratio, range(first + 40, first + N, 60)), first=first)
    assert [(alert.kind, alert.severity, alert.cause) for alert in found] == (
        [("too-fast", "critical", Cause.LR_TOO_HIGH)] if alarm else []
    )


def test_large_steps_are_none_at_first_in_two_looks_or_of_a_small_loss() -> None:
    assert told(looks(2.0 * LARGE, (40, 80, FIRST))) == []
    assert len(told(looks(2.0 * LARGE, (FIRST + 1, 180, 220)))) == 1
    assert told(looks(2.0 * LARGE, (FIRST + 1, 180))) == []
    assert told(looks(2.0 * LARGE), loss=np.where(np.arange(N) < 10, 1.0, 0.09)) == []


@pytest.mark.parametrize(("count", "alarm"), [(LEAST - 1, False), (LEAST, True)])
def test_a_few_tensors_measure_nothing(count: int, alarm: bool) -> None:
    values = {f"update/ratio/{i}": 0.5 * SMALL for i in range(count)} | {"update/ratio_median": 0.5 * SMALL}
    assert bool(told([Row(step=step, values=values) for step in range(40, N, 60)])) == alarm


COLUMNS = ("update/ratio_median", "update/ratio/a", "adam/below_eps/a", "grad/norm", "train/lr", "monitor/overhead")


@pytest.mark.parametrize("name", hostile(()))
def test_numbers_that_make_no_sense_raise_nothing(name: str) -> None:
    assert told_of(Pace, hostile(COLUMNS)[name]) == []
    small = [Row(step=r.step, values=r.values | {"update/ratio/a": 1e-6}) for r in hostile(())[name]]
    if name.startswith("loss is"):
        assert told_of(Pace, small) == []
