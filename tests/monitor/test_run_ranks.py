"""One file for each process, read as one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dyntune.errors import InvalidArgumentError, RunFileError
from dyntune.monitor.load import load_run
from dyntune.monitor.ranks import file_of_rank
from dyntune.monitor.writer import RunWriter


def job(path: Path, world: int = 4, *, steps: int = 6, run_id: str = "a") -> list[Path]:
    """What a job of several processes leaves behind; the loss of each is its rank."""
    for rank in range(world):
        with RunWriter(path, {"seed": 3}, run_id=run_id, rank=rank, world=world) as writer:
            for step in range(steps):
                writer.row(step, {"loss": float(rank)})
    return [file_of_rank(path, rank, world) for rank in range(world)]


def test_names_of_the_files(tmp_path):
    assert [file.name for file in job(tmp_path / "run.jsonl", 2)] == ["run.rank0.jsonl", "run.rank1.jsonl"]
    assert [file.name for file in job(tmp_path / "alone.jsonl", 1)] == ["alone.jsonl"]
    with pytest.raises(InvalidArgumentError, match="rank=2 of world=2"):
        RunWriter(tmp_path / "run.jsonl", {}, rank=2, world=2)


@pytest.mark.parametrize("way", ["run.jsonl", "", "run.rank*.jsonl", "*.jsonl", "run.rank?.jsonl"])
def test_path_folder_and_pattern_give_the_same(tmp_path, way):
    job(tmp_path / "run.jsonl")
    run = load_run(tmp_path / way)
    assert run["loss"].tolist() == [0.0] * 6
    assert (run.rank, run.world, run.id, run.missing) == (0, 4, "a", ())
    assert list(run.ranks) == [0, 1, 2, 3]
    for rank, other in run.ranks.items():
        np.testing.assert_array_equal(other["loss"], rank)
    assert dict(run.short) == {}
    assert "ranks: 4 of 4 read" in str(run)


def test_the_file_of_one_process_is_a_run_of_its_own(tmp_path):
    job(tmp_path / "run.jsonl")
    run = load_run(tmp_path / "run.rank2.jsonl")
    assert run["loss"].tolist() == [2.0] * 6
    assert (run.rank, run.world, dict(run.ranks), run.missing) == (2, 4, {}, ())
    assert "rank 2 of 4" in str(run)


def test_ten_and_more_are_in_order(tmp_path):
    job(tmp_path / "run.jsonl", 12, steps=1)
    assert list(load_run(tmp_path).ranks) == list(range(12))


def test_files_that_are_missing_short_torn_or_no_runs_are_said(tmp_path):
    files = job(tmp_path / "run.jsonl", 6)
    files[0].unlink()
    lines = files[2].read_bytes().splitlines(keepends=True)
    files[2].write_bytes(b"".join(lines[:4]))  # header and three rows
    files[3].write_bytes(files[3].read_bytes()[:-5])
    files[4].write_bytes(b"\x00" * 30)
    files[5].write_bytes(lines[0].replace(b'"rank":2', b'"rank":5'))
    run = load_run(tmp_path / "run.jsonl")
    assert run.rank == 1  # the lowest there is
    assert list(run.ranks) == [1, 2, 3, 5]
    assert run.missing == (0, 4)
    assert dict(run.short) == {2: 2, 3: 4, 5: None}
    assert run.ranks[3].torn == 1
    assert list(run.unreadable) == ["run.rank4.jsonl"]
    for said in ("missing ranks: 0, 4", "rank 2 ends early, at step 2", "unreadable: run.rank4", "rank 3 file: 1 torn"):
        assert said in str(run)


def test_files_of_different_runs_are_refused(tmp_path):
    job(tmp_path / "run.jsonl", 3)
    other = job(tmp_path / "other.jsonl", 3, run_id="b")
    with pytest.raises(RunFileError, match=r"several runs \(other.jsonl, run.jsonl\)"):
        load_run(tmp_path)
    assert load_run(tmp_path / "run.jsonl").id == "a"
    other[1].replace(tmp_path / "run.rank1.jsonl")
    with pytest.raises(RunFileError, match=r"2 different runs \('a', 'b'\)"):
        load_run(tmp_path / "run.jsonl")


def test_one_rank_twice_is_refused(tmp_path):
    files = job(tmp_path / "run.jsonl", 2)
    (tmp_path / "run.rank2.jsonl").write_bytes(files[1].read_bytes())
    with pytest.raises(RunFileError, match="both of rank 1"):
        load_run(tmp_path)


def test_nothing_readable_is_refused(tmp_path):
    for rank in range(2):
        (tmp_path / f"run.rank{rank}.jsonl").write_bytes(b"nothing\n")
    with pytest.raises(RunFileError, match="none of 2 files"):
        load_run(tmp_path / "run.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFileError, match=r"holds no .jsonl file"):
        load_run(tmp_path / "empty")
    with pytest.raises(RunFileError, match="cannot be read"):
        load_run(tmp_path / "absent*.jsonl")


def test_a_file_whose_header_is_damaged_is_placed_by_its_name(tmp_path):
    files = job(tmp_path / "run.jsonl", 3)
    lines = files[1].read_bytes().splitlines(keepends=True)
    files[1].write_bytes(b"damage\n" + b"".join(lines[1:]))
    run = load_run(tmp_path)
    assert list(run.ranks) == [0, 1, 2]
    assert len(run.ranks[1].quarantined) == 1


def test_every_rank_goes_on_from_the_checkpoint_of_the_first(tmp_path):
    path = tmp_path / "run.jsonl"
    job(path, 2)
    with RunWriter(path, {}, resume=True, rank=0, world=2) as writer:
        writer.event("alert")  # so that it has more records than the others
        state = writer.state_dict(step=3)
    for rank in range(2):
        with RunWriter(path, {}, resume=True, run_id="a", rank=rank, world=2) as writer:
            writer.load_state_dict(state)
            writer.row(4, {"loss": 10.0 + rank})
    run = load_run(path)
    for rank, other in run.ranks.items():
        assert other["loss"].tolist() == [rank] * 4 + [10.0 + rank]
        assert (len(other.superseded), other.gaps) == (2, 0)


def test_another_number_of_processes_is_another_log(tmp_path):
    files = job(tmp_path / "run.jsonl", 2)
    files[1].rename(tmp_path / "wide.rank1.jsonl")
    with pytest.raises(RunFileError, match="rank 1 of 2, this is rank 1 of 4"):
        RunWriter(tmp_path / "wide.jsonl", {}, resume=True, rank=1, world=4)
    with pytest.raises(RunFileError, match="of run 'a', not 'b'"):
        RunWriter(tmp_path / "run.jsonl", {}, resume=True, rank=0, world=2, run_id="b")


def test_a_world_that_makes_no_sense_is_a_bad_line(tmp_path):
    path = tmp_path / "run.jsonl"
    row = b'{"kind":"row","seq":1,"step":0,"values":{}}\n'
    for about in (b'"rank":0,"world":%d' % 10**15, b'"rank":4,"world":2', b'"rank":-1', b'"run":3', b'"torn":1'):
        path.write_bytes(b'{"kind":"header","seq":0,"schema":1,%s}\n%s' % (about, row))
        assert len(load_run(path).quarantined) == 1
