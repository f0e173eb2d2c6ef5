"""Parameters that take no part in training."""

from __future__ import annotations

import pytest

from dyntune.detect.steps import BLOCK
from dyntune.detect.unwired import EARLY, LASTING, PART, Unwired
from dyntune.monitor.alerts import Alert, Cause
from dyntune.monitor.rows import Row
from tests.detect.series import hostile, run_of_rows, told_of

FROZEN, UNREACHED, UNHELD = "grad/frozen", "grad/unreached", "update/unheld"
KINDS = {FROZEN: "frozen", UNREACHED: "disconnected", UNHELD: "not-updated"}


def wired(step: int, kind: str, *names: str, share: float = 0.3, leading: int = 0) -> Row:
    values = {kind: float(len(names)), f"{kind}/share": share}
    values |= {f"{UNREACHED}/leading": float(leading)} if kind == UNREACHED else {}
    return Row(step=step, values=values, labels={kind: "\n".join(names)})


def told(*changes: Row, steps: int = 500, first: int = 0) -> list[Alert]:
    return told_of(Unwired, run_of_rows(steps, extra=changes, first=first))


@pytest.mark.parametrize("first", [0, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_what_begins_in_mid_training_is_said_once_with_its_names(kind: str, first: int) -> None:
    (alert,) = told(wired(first + 200, kind, "a", "b"), first=first)
    assert (alert.kind, alert.severity, alert.where) == (KINDS[kind], "critical", ("a", "b"))
    assert alert.since == first + 200
    assert alert.cause is {FROZEN: Cause.FROZEN, UNREACHED: Cause.DISCONNECTED, UNHELD: Cause.FROZEN}[kind]
    assert first + 200 + LASTING <= alert.step < first + 200 + LASTING + BLOCK
    assert "30.0%" in alert.text
    assert "a, b" in alert.text


def test_it_has_to_last() -> None:
    end = 7 * BLOCK - 1  # the last step of a block
    assert len(told(wired(end - LASTING, FROZEN, "a"), steps=end + 1)) == 1
    assert told(wired(end - LASTING + 1, FROZEN, "a"), steps=end + 1) == []


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_take_turns_raise_no_alarm(kind: str) -> None:
    turns = [wired(step, kind, f"expert.{i % 4}") for i, step in enumerate(range(10, 460, LASTING - 1))]
    assert told(*turns) == []
    assert told(wired(200, kind, "a"), wired(250, kind)) == []


@pytest.mark.parametrize(("share", "severity"), [(0.99 * PART, "warning"), (PART, "critical")])
@pytest.mark.parametrize("kind", KINDS)
def test_small_parts_are_a_warning(kind: str, share: float, severity: str) -> None:
    (alert,) = told(wired(200, kind, "a", share=share))
    assert alert.severity == severity


def test_what_is_frozen_from_the_start_is_meant() -> None:
    assert told(wired(EARLY, FROZEN, "a", "b")) == []
    assert len(told(wired(EARLY + 1, FROZEN, "a", "b"))) == 1
    assert told(wired(3, FROZEN, "a", "b"), wired(200, FROZEN, "a")) == []  # unfrozen step by step
    (alert,) = told(wired(3, FROZEN, "a"), wired(200, FROZEN, "a", "b"))
    assert alert.since == 200


@pytest.mark.parametrize(
    ("leading", "share", "severity"), [(2, 0.3, "critical"), (1, 0.3, "warning"), (2, 0.5 * PART, "warning")]
)
def test_no_gradient_ever_is_critical_where_it_is_the_first_tensors(leading: int, share: float, severity: str) -> None:
    (alert,) = told(wired(3, UNREACHED, "a", "b", leading=leading, share=share))
    assert (alert.severity, alert.cause) == (severity, Cause.DISCONNECTED)
    assert "ever" in alert.text


def test_each_change_is_said_for_itself() -> None:
    found = told(wired(100, FROZEN, "a"), wired(300, FROZEN, "a", "b"))
    assert [alert.where for alert in found] == [("a",), ("a", "b")]
    kinds = told(wired(100, FROZEN, "a"), wired(100, UNHELD, "b"))
    assert {alert.kind for alert in kinds} == {"frozen", "not-updated"}


@pytest.mark.parametrize("name", hostile(()))
def test_numbers_that_make_no_sense_raise_nothing(name: str) -> None:
    columns = [column for kind in KINDS for column in (kind, f"{kind}/share")] + [f"{UNREACHED}/leading"]
    assert told_of(Unwired, hostile(columns, dict.fromkeys(KINDS, "a"))[name]) == []
