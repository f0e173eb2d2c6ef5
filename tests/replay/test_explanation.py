"""What replays mean, in the words of the detectors' vocabulary."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest

from dyntune.monitor.alerts import Cause
from dyntune.replay.changes import (
    Beta2,
    Change,
    Clip,
    Drop,
    Eps,
    Freeze,
    FreshMoments,
    FullPrecision,
    GroupLr,
    NoDecay,
    ScaleLr,
    SettingsHeld,
)
from dyntune.replay.explanation import explain
from dyntune.replay.investigating import Replays
from dyntune.replay.verdict import Verdict

CHANGES: list[Change] = [
    FullPrecision(),
    Drop(frozenset({7})),
    SettingsHeld(),
    NoDecay(0, ("a",)),
    Beta2(0.95, shorter=True),
    Beta2(0.999, shorter=False),
    FreshMoments(),
    Eps(1e-5),
    GroupLr(1, 16.0, ("b",)),
    Freeze("a", ("a.weight",)),
    Clip(2.0),
    ScaleLr(2.0),
    ScaleLr(4.0),
    ScaleLr(16.0),
]


@dataclass
class Alarm:
    step: int = 9
    text: str = "the loss is nan."


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_every_cause_is_in_the_vocabulary_and_has_advice(change: Change) -> None:
    """And the sentence names the change."""
    replays = Replays(Verdict.AVERTED, rise=2.0, margin=0.1, num_steps=32, tried=((change, -0.5, True),))
    found = explain(Alarm(), replays)
    assert found.cause in set(Cause)
    assert f"With {change.name} and all else the same, it fell by 0.5: the cause is {found.cause}." in found.text
    assert found.where == change.where


def test_changes_are_ordered_by_size() -> None:
    """The list above is the order."""
    sizes = [change.size for change in CHANGES]
    assert sizes == sorted(sizes)


def test_the_smallest_change_is_the_cause() -> None:
    """Larger ones that avert it, too, are told as such."""
    tried = ((CHANGES[1], 3.0, False), (CHANGES[4], 0.0, True), (ScaleLr(2.0), -0.1, True))
    found = explain(Alarm(), Replays(Verdict.AVERTED, rise=math.inf, margin=0.1, num_steps=32, tried=tried))
    assert found.cause == "stale second moment"
    assert found.causes == ("stale second moment", "lr too high")
    assert "1 larger change would have done so, too." in found.text
    assert "stopped being finite" in found.text
    assert [row.averts for row in found.evidence] == [False, False, True, True]
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["evidence"][0] == {"change": "nothing changed", "rise": None, "averts": False}
    assert "beta2 = 0.95: loss +0, averted" in str(found)


@pytest.mark.parametrize(
    "verdict", [Verdict.NOT_REPRODUCED, Verdict.TOO_SHORT, Verdict.NOTHING_TO_AVERT, Verdict.NOTHING_AVERTS]
)
def test_no_cause_without_a_verdict(verdict: Verdict) -> None:
    """And the text says why."""
    tried = ((ScaleLr(2.0), 3.0, False),) if verdict is Verdict.NOTHING_AVERTS else ()
    found = explain(Alarm(), Replays(verdict, reason="Because.", rise=0.2, margin=0.3, num_steps=32, tried=tried))
    assert found.cause is None
    assert found.causes == ()
    assert {
        Verdict.NOT_REPRODUCED: "says nothing. Because.",
        Verdict.TOO_SHORT: "too short to say. Because.",
        Verdict.NOTHING_TO_AVERT: "so there was nothing to avert",
        Verdict.NOTHING_AVERTS: "None of 1 single changes averts it",
    }[verdict] in found.text


def test_batches_that_stand_out_are_the_cause() -> None:
    """Whatever training did after them."""
    found = explain(Alarm(), Replays(Verdict.BATCHES, reason="Those of steps 3, 4.", num_steps=32))
    assert found.cause == "bad batches"
    assert found.causes == ("bad batches", "labels do not belong to inputs")
    assert set(found.causes) <= set(Cause)
