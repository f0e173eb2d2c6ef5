"""Settings of the optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dyntune.detect.configured import (
    APART,
    FAR_APART,
    FORGETS,
    FORGETS_SOON,
    LEAST,
    OTHER,
    SHARE,
    STOPPED,
    Configured,
)
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row
from tests.detect.series import hostile, run_of_rows, told_of

LR = 0.1


def settings(step: int = 2, **numbers: float) -> Row:
    """``weight_decay_1=...`` is that of the second group."""
    names = {name: name.removesuffix("_1") + "/1" * name.endswith("_1") for name in numbers}
    return Row(
        step=step, values={f"optimizer/{names[n]}": x for n, x in numbers.items()}, labels={"group/1": "head.w\nhead.b"}
    )


def told(*extra: Row, lr: Any = LR, group: Any = None, steps: int = 128, first: int = 0) -> list[Alert]:
    columns = {"train/lr": lr} | ({} if group is None else {"train/lr/1": group})
    return told_of(Configured, run_of_rows(steps, columns, extra, first=first))


@pytest.mark.parametrize(
    ("beta2", "severity"), [(0.9, None), (0.899, "warning"), (0.811, "warning"), (0.809, "critical"), (0.0, "critical")]
)
@pytest.mark.parametrize("first", [0, 5000])
def test_beta2_has_to_be_above_beta1(beta2: float, severity: str | None, first: int) -> None:
    found = told(settings(first + 2, beta1=0.9, beta2=beta2), first=first)
    assert [alert.severity for alert in found] == ([] if severity is None else [severity])
    for alert in found:
        assert (alert.step, alert.cause) == (first + 2, Cause.BETA2_TOO_SMALL)


def test_beta2_is_said_where_it_is_changed_and_again_when_it_is_worse() -> None:
    found = told(
        settings(beta1=0.9, beta2=0.999), settings(50, beta1=0.9, beta2=0.85), settings(70, beta1=0.9, beta2=0.5)
    )
    assert [(alert.step, alert.severity) for alert in found] == [(50, "warning"), (70, "critical")]


def test_rmsprop_has_no_beta1() -> None:
    assert told(settings(beta2=0.5)) == []


@pytest.mark.parametrize(("forgets", "severity"), [(FORGETS, "warning"), (FORGETS_SOON, "critical")])
@pytest.mark.parametrize("adam", [True, False])
def test_weight_decay_of_a_group_is_judged_by_what_it_leaves(forgets: float, severity: str, adam: bool) -> None:
    """1 / (lr wd) steps; with SGD's momentum of 0.9 a tenth of that."""
    numbers = {"beta1": 0.9, "beta2": 0.999} if adam else {"momentum": 0.9}
    decay = (1.0 if adam else 0.1) / (LR * forgets)
    below = told(settings(weight_decay=0.0, weight_decay_1=0.99 * decay, **numbers))
    (above,) = told(settings(weight_decay=0.0, weight_decay_1=1.01 * decay, **numbers))
    assert (above.severity, above.cause, above.where) == (severity, Cause.GROUP_WEIGHT_DECAY, ("head.w", "head.b"))
    assert above.step == 2
    assert severity not in [alert.severity for alert in below]


def test_weight_decay_has_to_be_another_one_than_that_of_the_first_group() -> None:
    own = 2.0 / (LR * FORGETS_SOON)
    assert told(settings(weight_decay=own)) == []
    assert told(settings(weight_decay=1.01 * own / OTHER, weight_decay_1=own)) == []
    assert len(told(settings(weight_decay=0.99 * own / OTHER, weight_decay_1=own))) == 1
    assert told(settings(weight_decay=own, weight_decay_1=0.0)) == []  # biases and norms


def test_weight_decay_follows_the_warm_up_row_by_row() -> None:
    ramp = LR * np.arange(1, 129) / 128
    decay = 1.99 / (LR * FORGETS_SOON)
    warning, critical = told(settings(weight_decay=0.0, weight_decay_1=decay, beta2=0.99), lr=ramp)
    # The rate passes 1 / FORGETS and 1 / FORGETS_SOON at a tenth and at half of the ramp.
    assert [(alert.severity, alert.step) for alert in (warning, critical)] == [("warning", 12), ("critical", 64)]


def ratios(apart: float) -> list[Row]:
    """A look in which the second group changes so much more than the others."""
    values = {"update/ratio_median": 1e-3} | {f"update/ratio/{n}": 1e-3 for n in ("a", "b")}
    return [Row(step=20, values=values | {f"update/ratio/head.{n}": apart * 1e-3 for n in ("w", "b")})]


@pytest.mark.parametrize(
    ("factor", "apart", "severity"),
    [
        (0.99 * APART, 100.0, None),
        (1.01 * APART, 100.0, "warning"),
        (0.99 * FAR_APART, 100.0, "warning"),
        (1.01 * FAR_APART, 100.0, "critical"),
        (1.01 * FAR_APART, 9.9, "warning"),
        (1.01 * FAR_APART, 10.1, "critical"),
        (1.01 * FAR_APART, 0.01, "warning"),  # the other way round
        (0.99 / FAR_APART, 0.01, "critical"),
        (0.99 / FAR_APART, 0.0, "critical"),
    ],
)
def test_learning_rate_of_a_group(factor: float, apart: float, severity: str | None) -> None:
    found = told(settings(eps=1e-8), *ratios(apart), group=factor * LR)
    assert [alert.severity for alert in found] == ([] if severity is None else [severity])
    for alert in found:
        assert (alert.cause, alert.where) == (Cause.GROUP_LR, ("head.w", "head.b"))


def test_layer_wise_rates_are_meant() -> None:
    extra = [Row(step=i, values={"train/lr": LR, "train/lr/2": 7.0 * LR}) for i in range(0, 128, 5)]
    assert told(settings(eps=1e-8), *ratios(100.0), *extra, group=50.0 * LR) == []


@pytest.mark.parametrize(("low", "alarm"), [(1.1 * STOPPED, False), (0.9 * STOPPED, True)])
def test_a_learning_rate_that_ended_early(low: float, alarm: bool) -> None:
    """Below its threshold from step 200 on; a third of the run is reached at step 300, and 319 ends a block."""
    found = told(lr=np.where(np.arange(500) < 200, LR, low * LR), steps=500)
    assert [(alert.kind, alert.severity, alert.step) for alert in found] == (
        [("lr-ended", "critical", 319)] if alarm else []
    )
    for alert in found:
        assert (alert.cause, alert.since) == (Cause.LR_TOO_LOW, 199)


def test_the_end_of_a_schedule_is_no_early_end() -> None:
    count = 2000
    last = int(count * (1.0 - SHARE)) + 2
    assert told(lr=np.where(np.arange(count) < last, LR, 0.0), steps=count) == []
    assert told(lr=LR * 0.5 * (1.0 + np.cos(np.pi * np.arange(count) / count)), steps=count) == []
    assert told(lr=np.where(np.arange(LEAST - 1) < 20, LR, 0.0), steps=LEAST - 1) == []


def test_of_cycles_the_latest_counts() -> None:
    cycle = np.where(np.arange(1000) % 250 < 150, LR, 0.0)
    assert told(lr=cycle, steps=1000) == []


COLUMNS = (
    "train/lr",
    "train/lr/1",
    *(f"optimizer/{n}{g}" for n in ("beta1", "beta2", "weight_decay") for g in ("", "/1")),
)


@pytest.mark.parametrize("name", hostile(()))
def test_numbers_that_make_no_sense_raise_nothing(name: str) -> None:
    assert told_of(Configured, hostile(COLUMNS, {"group/1": "a"})[name]) == []
