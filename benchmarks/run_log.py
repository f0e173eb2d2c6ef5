"""What recording costs the training: time of a record of ten numbers, and memory over 20,000 steps.

    python benchmarks/run_log.py

- records: CPU and wall time of `RunWriter.row` for ten numbers, best of several repetitions and their median: each
  record written at once (the default), buffered for a second, in memory only, and with a NaN among the numbers; and
  `RunWriter.rows`, 64 steps in one record, per step.
- parts: what one record is made of: JSON by the standard library (what is used), JSON formatted by hand, the system
  call, the look whether the file is still there. They argue for neither hand formatting nor a thread of its own: a
  thread would have to be handed the same numbers, and would hold the interpreter while it formats them.
- memory: growth of what Python has allocated per step over 20,000 steps, with a log.

Takes about half a minute on one core. Exit status 1 if a record takes more than 20 microseconds of CPU time per step.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import gc
import json
import math
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peer_suite.provenance import provenance

from dyntune.monitor.lines import encode
from dyntune.monitor.writer import RunWriter

RESULT = Path(__file__).resolve().parent / "results" / "run_log.json"
SCHEMA = 1
COLUMNS = [f"layer.{i}.rms" for i in range(10)]
LIMIT = 20.0  # microseconds; a step of 10 ms then gives 0.2 % of its time
STEPS = 20_000
TOGETHER = 64  # steps of one record, as the monitor writes them where a step is short


def numbers(step: int) -> dict[str, float]:
    """Ten numbers with all their digits."""
    return {name: math.sin(step + i + 0.5) * 1.7**i for i, name in enumerate(COLUMNS)}


def microseconds(work: Callable[[int], object], count: int, repeats: int) -> dict[str, float]:
    """Time of one call, CPU and wall."""
    cpu, wall = [], []
    for _ in range(repeats):
        gc.collect()
        before = time.process_time(), time.perf_counter()
        for i in range(count):
            work(i)
        cpu.append((time.process_time() - before[0]) / count * 1e6)
        wall.append((time.perf_counter() - before[1]) / count * 1e6)
    return {
        "cpu_best": min(cpu),
        "cpu_median": float(np.median(cpu)),
        "wall_best": min(wall),
        "wall_median": float(np.median(wall)),
    }


def records(folder: str, count: int, repeats: int) -> dict[str, Any]:
    """`RunWriter.row`, the making of the numbers not counted."""
    rows = [numbers(step) for step in range(1000)]
    broken = [{**row, COLUMNS[3]: math.nan} for row in rows]
    cases: dict[str, tuple[str | None, dict[str, Any], list[dict[str, float]]]] = {
        "at_once": ("at_once", {}, rows),
        "at_once_with_a_nan": ("nan", {}, broken),
        "buffered_for_a_second": ("buffered", {"flush_seconds": 1.0}, rows),
        "in_memory_only": (None, {}, rows),
    }
    found = {}
    for case, (name, options, values) in cases.items():
        path = None if name is None else f"{folder}/{name}.jsonl"
        with RunWriter(path, {}, on_error="warn", **options) as writer:
            found[case] = microseconds(lambda i, w=writer, v=values: w.row(i, v[i % 1000]), count, repeats)
    together = {name: [row[name] for row in rows[:TOGETHER]] for name in COLUMNS}
    with RunWriter(f"{folder}/together.jsonl", {}, on_error="warn") as writer:
        once = microseconds(lambda i: writer.rows(TOGETHER * i, TOGETHER, together), count // TOGETHER, repeats)
    found["together"] = {name: seconds / TOGETHER for name, seconds in once.items()}
    return found


def parts(folder: str, count: int, repeats: int) -> dict[str, Any]:
    """What a record is made of."""
    record = {"kind": "row", "seq": 12345, "step": 12345, "values": numbers(3)}
    line = encode(record)
    keys = {name: json.dumps(name) + ":" for name in COLUMNS}
    descriptor = os.open(f"{folder}/plain", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def by_hand(step: int) -> bytes:
        inner = ",".join([keys[name] + repr(value) for name, value in record["values"].items()])
        return f'{{"kind":"row","seq":{step},"step":{step},"values":{{{inner}}}}}\n'.encode("ascii")

    try:
        return {
            "bytes": len(line),
            "json": microseconds(lambda _: encode(record), count, repeats),
            "formatted_by_hand": microseconds(by_hand, count, repeats),
            "system_call": microseconds(lambda _: os.write(descriptor, line), count, repeats),
            "look_at_the_file": microseconds(lambda _: os.fstat(descriptor), count, repeats),
        }
    finally:
        os.close(descriptor)


def memory(folder: str) -> dict[str, Any]:
    """Slopes over the second half of the steps, of what Python has allocated, arrays included.

    Not of what the process holds: memory that something before has freed would hide the growth.
    """
    path = Path(folder) / "memory.jsonl"
    at, levels, objects = [], [], []
    tracemalloc.start()
    with RunWriter(path, {}, on_error="warn") as writer:
        for step in range(STEPS):
            writer.row(step, numbers(step))
            if step >= STEPS // 2 and step % 500 == 0:
                at.append(step)
                levels.append(tracemalloc.get_traced_memory()[0])
                objects.append(len(gc.get_objects()))
    tracemalloc.stop()
    slope = float(np.polyfit(at, levels, 1)[0])
    return {
        "steps": STEPS,
        "numbers_per_step": len(COLUMNS),
        "bytes_per_step": slope,
        "bytes_per_number": slope / len(COLUMNS),
        "tracked_objects_grown": objects[-1] - objects[0],
        "file_bytes_per_step": path.stat().st_size / STEPS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="records in each repetition")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "schema": SCHEMA,
            "provenance": provenance(),
            "unit": "microseconds",
            "records": records(folder, options.count, options.repeats),
            "parts": parts(folder, options.count, options.repeats),
            "memory": memory(folder),
        }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for group in ("records", "parts"):
        for name, item in result[group].items():
            if isinstance(item, dict):
                print(f"{name:24s} CPU {item['cpu_best']:6.2f} us, median {item['cpu_median']:6.2f} us")
    for name, item in result["memory"].items():
        print(f"{name:34s} {item:.6g}")
    return int(result["records"]["at_once"]["cpu_best"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
