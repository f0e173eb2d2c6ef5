"""What happened in a run, told for a reader who was not there: :func:`explain`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dyntune.monitor.alarms import Alarm, alarms
from dyntune.monitor.answers import Answer, answer
from dyntune.monitor.course import Course, course
from dyntune.monitor.load import load_run
from dyntune.monitor.run import Run
from dyntune.monitor.telling import CAUSES, capital, clause, column, counted, listed, number, plain, sentence
from dyntune.monitor.verdict import State, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Story", "explain"]

MOST_LATER = 4  # alarms that are told after the first one; the others are counted
MOST_EVIDENCE = 6  # numbers
MOST_BLIND = 8  # signals that were not measured
# What mostly holds from the beginning and is seen at the first look, whenever that is: that step tells no healthy time
# from a bad one, and the loss may fall all the same.
STANDING = ("not-updated", "disconnected")


class Recording(Protocol):
    """What holds a run, as a monitor does."""

    @property
    def run(self) -> Run:
        """What was recorded so far."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """What happened in a run.

    Args:
        text: One paragraph, and, for a run without an alarm, a line for each signal that was not measured.
        alarms: In the order in which their trouble began.
        first: The one that the story is about: the earliest critical one, else the earliest; None without any.
        cause: The likeliest, in the words of :class:`~dyntune.monitor.alerts.Cause`: what a replay found where it found
            one, else what the alarm says; None where neither does.
        causes: That and the others, the likeliest first.
        where: Parameters or layers; empty for the whole model.
        since: The step at which it began; None without an alarm.
        blind: (signal, reason) of what was not measured.
        run: What it is told of.
    """

    text: str
    alarms: tuple[Alarm, ...] = ()
    first: Alarm | None = None
    cause: str | None = None
    causes: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    since: int | None = None
    blind: tuple[tuple[str, str], ...] = ()
    run: Run = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def plot(self) -> Figure:
        """Loss, gradient norm and learning rate with the alarms, and up to two more columns of the evidence.

        Returns:
            A figure that pyplot does not know.

        Raises:
            InvalidArgumentError: The run has no column that could be drawn.
        """
        from dyntune.plots import plot_story

        alike = [a for a in self.alarms if self.first is not None and a.kind == self.first.kind]
        columns = tuple(dict.fromkeys(name for alarm in alike for name in alarm.evidence))
        others = [a for a in self.alarms if a is not self.first and a.critical and a.step is not None]
        return plot_story(
            self.run,
            since=self.since,
            noticed=None if self.first is None else self.first.step,
            others=tuple(a.step for a in others if a.step is not None),
            columns=columns,
            title=self._headline,
        )

    @property
    def _headline(self) -> str:
        if self.first is None:
            return "No alarm"
        cause = "" if self.cause is None else f"; {CAUSES.get(self.cause, plain(self.cause))}"
        return capital(f"{clause(self.first.text.split(': ')[0], most=70)}{cause}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON takes, without the run."""
        return {
            "text": self.text,
            "alarms": [{"kind": a.kind, "severity": a.severity, "step": a.step} for a in self.alarms],
            "cause": self.cause,
            "causes": list(self.causes),
            "where": list(self.where),
            "since": self.since,
            "blind": [list(pair) for pair in self.blind],
        }


def explain(source: Run | Recording | str | os.PathLike[str]) -> Story:
    """Tell what happened in a run: until when it was healthy, what went wrong first, why, and what to do.

    Args:
        source: A run, a monitor, or the path of a log (see :func:`dyntune.load_run`), whole or not, of any process. Of
            a run of several processes the one is told of in which trouble began first.

    Returns:
        The story; ``print`` it, or ``.plot()`` the evidence. It rests on the alarms that were raised, and so on the
        detectors: a run without an alarm need not be a good one. The words about causes are those of the detectors
        unless a replay (``Monitor(..., replay=K)``) tried them out.

    Raises:
        RunFileError: See :func:`dyntune.load_run`.

    Example:
        >>> from dyntune.monitor.run import Row
        >>> rows = [Row(step=i, values={"train/loss": 2.0 - i / 100}) for i in range(100)]
        >>> print(explain(Run(rows=rows)))
        No alarm was raised in 100 steps, 0 to 99: the loss went from 1.96 to 1.06. ...
    """
    run = source if isinstance(source, Run) else _run_of(source)
    found = {rank: alarms(part) for rank, part in (run.ranks or {run.rank: run}).items()}
    begun = {rank: _began(some) for rank, some in found.items() if some}
    lead = min(begun, key=lambda rank: (*begun[rank], rank != run.rank, rank)) if begun else run.rank
    told = run.ranks.get(lead, run)
    blind = tuple(_blind(told))
    raised = found.get(lead, ())
    if not raised:
        return Story(text=_uneventful(run, told, blind), blind=blind, run=told)
    return _eventful(run, told, raised, blind)


def _run_of(source: Recording | str | os.PathLike[str]) -> Run:
    return load_run(source) if isinstance(source, (str, os.PathLike)) else source.run


# -- what there is -----------------------------------------------------------------------------------------------------


def _began(raised: Sequence[Alarm]) -> tuple[bool, int]:
    """What a story is about comes first: critical before warnings, then by step."""
    first = _first(raised)
    return not first.critical, -1 if first.since is None else first.since


def _first(raised: Sequence[Alarm]) -> Alarm:
    return next((alarm for alarm in raised if alarm.critical), raised[0])


def _blind(run: Run) -> Iterator[tuple[str, str]]:
    seen = set()
    for event in run.events:
        signal, reason = event.detail.get("signal"), event.detail.get("reason")
        if event.name == "disabled":
            signal, reason = event.detail.get("part"), f"switched off: {reason}"
        elif event.name != "blind":
            continue
        if signal not in seen:
            seen.add(signal)
            yield plain(signal), plain(reason)


