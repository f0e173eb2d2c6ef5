"""What detectors share of a run."""

from __future__ import annotations

import math

import pytest

from dyntune.detect import default_detectors
from dyntune.detect.course import Course, Moment
from dyntune.detect.steps import BLOCK
from dyntune.monitor.rows import Row, Rows
from tests.detect.series import PIECES, hostile, run_of_rows, told_of


def moments(rows: list[Row], size: int = 10_000) -> list[Moment]:
    course = Course()
    return [found for at in range(0, len(rows), size) for found in course.take(Rows.of(rows[at : at + size]))]


def story(rows: list[Row], size: int) -> list[object]:
    return [(m.step, m.settings, m.wired, m.new, m.known.latest, m.first, m.seen.changed) for m in moments(rows, size)]


@pytest.fixture
def rows() -> list[Row]:
    extra = [
        Row(step=2, values={"optimizer/eps": 1e-8, "optimizer/eps/1": 1e-4}, labels={"group/1": "a\nb"}),
        Row(step=31, values={"optimizer/eps": 1e-6}),
        Row(step=63, values={"grad/frozen": 1.0}, labels={"grad/frozen": "a"}),
        Row(step=95, values={"units/dead/0": 0.5, "units/dead_max": 0.5, "monitor/overhead": 0.1}),
    ]
    lr = [0.1 if i < 150 else 0.2 for i in range(5 * BLOCK)]
    group = [0.1 if i < 100 else 0.3 for i in range(5 * BLOCK)]
    return run_of_rows(5 * BLOCK, {"train/lr": lr, "train/lr/1": group}, extra)


@pytest.mark.parametrize("size", PIECES)
def test_what_is_known_does_not_depend_on_how_rows_are_cut(rows: list[Row], size: int) -> None:
    assert story(rows, size) == story(rows, 10_000)


def test_what_a_row_says_counts_from_the_block_that_is_full_after_it(rows: list[Row]) -> None:
    """The row of a step may be written before or after the step's own: the block's last one is for the next block."""
    found = moments(rows)
    assert [m.step for m in found] == [31, 63, 95, 127, 159]
    assert [m.settings.of("eps") for m in found] == [1e-8, 1e-6, 1e-6, 1e-6, 1e-6]
    assert [len(m.wired) for m in found] == [0, 0, 1, 0, 0]
    assert [len(m.new) for m in found] == [0, 0, 0, 1, 0]
    assert [m.settings.furthest_rate for m in found] == pytest.approx([1.0, 1.0, 1.0, 3.0, 1.5])


def test_a_number_of_a_group_is_gone_with_the_next_of_the_first(rows: list[Row]) -> None:
    found = moments(rows)
    assert [m.settings.of("eps", 1) for m in found[:2]] == [1e-4, 1e-6]
    assert found[-1].settings.groups == {1: ("a", "b")}
    assert math.isnan(found[0].settings.of("beta2", 1))


def test_rows_without_a_loss_are_no_steps() -> None:
    settings = [Row(step=i, values={"optimizer/eps": float(i + 1)}) for i in range(40)]
    assert [m.step for m in moments(run_of_rows(64, extra=settings))] == [31, 63]


def test_a_loss_of_nan_is_a_step_all_the_same() -> None:
    rows = run_of_rows(64, {"train/loss": [math.nan if i < 40 else 1.0 for i in range(64)]})
    look = Row(step=50, values={"units/dead/0": 0.5, "units/dead_max": 0.5, "monitor/overhead": 0.1})
    assert [m.step for m in moments(rows)] == [m.step for m in moments([*rows, look])] == [31, 63]


def test_the_first_steps_are_those_of_the_run_wherever_it_begins() -> None:
    rows = run_of_rows(320, {"train/loss": [3.0 if i == 5 else 1.0 for i in range(320)]}, first=5000)
    last = moments(rows)[-1].first
    assert (last.begun, last.start, last.highest_loss, last.threw) == (5000, 1.0, 3.0, True)
    rows = run_of_rows(320, {"train/loss": [3.0 if i == 200 else 1.0 for i in range(320)]})
    assert not moments(rows)[-1].first.threw


COLUMNS = ("grad/norm", "train/lr", "optimizer/eps", "train/lr/1", "grad/frozen", "units/dead/0", "monitor/overhead")


@pytest.mark.parametrize("name", hostile(()))
def test_numbers_that_make_no_sense_raise_nothing(name: str) -> None:
    """Of all detectors together; a run that is not finite is said to be that, and one at zero not to move."""
    found = told_of(default_detectors, hostile(COLUMNS, {"grad/frozen": "a", "group/1": "a"})[name][:400])
    assert {alert.kind for alert in found} <= {"non-finite"}
