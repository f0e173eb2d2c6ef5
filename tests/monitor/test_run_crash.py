"""A writer that is killed, for real: what its file still holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dyntune.monitor.load import load_run
from dyntune.monitor.writer import RunWriter

# Says on a pipe, which loses nothing either, how far it has got: after the call for a row has returned.
KILLED = """
import os, sys
from dyntune.monitor.writer import RunWriter
path, seconds = sys.argv[1], float(sys.argv[2])
writer = RunWriter(path, {}, resume=True, flush_seconds=seconds)
start = len(writer.run)
os.write(1, b"%d\\n" % start)
step = start
while True:
    writer.row(step, {f"layer.{i}": 1.0 / (step + i + 1) for i in range(10)})
    os.write(1, b"%d\\n" % step)
    step += 1
"""


def kill(path: Path, after: int, seconds: float = 0.0) -> int:
    """Let a process write until it has said ``after`` lines, kill it; the last step that it said it had written."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert after > 1  # the first line says where it starts
        said = [process.stdout.readline() for _ in range(after)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read().splitlines(keepends=True)
        return int([line for line in said if line.endswith(b"\n")][-1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def check(path: Path, said: int) -> None:
    run = load_run(path)
    assert run.steps.tolist() == list(range(len(run)))
    assert len(run) - 1 >= said  # every row whose call had returned is there; the one being written may be, too
    assert len(run) - 1 <= said + 1
    assert (run.gaps, run.quarantined, run.lost) == (0, (), 0)


@pytest.mark.slow
def test_a_writer_that_is_killed_loses_at_most_the_record_it_was_writing(tmp_path):
    for count in range(5):
        path = tmp_path / f"run{count}.jsonl"
        check(path, kill(path, 10 + 37 * count))


@pytest.mark.slow
def test_with_buffering_what_is_lost_is_a_tail_and_nothing_else(tmp_path):
    path = tmp_path / "run.jsonl"
    said = kill(path, 2000, seconds=3600.0)  # nothing is due for an hour, but 64 KiB do not wait
    run = load_run(path)
    assert run.steps.tolist() == list(range(len(run)))
    assert (run.gaps, run.quarantined) == (0, ())
    assert 0 < len(run) <= said + 2
    held = sum(len(line) for line in path.read_bytes().splitlines()[-10:]) / 10 * (said - len(run))
    assert held <= 66 * 1024  # the bound, and as lines grow with the step a little more


def forked(path: Path, after: int) -> int:
    """The same in a fork of this process, which starts at once; it reports by a pipe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # nothing but writing, until the kill
        try:
            writer = RunWriter(path, {}, resume=True)
            step = len(writer.run)
            while True:
                writer.row(step, {f"layer.{i}": 1.0 / (step + i + 1) for i in range(10)})
                os.write(writing, b"%19d\n" % step)
                step += 1
        finally:
            os._exit(1)
    os.close(writing)
    last = b""
    try:
        with os.fdopen(reading, "rb") as pipe:
            for _ in range(after):
                last = pipe.readline()
            os.kill(child, signal.SIGKILL)
            last = (pipe.read().splitlines() or [last])[-1]
    finally:
        os.waitpid(child, 0)
    return int(last)


FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # the child only writes


@FORKS
def test_five_kills_in_quick_succession(tmp_path):
    path = tmp_path / "run.jsonl"
    for count in range(5):
        check(path, forked(path, 3 + 11 * count))
    assert load_run(path).attempts == 5


@FORKS
@pytest.mark.slow
def test_a_hundred_kills_and_resumptions_of_one_run_leave_no_inner_damage(tmp_path):
    path = tmp_path / "run.jsonl"
    for count in range(100):
        check(path, forked(path, 1 + count % 17))
    run = load_run(path)
    assert run.attempts == 100
    assert len(run.superseded) == 0


def test_every_record_is_one_line_of_strict_json(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}) as writer:
        writer.row(0, {"loss": float("nan"), "other": float("-inf"), "none": None})
    for line in path.read_bytes().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    row = load_run(path).rows[0]
    assert repr(dict(row.values)) == repr({"loss": float("nan"), "other": float("-inf"), "none": None})
