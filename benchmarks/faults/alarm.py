"""What a detector is given of a recorded run, and what comes back: :class:`Block`, :class:`Alarm`, :class:`Looker`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dyntune.monitor.alerts import Detector
from dyntune.monitor.reader import Reader
from dyntune.monitor.rows import Array, Rows, Table

SEVERITIES = ("critical", "warning")


@dataclass(frozen=True, eq=False)
class Block:
    """What became known at one moment of a training.

    Args:
        time: The last step that was over by then.
        first: The first step of `loss`, `norm` and `lr`.
        loss: Of every step since the block before, as the loop itself took it.
        norm: Of the whole gradient before clipping, likewise.
        lr: Of the first group, likewise.
        rows: What the monitor wrote: exactly what it gave its detectors then.
    """

    time: int
    first: int
    loss: Array
    norm: Array
    lr: Array
    rows: Rows


@dataclass(frozen=True)
class Alarm:
    """An alarm of any detector.

    Args:
        time: When it was raised: the last step that the detector had seen.
        kind: What was seen, in the detector's own words.
        severity: ``"critical"`` or ``"warning"``.
        causes: Mechanisms that it names, the likeliest first.
        strength: The levels below it, or up to it, are those at which the alarm is raised.
    """

    time: int
    kind: str
    severity: str = "critical"
    causes: tuple[str, ...] = ()
    strength: float = float("inf")


class Looker(Protocol):
    """Looks at one run, block by block.

    Attributes:
        levels: Levels that it speaks for: an alarm counts at those that its strength is above, or at least, if
            `at_least`.
    """

    levels: tuple[float, ...]
    at_least: bool

    def update(self, block: Block) -> Iterable[Alarm]: ...


class Monitored:
    """Detectors of a :class:`dyntune.Monitor`, given the rows that it gave them, when it did."""

    levels: tuple[float, ...] = (0.0,)  # they have severities in place of levels
    at_least = False

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self.detectors = tuple(detectors)

    def update(self, block: Block) -> Iterable[Alarm]:
        if len(block.rows):
            for detector in self.detectors:
                for alert in detector.update(block.rows):
                    yield Alarm(block.time, alert.kind, alert.severity, tuple(map(str, alert.causes)))


def blocks_of(lines: Iterable[bytes], arrays: dict[str, Array]) -> Iterator[Block]:
    """The record of a run in the pieces in which it was written.

    A monitor gives its detectors what is new after every record, and a record of a step is written once the step is
    over. Steps of which there is no record come last, in a block of their own.

    Args:
        lines: Of the log.
        arrays: ``loss``, ``norm`` and ``lr`` of every step.
    """
    reader, seen, first, time = Reader(), 0, 0, -1
    for line in lines:
        reader.take(line)
        rows = reader.table.rows(seen)
        if len(rows):
            seen += len(rows)
            time = max(time, int(rows.steps.max()))
            yield _block(arrays, first, time, rows)
            first = time + 1
    if first < len(arrays["loss"]):
        yield _block(arrays, first, len(arrays["loss"]) - 1, Table().rows())


def _block(arrays: dict[str, Array], first: int, time: int, rows: Rows) -> Block:
    loss, norm, lr = (arrays[name][first : time + 1] for name in ("loss", "norm", "lr"))
    return Block(time, first, loss, norm, lr, rows)


def read_blocks(folder: Path) -> list[Block]:
    """The blocks of a stored run; see `record.py`."""
    with np.load(folder / "steps.npz") as stored:
        arrays = dict(stored)
    with gzip.open(folder / "run.jsonl.gz", "rb") as lines:
        return list(blocks_of(lines, arrays))


def read_truth(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "truth.json").read_text())
    return found


def look(looker: Looker, blocks: Iterable[Block]) -> list[Alarm]:
    """All alarms of a run. Blocks are given in order, and none before the answer to the one before is complete."""
    return [alarm for block in blocks for alarm in list(looker.update(block))]


def at_level(alarms: Iterable[Alarm], level: float, *, at_least: bool) -> list[Alarm]:
    """Those that are raised at a level."""
    return [a for a in alarms if (a.strength >= level if at_least else a.strength > level)]
