"""What a run in memory costs: numbers, no objects that grow with the training."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from dyntune.monitor.load import load_run
from dyntune.monitor.rows import BLOCK, Row, Rows
from dyntune.monitor.writer import RunWriter

COLUMNS = [f"layer.{i}" for i in range(10)]


def grow(writer: RunWriter, steps: range) -> None:
    for step in steps:
        writer.row(step, dict.fromkeys(COLUMNS, 0.5), status={"layer.0": ("REFUSED", "no gradient")})


@pytest.mark.parametrize("logged", [True, False])
def test_a_run_takes_twelve_bytes_a_number_and_no_object_a_row(tmp_path, logged):
    steps, warm = 4000, 1000
    tracemalloc.start()
    try:
        with RunWriter(tmp_path / "run.jsonl" if logged else None, {}) as writer:
            grow(writer, range(warm))
            gc.collect()
            blocks, (before, _) = len(gc.get_objects()), tracemalloc.get_traced_memory()
            grow(writer, range(warm, warm + steps))
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
            objects = len(gc.get_objects()) - blocks
    finally:
        tracemalloc.stop()
    # 12 bytes for each number, 16 for each row; arrays grow by a sixteenth, so as much again of the whole may be spare.
    exact = 12 * len(COLUMNS) + 16
    assert grown <= (exact * steps) + exact * (warm + steps) / 16 + 4096  # a page for what the test itself holds
    assert grown >= 0.9 * exact * steps - exact * (warm + steps) / 16  # it is in memory
    assert objects <= 20  # frames and the like, of 4,000 rows


@pytest.mark.slow
def test_memory_does_not_grow_over_twenty_thousand_steps_but_for_the_numbers(tmp_path):
    tracemalloc.start()
    try:
        with RunWriter(tmp_path / "run.jsonl", {}, on_error="warn") as writer:
            levels = []
            for part in range(10):
                grow(writer, range(2000 * part, 2000 * (part + 1)))
                levels.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    slope = np.polyfit(np.arange(10) * 2000, levels, 1)[0]
    exact = 12 * len(COLUMNS) + 16
    assert slope <= exact * (1 + 1 / 16) * 1.1  # bytes a row; a tenth for growth that comes in jumps


def test_reading_makes_no_object_a_row(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}) as writer:
        grow(writer, range(3000))
    gc.collect()
    before = len(gc.get_objects())
    run = load_run(path)
    gc.collect()
    assert len(gc.get_objects()) - before <= 300  # a tenth of the rows
    assert len(run) == 3000


def test_what_was_taken_does_not_change_when_the_run_goes_on():
    with RunWriter(None, {}) as writer:
        grow(writer, range(5))
        early = writer.run
        loss = early["layer.0"]
        grow(writer, range(5, 5000))
        assert len(early) == 5
        assert loss.size == 5
        assert len(writer.run) == 5000
        loss[:] = -1.0  # a copy
        assert early["layer.0"].tolist() == [0.5] * 5


def test_rows_in_columns_are_the_same_rows():
    rng = np.random.default_rng(0)
    rows = []
    for step in range(BLOCK + 50):
        names = [name for name in COLUMNS if rng.random() < 0.3]
        values = {name: None if rng.random() < 0.2 else float(rng.normal()) for name in names}
        status = {name: ("REFUSED", "why") for name in names if values[name] is None}
        rows.append(Row(step=step, values=values, status=status, labels={"n": str(step % 3)} if step % 5 else {}))
    table = Rows.of(rows)
    assert table == tuple(rows)
    assert [table[i] for i in range(len(rows))] == rows
    assert table[-1] == rows[-1]
    assert table[3:9:2] == tuple(rows[3:9:2])
    with pytest.raises(IndexError):
        table[len(rows)]
    assert table.label("n") == [row.labels.get("n") for row in rows]
    keep = rng.random(len(rows)) < 0.5
    assert table.where(keep) == [row for row, kept in zip(rows, keep, strict=True) if kept]
    assert table.where(np.zeros(len(rows), dtype=bool)).names == ()
    assert table != rows[:-1]
    assert table != [*rows[:-1], rows[0]]
