"""What replays said of alarms, from the record: :class:`Answer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dyntune.monitor.alarms import Alarm, taken_back, texts
from dyntune.monitor.run import Event, Run
from dyntune.monitor.telling import number, plain

__all__ = ["Answer", "answer"]


@dataclass(frozen=True)
class Answer:
    """What a replay said of an alarm.

    Args:
        text: In words.
        cause: None where it names none, or began too late to.
        where: Parameters at fault.
        advice: What to do about that cause; empty where none is named.
    """

    text: str
    cause: str | None
    where: tuple[str, ...]
    advice: str = ""


def answer(run: Run, first: Alarm) -> Answer | None:
    """The replay of an alarm, or else of another one whose window holds where it began; None without."""
    kept = [event for event in run.events if event.name == "explained" and not taken_back(run, event)]
    own = [event for event in kept if _is_of(event, first)]
    event = next(iter(own or [event for event in kept if _spans(event, first.since)]), None)
    if event is None:
        return None
    detail = event.detail
    ends = _window(event)
    late = ends is not None and first.since is not None and ends[0] > first.since
    found = detail.get("evidence")
    rows = [row for row in found if isinstance(row, Mapping)] if isinstance(found, (list, tuple)) else []
    trained = f"Steps {ends[0]:,} to {ends[1]:,}" if ends else "The steps"
    said = f"{trained} were trained once more on a copy"
    cause = detail.get("cause")
    averting = next((row for row in rows if row.get("averts") is True), None)
    if averting is not None and cause:
        said += (
            f", with one change at a time: unchanged the loss {_moved(rows[0])}, with "
            f"{plain(averting.get('change', 'one change'))} it {_moved(averting)}."
        )
        if late:
            said += " But that was after the trouble began, so it says what would have helped then, not what began it."
    else:
        verdict = _verdict(detail.get("verdict"))
        said += f": {verdict}. {_reason(detail.get('text'), verdict)}".rstrip()
    named = None if late or not isinstance(cause, str) else plain(cause)
    if named is None:
        return Answer(said, None, ())
    return Answer(said, named, texts(detail.get("where")), _advice(named))


def _window(event: Event) -> tuple[int, int] | None:
    """First and last step that were made again."""
    ends = event.detail.get("window")
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or not all(isinstance(end, int) for end in ends):
        return None
    return ends[0], ends[1]


def _spans(event: Event, step: int | None) -> bool:
    ends = _window(event)
    return ends is not None and step is not None and ends[0] <= step <= ends[1]


def _is_of(event: Event, alarm: Alarm) -> bool:
    about = event.detail.get("alert")
    return isinstance(about, Mapping) and (about.get("kind"), about.get("step")) == (alarm.kind, alarm.step)


def _moved(row: Mapping[str, Any]) -> str:
    rise = row.get("rise")
    if not isinstance(rise, (int, float)):
        return "stopped being a number"
    return f"{'rose' if rise > 0 else 'fell'} by {number(abs(rise))}"


def _reason(text: object, verdict: str) -> str:
    """What the replay's own words say after its verdict, such as which batches stand out; empty where nothing."""
    return plain(str(text).partition(f"{verdict}. ")[2])


def _advice(cause: str) -> str:
    from dyntune.replay.explanation import ADVICE  # as below

    return ADVICE.get(cause, "")


def _verdict(name: object) -> str:
    from dyntune.replay.verdict import Verdict  # only where there is one

    known = str(name).upper()
    return Verdict[known].value if known in Verdict.__members__ else plain(name)
