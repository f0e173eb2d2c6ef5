"""A gradient that outgrows everything before."""

from __future__ import annotations

import numpy as np
import pytest

from dyntune.detect.growth import FIRST, GREW, LAG, LASTING, REMEMBERS, GradientGrowth
from dyntune.detect.steps import BLOCK
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row
from tests.detect.series import Array, hostile, run_of_rows, told_of

BEFORE = FIRST + LAG


def told(*levels: float, extra: tuple[Row, ...] = (), first: int = 0) -> list[Alert]:
    """A norm for each block."""
    norm = np.repeat(np.array(levels), BLOCK)
    return told_of(GradientGrowth, run_of_rows(norm.size, {"grad/norm": norm}, extra, first=first))


@pytest.mark.parametrize(("factor", "alarm"), [(0.99 * GREW, False), (1.01 * GREW, True)])
@pytest.mark.parametrize("first", [0, 5000])
def test_growth_of_two_blocks_is_said_once(factor: float, alarm: bool, first: int) -> None:
    found = told(*[1.0] * BEFORE, *[factor] * 8, first=first)
    assert [(alert.kind, alert.severity, alert.step, alert.since) for alert in found] == (
        [("gradient-growth", "critical", first + (BEFORE + 2) * BLOCK - 1, first + BEFORE * BLOCK)] if alarm else []
    )
    for alert in found:
        assert alert.causes == (Cause.EXPLODING, Cause.LR_TOO_HIGH)
        assert alert.evidence["before"] == 1.0


def test_one_block_is_none_and_neither_is_growth_at_first() -> None:
    assert LASTING == 2
    assert told(*[1.0] * BEFORE, 2.0 * GREW, *[1.0] * 4) == []
    assert told(*[1.0] * (FIRST - 1), *[2.0 * GREW] * 12) == []


def test_a_gradient_that_was_as_long_before_has_not_grown() -> None:
    assert told(1.0, 2.0, *[1.0] * BEFORE, *[1.9 * GREW] * 4) == []


def test_slow_growth_is_compared_with_what_was_a_while_ago() -> None:
    """The level before is that of five blocks ago."""
    limit = GREW ** (1.0 / (LAG + 1))
    assert len(told(*((1.02 * limit) ** i for i in range(3 * BEFORE)))) == 1
    assert told(*((0.98 * limit) ** i for i in range(3 * BEFORE))) == []


def look(**values: float) -> Row:
    names = {"attention": "attention/max_logit", "logits": "logits/max_abs", "beta2": "optimizer/beta2"}
    return Row(step=3, values={names[name]: x for name, x in values.items()})


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (look(attention=101.0, logits=101.0), Cause.ATTENTION_LOGITS),
        (look(attention=99.0, logits=101.0), Cause.OUTPUT_LOGITS),
        (look(beta2=REMEMBERS), Cause.STALE_SECOND_MOMENT),
        (look(beta2=0.99 * REMEMBERS), Cause.EXPLODING),
    ],
)
def test_what_explains_it(row: Row, cause: Cause) -> None:
    (alert,) = told(*[1.0] * BEFORE, *[2.0 * GREW] * 4, extra=(row,))
    assert alert.cause is cause


@pytest.mark.parametrize("every", [6, 16])
def test_a_norm_at_some_steps_is_enough(every: int) -> None:
    norm: Array = np.repeat(np.array([*[1.0] * BEFORE, *[2.0 * GREW] * 4]), BLOCK)
    norm[np.arange(norm.size) % every > 0] = np.nan
    assert len(told_of(GradientGrowth, run_of_rows(norm.size, {"grad/norm": norm}))) == 1


@pytest.mark.parametrize("name", hostile(()))
def test_numbers_that_make_no_sense_raise_nothing(name: str) -> None:
    assert told_of(GradientGrowth, hostile(("grad/norm", "attention/max_logit", "optimizer/beta2"))[name]) == []


def test_a_gradient_of_zero_has_not_grown() -> None:
    assert told(*[0.0] * (2 * BEFORE), *[5.0] * 4) == []
