"""A disk that is full, a folder that may not be written to, a file that is deleted: training goes on."""

from __future__ import annotations

import errno
import os
import re
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dyntune.errors import RunFileError
from dyntune.monitor import append
from dyntune.monitor.append import AppendFile, RunFileWarning
from dyntune.monitor.load import load_run
from dyntune.monitor.writer import RunWriter


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def retry(self) -> None:
        self.now += append.RETRY_SECONDS


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(append, "time", found)
    return found


def values(step: int) -> dict[str, float]:
    return {f"layer.{i}": 1.0 / (step + i + 1) for i in range(10)}


@contextmanager
def warned_once(match: str = "") -> Iterator[None]:
    """Exactly one warning, and ours."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    assert [item.category for item in found] == [RunFileWarning]
    assert re.search(match, str(found[0].message))


@contextmanager
def file_size(limit: int) -> Iterator[None]:
    """The system's own limit: a write goes as far as it, the next one fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(monkeypatch, code: int) -> None:
    def refuse(descriptor, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", refuse)


def test_a_short_outage_loses_nothing_and_is_warned_of_once(tmp_path, clock):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}, on_error="warn") as writer:
        writer.row(0, values(0))
        with file_size(path.stat().st_size + 100):
            with warned_once(r"run\.jsonl.*File too large.*Training goes on.*Raise the limit"):
                writer.row(1, values(1))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                writer.row(2, values(2))
                clock.retry()
                writer.row(3, values(3))
            assert writer.trouble == "File too large"
            torn = load_run(path)  # what a reader sees meanwhile: the beginning of a record
            assert (torn.steps.tolist(), torn.torn, torn.quarantined) == ([0], 1, ())
        clock.retry()
        writer.row(4, values(4))
        assert writer.trouble is None
    run = load_run(path)
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    assert (run.gaps, run.torn, run.lost, run.quarantined) == (0, 0, 0, ())
    assert run.rows == writer.run.rows


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS])
def test_after_a_long_outage_the_log_says_how_many_records_are_missing(tmp_path, clock, monkeypatch, code):
    path, count = tmp_path / "run.jsonl", 1000
    with RunWriter(path, {}, on_error="warn") as writer:
        writer.row(0, values(0))
        with monkeypatch.context() as patch, warned_once(os.strerror(code)):
            failing(patch, code)
            for step in range(1, count):
                writer.row(step, values(step))
                clock.now += 1.0
        assert len(writer.run) == count  # in memory nothing is missing
        clock.retry()
        writer.row(count, values(count))
        writer.row(count + 1, values(count + 1))
    run = load_run(path)
    there = run.steps.tolist()
    assert there[-2:] == [count, count + 1]
    assert there[:-2] == list(range(len(there) - 2))  # those that waited came first, and nothing in between
    assert run.lost == writer.lost == count - (len(there) - 2)
    assert 150 < len(there) < 250  # 64 KiB
    assert (run.gaps, run.torn, run.quarantined) == (0, 0, ())
    event = next(event for event in run.events if event.name == "lost")
    assert event.detail == {"count": run.lost, "reason": os.strerror(code)}
    assert f"{run.lost} records lost" in str(run)


def test_an_outage_that_lasts_to_the_end_is_told_by_what_is_there(tmp_path, clock, monkeypatch):
    path = tmp_path / "run.jsonl"
    writer = RunWriter(path, {}, on_error="warn")
    writer.row(0, values(0))
    failing(monkeypatch, errno.ENOSPC)
    with warned_once():
        for step in range(1, 500):
            writer.row(step, values(step))
        writer.close()
    assert writer.lost > 0
    assert load_run(path).steps.tolist() == [0]


def test_attempts_are_seconds_apart_not_at_every_record(tmp_path, clock, monkeypatch):
    calls = []

    def refuse(descriptor, data):
        calls.append(clock.now)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunWriter(tmp_path / "run.jsonl", {}, on_error="warn") as writer:
        with monkeypatch.context() as patch, warned_once():
            patch.setattr(os, "write", refuse)
            for step in range(100):
                writer.row(step, values(step))
                clock.now += 0.5
        assert calls == [0.0, 10.0, 20.0, 30.0, 40.0]


