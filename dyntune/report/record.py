"""What a record holds besides, where it comes from, and what is missing from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dyntune.monitor.ratios import GRADIENT_NORM, LEARNING_RATE, LOSS, stability_ratios
from dyntune.monitor.run import Run
from dyntune.plots.style import number
from dyntune.report.page import Table
from dyntune.report.strips import PREFIXES
from dyntune.report.words import MOST_LINES, text, unit

__all__ = ["notes", "others", "provenance"]


def others(run: Run) -> Table | None:
    """Columns that are not drawn; None without."""
    shown = {*LOSS, *LEARNING_RATE, *GRADIENT_NORM, *(r.column for r in stability_ratios(run))}
    names = [n for n in run.names if n not in shown and not n.startswith((*PREFIXES, "train/lr/"))]
    rows = []
    for name in names[:MOST_LINES]:
        values = run.series(name)[1]
        known = values[np.isfinite(values)]
        cells = (
            [number(float(v)) for v in (known[-1], known.min(), np.median(known), known.max())] if known.size else []
        )
        rows.append((text(name), f"{values.size:,}", *(cells or ["none"] * 4), unit(run, name)))
    if not rows:
        return None
    if len(names) > MOST_LINES:
        rows.append((f"and {len(names) - MOST_LINES:,} more", *[""] * 6))
    return Table(header=("column", "values", "last", "lowest", "median", "highest", "unit"), rows=tuple(rows))


def provenance(run: Run) -> Table | None:
    """Versions, optimizer, options; None without."""
    rows = [*_flat("", run.provenance), *_flat("assumed", run.assumed)]
    if run.id is not None:
        rows.insert(0, ("run", text(run.id)))
    return Table(header=("what", "value"), rows=tuple(rows[:MOST_LINES])) if rows else None


def _flat(prefix: str, item: object) -> Iterator[tuple[str, str]]:
    if isinstance(item, Mapping):
        for key, value in item.items():
            yield from _flat(f"{prefix} {text(str(key))}".strip(), value)
    elif isinstance(item, (list, tuple)) and any(isinstance(entry, Mapping) for entry in item):
        for i, entry in enumerate(item):
            yield from _flat(f"{prefix} {i}", entry)
    else:
        yield prefix, text(item)


def notes(run: Run) -> Iterator[str]:
    """What is missing from the record."""
    counted: dict[str, Any] = {
        "bad lines were set aside": len(run.quarantined),
        "places where records are missing": run.gaps,
        "records could not be written": run.lost,
        "records were cut short": run.torn,
        "records of a kind unknown to this version": run.unknown,
        "rows were made again by a later attempt": len(run.superseded),
    }
    for what, count in counted.items():
        if count:
            yield f"{count:,} {what}."
    if run.missing:
        yield f"No file of rank {', '.join(map(str, run.missing))}."
    for rank, step in run.short.items():
        yield f"Rank {rank} ends early, {'without a row' if step is None else f'at step {step:,}'}."
    for name, reason in run.unreadable.items():
        yield f"Unreadable: {text(name)}: {text(reason)}"