# -- how it is told ----------------------------------------------------------------------------------------------------


def _uneventful(run: Run, told: Run, blind: Sequence[tuple[str, str]]) -> str:
    if not len(told):
        return " ".join(["Nothing was recorded yet, so there is nothing to tell.", *_state(run, told)])
    steps = told.steps
    found, judged = course(told), verdict(told)
    went = "the loss was not recorded" if found is None else found.from_to()
    said = [
        f"No alarm was raised in {counted(int(steps.max() - steps.min()) + 1, 'step')}, {int(steps.min()):,} to "
        f"{int(steps.max()):,}: {went}.",
        judged.sentence,
    ]
    if judged.state is State.DIVERGING:
        said += judged.advice
    lines = [" ".join([*said, *_state(run, told)])]
    if blind:
        lines.append("Not measured, so that nothing could be seen there:")
        lines += [f"  {signal}: {reason}" for signal, reason in blind[:MOST_BLIND]]
        lines += [f"  and {len(blind) - MOST_BLIND} more"] if len(blind) > MOST_BLIND else []
    return "\n".join(lines)


def _eventful(run: Run, told: Run, raised: Sequence[Alarm], blind: tuple[tuple[str, str], ...]) -> Story:
    first = _first(raised)
    # The layer that is at fault may be known a moment after the number that is not finite.
    named = next((a for a in raised if a.kind == first.kind and a.where), first)
    replayed = answer(told, first)
    causes, where, advice = first.causes, first.where or named.where, first.advice
    if replayed is not None and replayed.cause is not None:
        causes = (replayed.cause, *(c for c in causes if c != replayed.cause))
        where, advice = replayed.where or where, replayed.advice or advice
    said = [
        f"On rank {told.rank} of {told.world} trouble began first." if run.ranks and told.rank != run.rank else "",
        *_what_happened(told, first),
        *_why(first, causes, where, replayed),
        sentence(f"what to do: {advice}") if advice else "",
        f"{first.recommender} measures a better value." if first.recommender else "",
        _others(raised, first),
        *_state(run, told),
    ]
    return Story(
        text=" ".join(filter(None, said)),
        alarms=tuple(raised),
        first=first,
        cause=causes[0] if causes else None,
        causes=causes,
        where=where,
        since=first.since,
        blind=blind,
        run=told,
    )


def _what_happened(run: Run, first: Alarm) -> Iterator[str]:
    found = course(run)
    since = first.since
    if first.kind in STANDING:
        yield from _standing(found, first)
        return
    stuck = first.kind == "no-progress"
    if found is not None and since is not None and not stuck:
        yield found.until(since)
    noticed = f", noticed at step {first.step:,}," if first.step is not None and first.step != since else ""
    when = "At some step" if since is None else f"At step {since:,}{noticed}"
    how = "something went wrong" if first.critical else "something looked wrong (a warning)"
    yield sentence(f"{when} {how}: {first.text}")
    if found is not None and since is not None:
        yield found.stuck() if stuck else found.after(since)


def _standing(found: Course | None, first: Alarm) -> Iterator[str]:
    how = "something is wrong" if first.critical else "something looks wrong (a warning)"
    seen = "" if first.since is None else f", seen from step {first.since:,} on"
    yield sentence(f"{how}{seen}: {first.text}")
    if found is not None:
        yield sentence(f"over all steps {found.from_to()}")


def _why(first: Alarm, causes: Sequence[str], where: Sequence[str], replayed: Answer | None) -> Iterator[str]:
    numbers = [f"{column(str(name))} {number(value)}" for name, value in first.evidence.items()]
    evidence = f" Evidence: {listed(numbers, most=MOST_EVIDENCE)}." if numbers else ""
    place = f" It shows in {listed(where)}." if where else ""
    if causes:
        tried = replayed is not None and replayed.cause == causes[0]
        likely = "The cause, as a replay shows," if tried else "The likeliest cause"
        yield f"{likely} is that {CAUSES.get(causes[0], plain(causes[0]))}.{evidence}{place}"
    else:
        yield f"What caused it is not known.{evidence}{place}"
    if len(causes) > 1:
        others = listed((CAUSES.get(cause, plain(cause)) for cause in causes[1:]), joint="; ")
        yield f"Less likely: {others}."
    if replayed is not None:
        yield replayed.text


def _others(raised: Sequence[Alarm], first: Alarm) -> str:
    place = next(i for i, alarm in enumerate(raised) if alarm is first)
    parts = []
    for words, some in (("Before it", raised[:place]), ("Later", raised[place + 1 :])):
        told = [
            f"{'' if a.step is None else f'at step {a.step:,} '}{clause(a.text)}{'' if a.critical else ' (a warning)'}"
            for a in some
        ]
        if told:
            parts.append(f"{words}: {listed(told, most=MOST_LATER, joint='; ')}.")
    return " ".join(parts)


def _state(run: Run, told: Run) -> Iterator[str]:
    """How the record ends, and what is missing from it."""
    last = [event for event in told.events if event.attempt == told.attempts - 1]
    stopped = next((event for event in last if event.name == "stopped"), None)
    if stopped is not None:
        yield f"The loop was left by {plain(stopped.detail.get('error', 'an exception'))}."
    elif told.provenance and not any(event.name == "closed" for event in last):
        yield "The record was not closed: the training is still running, or it was killed."
    damage = len(told.quarantined) + told.gaps + told.torn + told.lost
    if damage:
        yield f"The log is damaged in {counted(damage, 'place')}, so that some of this may be missing."
    if run.missing:
        yield f"Of {run.world} processes, {len(run.missing)} left no log."
