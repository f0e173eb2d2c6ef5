"""The story of a run: what it says first, what it leaves out, and that it stands on what the record holds."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

import dyntune
from dyntune.errors import InvalidArgumentError, RunFileError
from dyntune.monitor.alerts import Cause
from dyntune.monitor.run import BadLine, Event, Row, Run
from dyntune.monitor.story import explain
from dyntune.monitor.telling import CAUSES, clause, listed, plain, sentence
from tests.report.runs import HOSTILE_NAMES, monitored


def alert(step: int | None, **detail: Any) -> Event:
    about = {"kind": "diverged", "severity": "critical", "text": "the loss has outgrown its start.", "advice": "Stop."}
    return Event(name="alert", step=step, detail=about | detail)


def explained(cause: str | None = "lr too high", *, window: Any = (250, 313), **detail: Any) -> Event:
    rows = [
        {"change": "nothing changed", "rise": 3.25, "averts": False},
        {"change": "batch of step 299 left out", "rise": 3.0, "averts": False},
        {"change": "learning rate held where it was", "rise": -0.01, "averts": True},
        {"change": "learning rate / 16", "rise": 0.02, "averts": True},
    ]
    about = {"alert": {"kind": "diverged", "step": 310, "severity": "critical"}, "verdict": "averted", "cause": cause}
    about |= {"window": window, "where": [], "causes": [cause], "evidence": rows, "text": ""}
    return Event(name="explained", step=313, detail=about | detail)


def run(*events: Event, losses: list[float] | None = None, closed: bool = True, **about: Any) -> Run:
    """The loss falls from 2 to 0.5 over 300 steps, then rises to 8, unless other losses are given."""
    if losses is None:
        losses = [2.0 - 1.5 * min(i / 250, 1.0) for i in range(300)] + [0.5 + 0.075 * i for i in range(101)]
    rows = [Row(step=i, values={"train/loss": x, "train/lr": 0.1}) for i, x in enumerate(losses)]
    end = [Event(name="closed", step=None, detail={})] if closed else []
    return Run(rows=rows, events=(*events, *end), provenance={"what": "Monitor"}, **about)


# -- a run that failed -------------------------------------------------------------------------------------------------


def test_the_parts_come_in_the_order_of_the_tale() -> None:
    """Health, what went wrong, what it did, why, on what evidence, where, what else, what to do, whom to ask."""
    told = explain(
        run(
            alert(
                310,
                since=300,
                causes=["lr too high", "bad batches"],
                where=["head.weight"],
                evidence={"train/loss": 0.875, "start": 2.0, "raised": 30.0},
                recommender="dyntune.suggest_lr",
                advice="Lower the learning rate.",
            )
        )
    )
    parts = [
        "Training was healthy until step 299: the loss fell from 1.94 to 0.5.",
        "At step 300, noticed at step 310, something went wrong: the loss has outgrown its start.",
        "The loss rose to 8 (step 400) and is 7.66 at the end, step 400.",
        "The likeliest cause is that the learning rate is too high.",
        "Evidence: loss 0.875, loss at the start 2, factor on the learning rate 30.",
        "It shows in head.weight.",
        "Less likely: a batch, or several, is damaged or of another kind than the others.",
        "What to do: Lower the learning rate.",
        "dyntune.suggest_lr measures a better value.",
    ]
    assert told.text == " ".join(parts)
    assert (told.since, told.cause, told.where) == (300, "lr too high", ("head.weight",))
    assert str(told) == told.text


def test_the_earliest_critical_alarm_is_the_story() -> None:
    """By where its trouble began, not by when it was noticed; warnings and later ones get a sentence."""
    told = explain(
        run(
            alert(290, severity="warning", text="the loss jumped. A lot."),
            alert(330, text="the loss is nan. It had grown."),
            alert(360, since=300, text="the loss has lost its way."),
            alert(370, severity="warning", text="the gradient is long."),
        )
    )
    assert told.first is not None
    assert told.first.step == 360
    assert [a.step for a in told.alarms] == [290, 360, 330, 370]
    assert "Before it: at step 290 the loss jumped (a warning)." in told.text
    assert "Later: at step 330 the loss is nan; at step 370 the gradient is long (a warning)." in told.text


def test_of_many_alarms_the_first_few_are_told() -> None:
    told = explain(run(*(alert(300 + i, text=f"number {i} is wrong.") for i in range(9))))
    assert "at step 304 number 4 is wrong and 4 more." in told.text
    assert "number 5" not in told.text


def test_without_a_critical_one_a_warning_is_told_as_one() -> None:
    told = explain(run(alert(300, severity="warning")))
    assert "something looked wrong (a warning)" in told.text


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([8.0, math.nan, math.nan], "The loss rose to 8 (step 300), and from step 301 on it is not a number any more."),
        ([math.nan] * 3, "From step 300 on the loss is not a number any more."),
        ([8.0] + [0.5] * 20, "The loss went up to 8 (step 300) and came back: it is 0.5 at the end."),
        ([8.0, 4.0], "The loss rose to 8 (step 300) and is 4 at the end, step 301."),
        ([], "something went wrong: the loss has outgrown its start. What caused it is not known."),
    ],
)
def test_what_became_of_the_loss(after: list[float], said: str) -> None:
    before = [2.0 - 1.5 * min(i / 250, 1.0) for i in range(300)]
    assert said in explain(run(alert(300), losses=before + after)).text


def test_what_was_wrong_from_the_beginning() -> None:
    assert "Training went wrong from the beginning." in explain(run(alert(0))).text
    flat = explain(run(alert(300), losses=[2.0] * 400)).text
    assert "Until step 299 nothing was noticed, but the loss hardly fell: 2 at the start, 2 then." in flat


def test_a_loss_that_never_moved_has_no_healthy_part() -> None:
    told = explain(run(alert(511, kind="no-progress", text="the loss has not moved."), losses=[2.25] * 600)).text
    assert told.startswith("At step 511 something went wrong: the loss has not moved.")
    assert "In all 600 steps its level went from 2.25 to 2.25." in told
    assert "healthy" not in told


@pytest.mark.parametrize("kind", ["not-updated", "disconnected"])
def test_what_was_never_connected_has_no_healthy_time_before_it(kind: str) -> None:
    told = explain(
        run(alert(95, kind=kind, since=25, text="nobody writes to a."), losses=[2.0 - i / 200 for i in range(200)])
    )
    assert told.text.startswith(
        "Something is wrong, seen from step 25 on: nobody writes to a. Over all steps the loss went"
    )
    assert "healthy" not in told.text
    assert told.since == 25


def test_the_layer_that_is_named_a_moment_later_is_named() -> None:
    told = explain(
        run(alert(300, kind="non-finite"), alert(308, kind="non-finite", since=300, where=["body.2"]), alert(320))
    )
    assert told.where == ("body.2",)
    assert "It shows in body.2." in told.text


def test_every_cause_has_words() -> None:
    assert set(CAUSES) == set(Cause)
    for words in CAUSES.values():
        assert words[0].islower() or words.startswith("Adam")
        assert not words.endswith(".")


def test_a_cause_of_a_later_version_is_told_as_it_is() -> None:
    assert "The likeliest cause is that moon in the wrong phase." in explain(
        run(alert(300, causes=["moon in the wrong phase"]))
    ).text  # fmt: skip


# -- replays -----------------------------------------------------------------------------------------------------------


def test_a_replay_that_averts_it_decides() -> None:
    told = explain(run(alert(310, since=300, causes=["bad batches", "lr too high"]), explained()))
    assert told.causes == ("lr too high", "bad batches")
    assert "The cause, as a replay shows, is that the learning rate is too high." in told.text
    assert (
        "Steps 250 to 313 were trained once more on a copy, with one change at a time: unchanged the loss rose by "
        "3.25, with learning rate held where it was it fell by 0.01." in told.text
    )


def test_what_to_do_is_about_the_cause_that_a_replay_found() -> None:
    lowered = alert(310, since=300, causes=["lr too high"], advice="Lower the learning rate.")
    told = explain(run(lowered, explained("bad batches"))).text
    assert "What to do: Look at those rows" in told
    assert "Lower the learning rate" not in told
    unheard = explain(run(lowered, explained("moon in the wrong phase"))).text
    assert "What to do: Lower the learning rate." in unheard


def test_batches_that_stand_out_are_named() -> None:
    words = "Step 310: x. The last 64 steps were trained again on a copy: {}. Those of steps 300: damaged rows."
    stands_out = "the batches at the end stand out by themselves, at parameters that never saw them"
    replayed = explained("bad batches", verdict="batches", evidence=[], text=words.format(stands_out))
    told = explain(run(alert(310, since=300), replayed)).text
    assert f"trained once more on a copy: {stands_out}. Those of steps 300: damaged rows. What to do" in told


def test_a_replay_that_began_too_late_does_not() -> None:
    told = explain(run(alert(310, since=200, causes=["bad batches"]), explained()))
    assert "What to do: Stop." in told.text
    assert told.causes == ("bad batches",)
    assert "after the trouble began" in told.text


def test_a_replay_that_found_nothing_says_so() -> None:
    told = explain(run(alert(310, since=300), explained(None, verdict="not_reproduced", evidence=[])))
    assert told.cause is None
    assert "the replay is not the training itself, so it says nothing." in told.text


def test_the_replay_of_the_same_alarm_is_preferred() -> None:
    other = explained("stale second moment", alert={"kind": "loss-spike", "step": 305, "severity": "warning"})
    assert explain(run(alert(310, since=300), other, explained())).cause == "lr too high"
    assert explain(run(alert(310, since=300), other)).cause == "stale second moment"
    assert explain(run(alert(310, since=200), other)).cause is None  # it began before what was replayed


def test_a_loss_that_was_no_number_in_a_replay() -> None:
    rows = [{"change": "x", "rise": None, "averts": False}, {"change": "full precision", "rise": 0.0, "averts": True}]
    told = explain(run(alert(310, since=300), explained("not finite", evidence=rows)))
    assert "unchanged the loss stopped being a number, with full precision it fell by 0." in told.text


# -- a run without an alarm --------------------------------------------------------------------------------------------


def test_no_alarm_is_said_with_what_was_not_measured() -> None:
    told = explain(
        run(
            Event(name="blind", step=None, detail={"signal": "bursts", "reason": "too short"}),
            Event(name="blind", step=9, detail={"signal": "bursts", "reason": "again"}),
            Event(name="disabled", step=9, detail={"part": "detectors", "reason": "ValueError: no"}),
            losses=[2.0 - i / 100 for i in range(100)],
        )
    )
    assert told.text.startswith("No alarm was raised in 100 steps, 0 to 99: the loss went from 1.96 to 1.06.")
    assert told.blind == (("bursts", "too short"), ("detectors", "switched off: ValueError: no"))
    assert "  bursts: too short\n  detectors: switched off: ValueError: no" in told.text
    assert (told.cause, told.since, told.first) == (None, None, None)


def test_no_alarm_does_not_mean_no_harm() -> None:
    """A loss that ended as NaN is told with what to do, whoever did not watch."""
    told = explain(run(losses=[1.0] * 50 + [math.nan] * 5)).text
    assert "Diverged: the loss has not been finite since step 50" in told
    assert "Go back to a checkpoint from before step 50" in told


def test_an_empty_run() -> None:
    assert explain(Run(rows=())).text == "Nothing was recorded yet, so there is nothing to tell."
    alone = explain(Run(rows=(), events=(alert(None, text="it is late."),)))
    assert "At some step something went wrong: it is late." in alone.text
    with pytest.raises(InvalidArgumentError, match="nothing to draw"):
        alone.plot()


# -- logs of all sorts -------------------------------------------------------------------------------------------------


def test_a_record_that_was_not_closed() -> None:
    said = "The record was not closed: the training is still running, or it was killed."
    assert said in explain(run(alert(310), closed=False)).text
    assert said in explain(run(closed=False)).text
    assert said not in explain(run(alert(310))).text
    stopped = Event(name="stopped", step=9, detail={"error": "FloatingPointError"})
    assert "The loop was left by FloatingPointError." in explain(run(alert(310), stopped)).text


def test_damage_is_said() -> None:
    hurt = run(alert(310), gaps=1, torn=1, quarantined=(BadLine(3, "no JSON", "x"),))
    assert "The log is damaged in 3 places" in explain(hurt).text


def test_alarms_of_steps_that_were_made_again_do_not_count() -> None:
    """Training died at 320 and went on from the checkpoint of step 250; what was before that still counts."""
    resumed = Event(name="resumed", step=250, detail={}, attempt=1)
    assert explain(run(alert(310), resumed, attempts=2)).first is None
    assert explain(run(alert(240), resumed, attempts=2)).since == 240
    again = dataclasses.replace(alert(310), attempt=1)
    assert explain(run(alert(260), resumed, again, attempts=2)).since == 310


def test_of_several_processes_the_first_in_trouble_is_told_of() -> None:
    calm, late, early = run(rank=0, world=4), run(alert(350), rank=1, world=4), run(alert(310), rank=2, world=4)
    whole = dataclasses.replace(calm, ranks={0: calm, 1: late, 2: early}, missing=(3,))
    told = explain(whole)
    assert told.text.startswith("On rank 2 of 4 trouble began first.")
    assert told.since == 310
    assert told.run is early
    assert "Of 4 processes, 1 left no log." in told.text
    both = dataclasses.replace(early, ranks={1: late, 2: early})
    assert "trouble began first" not in explain(both).text


def test_paths_and_monitors_are_read(tmp_path: Any) -> None:
    import torch

    model = torch.nn.Linear(2, 1)
    path = tmp_path / "run.jsonl"
    with dyntune.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), log=path) as monitor:
        monitor.observe(1.0)
        live = dyntune.explain(monitor)
    assert "Nothing was recorded yet" in live.text
    assert "not closed" in live.text
    assert "not closed" not in dyntune.explain(path).text
    assert dyntune.explain(str(path)).text == dyntune.explain(dyntune.load_run(path)).text
    with pytest.raises(RunFileError):
        dyntune.explain(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("words", HOSTILE_NAMES)
def test_whatever_the_log_says_the_text_is_plain(words: str) -> None:
    """Control characters, markup, names without end: every text of every event is one that a terminal can show."""
    detail = {"text": words, "advice": words, "causes": [words], "where": [words], "evidence": {words: words}}
    told = explain(run(alert(310, **detail), explained(words, where=[words], verdict=words), alert(320, text=words)))
    assert told.text.isprintable()
    assert len(told.text) < 6000
    json.dumps(told.to_dict(), allow_nan=False)
    for kind in ("healthy", "edge", "diverging"):
        assert explain(monitored(kind, words=words)).text.replace("\n", "").isprintable()


@pytest.mark.parametrize("odd", [None, 3, 1.5, [], {}, "x", True, [None], {"a": [1]}])
def test_details_of_any_type_are_survived(odd: Any) -> None:
    keys = ("kind", "severity", "text", "advice", "evidence", "causes", "where", "since", "recommender")
    for key in keys:
        assert explain(run(alert(310, **{key: odd}))).text
    for key in ("alert", "verdict", "cause", "window", "where", "evidence"):
        assert explain(run(alert(310), explained(**{key: odd}))).text


def test_words() -> None:
    assert plain("a\x1b[31m\nb") == "a\ufffd[31m b"
    assert plain("w" * 3000)[-1] == "…"
    assert sentence("so it is (a guess)") == "So it is (a guess)"
    assert clause("the loss jumped to 1.5 from 0.5, 9 standard deviations. More.") == (
        "the loss jumped to 1.5 from 0.5, 9 standard deviations"
    )
    assert listed(range(5), most=2) == "0, 1 and 3 more"