def test_a_device_that_is_always_full(clock):
    with warned_once("No space left on device.*Free some space"):
        file = AppendFile("/dev/full", new=False, on_error="warn", again=lambda n: [], note=lambda *a: b"lost\n")
        for number in range(1000):
            file.append(b"x" * 199 + b"\n", number)
            clock.now += 1.0
        assert file.lost == 1000 - append.HELD_BYTES // 200
        file.close()
    assert file.lost == 1000  # those that waited, too


def test_memory_is_bounded_while_nothing_can_be_written(clock):
    with warned_once():
        file = AppendFile("/dev/full", new=False, on_error="warn", again=lambda n: [], note=lambda *a: b"lost\n")
        for number in range(5000):
            file.append(b"x" * 999 + b"\n", number)
    assert file._held == sum(map(len, file._waiting)) <= append.HELD_BYTES


def test_a_folder_that_is_not_there_yet(tmp_path, clock):
    path = tmp_path / "absent" / "run.jsonl"
    with pytest.raises(RunFileError, match=r"cannot be created.*Create the folder"):
        RunWriter(path, {})
    with warned_once("No such file.*Create the folder"):
        writer = RunWriter(path, {}, on_error="warn")
        writer.row(0, values(0))
    path.parent.mkdir()
    clock.retry()
    writer.row(1, values(1))
    writer.close()
    run = load_run(path)
    assert (run.steps.tolist(), run.gaps, run.id) == ([0, 1], 0, writer.id)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_only_be_read(tmp_path, clock, monkeypatch, code):
    # The tests may run as root, whom a mode does not keep out; so the system's answer is put in its place.
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with warned_once(os.strerror(code)):
        writer = RunWriter(tmp_path / "run.jsonl", {}, on_error="warn")
        for step in range(50):
            writer.row(step, values(step))
            clock.now += 1.0
        writer.close()
    assert len(writer.run) == 50
    with pytest.raises(RunFileError, match="cannot be created"):
        RunWriter(tmp_path / "run.jsonl", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(tmp_path, clock):
    tmp_path.chmod(0o500)
    with warned_once("Permission denied"):
        RunWriter(tmp_path / "run.jsonl", {}, on_error="warn").close()


def test_a_file_that_is_deleted_is_begun_anew(tmp_path, clock):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {"seed": 3}, on_error="warn") as writer:
        writer.declare("layer.0", unit="u")
        for step in range(10):
            writer.row(step, values(step))
        path.unlink()
        with warned_once("deleted"):
            for step in range(10, 15):
                writer.row(step, values(step))
        path.unlink()
        writer.row(15, values(15))  # not said again
        writer.row(16, values(16))
        whole = writer.run
    run = load_run(path)
    assert run.steps.tolist() == [15, 16]
    assert run.id == writer.id
    assert run.provenance["seed"] == 3
    assert run.columns["layer.0"].unit == "u"
    assert (run.gaps, run.torn, run.quarantined) == (0, 0, ())
    assert run.lost == 15  # rows 0 .. 14: header and column were said again
    assert whole.steps.tolist() == list(range(17))


def test_a_file_that_is_deleted_before_any_row_loses_nothing(tmp_path, clock):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}, on_error="warn") as writer, warned_once():
        path.unlink()
        writer.row(0, values(0))
    assert (load_run(path).lost, load_run(path).gaps, len(load_run(path))) == (0, 0, 1)


def test_a_file_that_is_deleted_is_an_error_where_errors_are_wanted(tmp_path):
    path = tmp_path / "run.jsonl"
    writer = RunWriter(path, {})
    path.unlink()
    with pytest.raises(RunFileError, match="deleted"):
        writer.row(0, values(0))
    assert not path.exists()


def test_a_folder_that_goes_away_and_comes_back(tmp_path, clock):
    folder = tmp_path / "logs"
    folder.mkdir()
    path = folder / "run.jsonl"
    with RunWriter(path, {}, on_error="warn") as writer, warned_once():
        writer.row(0, values(0))
        path.unlink()
        folder.rmdir()
        writer.row(1, values(1))
        folder.mkdir()
        clock.retry()
        writer.row(2, values(2))
    run = load_run(path)
    assert (run.steps.tolist(), run.lost, run.gaps) == ([1, 2], 1, 0)


def test_a_file_that_is_deleted_with_half_a_record_begins_with_a_whole_one(tmp_path, clock):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}, on_error="warn") as writer, warned_once():
        with file_size(path.stat().st_size + 100):
            writer.row(0, values(0))
            writer.row(1, values(1))
        path.unlink()
        clock.retry()
        writer.row(2, values(2))
    run = load_run(path)
    assert (run.steps.tolist(), run.lost) == ([1, 2], 1)
    assert (run.gaps, run.torn, run.quarantined) == (0, 0, ())


def test_a_descriptor_that_somebody_closed_is_opened_again(tmp_path, clock):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}, on_error="warn") as writer:
        writer.row(0, values(0))
        os.close(writer._file._descriptor)
        writer.row(1, values(1))
    assert load_run(path).steps.tolist() == [0, 1]


def test_another_file_with_the_same_descriptor_is_not_written_to(tmp_path, clock):
    path, other = tmp_path / "run.jsonl", tmp_path / "precious"
    other.write_bytes(b"precious")
    with RunWriter(path, {}, on_error="warn") as writer:
        number = writer._file._descriptor
        taken = os.open(other, os.O_WRONLY | os.O_APPEND)
        os.dup2(taken, number)
        writer.row(0, values(0))
    os.close(taken)
    os.write(number, b"!")  # nor was it closed
    os.close(number)
    assert other.read_bytes() == b"precious!"
    assert load_run(path).steps.tolist() == [0]


def test_another_file_in_its_place_is_not_written_to(tmp_path, clock):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}, on_error="warn") as writer:
        path.unlink()
        path.write_bytes(b"precious")
        with warned_once():
            writer.row(0, values(0))
            clock.retry()
            writer.row(1, values(1))
    assert path.read_bytes() == b"precious"


def test_a_forked_worker_writes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(append.os, "getpid", lambda: -1)
            writer.row(0, values(0))
        assert path.read_bytes().count(b"\n") == 1


def test_buffered_records_are_written_together_when_they_are_due(tmp_path, clock, monkeypatch):
    calls, write = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(data.count(b"\n")) or write(fd, data))
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}, flush_seconds=2.0) as writer:
        for step in range(11):
            writer.row(step, values(step))
            clock.now += 0.5
            # The bound: nothing that is older than two seconds at the last record is missing.
            missing = set(range(step + 1)) - set(load_run(path).steps.tolist()) if calls else set(range(step + 1))
            assert all(0.5 * (step - lost) < 2.0 for lost in missing)
    assert calls == [6, 5, 1]  # with the header
    assert load_run(path).steps.tolist() == list(range(11))


def test_a_disk_that_fills_up_as_errors_are_raised(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}) as writer:
        with monkeypatch.context() as patch:
            failing(patch, errno.ENOSPC)
            with pytest.raises(RunFileError, match=r"No space left.*Free some space"):
                writer.row(0, values(0))
        writer.row(1, values(1))
    assert load_run(path).steps.tolist() == [0, 1]  # the row waited


def test_synchronised_when_closed_and_as_often_as_asked(tmp_path, monkeypatch):
    count = []
    monkeypatch.setattr(os, "fsync", count.append)
    with RunWriter(tmp_path / "a.jsonl", {}) as writer:
        writer.row(0, values(0))
        assert len(count) == 0
    assert len(count) == 1
    with RunWriter(tmp_path / "b.jsonl", {}, sync_seconds=0.0) as writer:
        writer.row(0, values(0))
        assert len(count) == 3  # header and row


@pytest.mark.parametrize("option", [{"on_error": "ignore"}, {"flush_seconds": -1.0}, {"sync_seconds": float("nan")}])
def test_options_that_make_no_sense(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        RunWriter(tmp_path / "run.jsonl", {}, **option)
    assert not Path(tmp_path / "run.jsonl").exists()
