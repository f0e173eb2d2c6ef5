"""Going on with a run: what is continued, what is superseded, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyntune.errors import InvalidArgumentError, RunFileError
from dyntune.monitor.load import load_run
from dyntune.monitor.provenance import provenance
from dyntune.monitor.writer import RunWriter

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def train(writer: RunWriter, steps: range, attempt: float) -> None:
    for step in steps:
        writer.row(step, {"loss": attempt + step / 1000})


def begun(path: Path, end: int = 8) -> RunWriter:
    writer = RunWriter(path, {"seed": 3})
    train(writer, range(end), 0.0)
    return writer


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["seq"] for line in path.read_bytes().splitlines()]


def test_a_run_is_continued_where_it_was(tmp_path):
    path = tmp_path / "run.jsonl"
    begun(path).close()
    before = path.read_bytes()
    with RunWriter(path, {"seed": 4}, resume=True) as writer:
        assert path.read_bytes() == before  # nothing to say yet
        assert writer.run.steps.tolist() == list(range(8))
        train(writer, range(8, 10), 1.0)
    assert path.read_bytes().startswith(before)
    run = load_run(path)
    assert run.steps.tolist() == list(range(10))
    assert (run.attempts, len(run.superseded), run.gaps) == (2, 0, 0)
    assert numbers(path) == list(range(12))
    assert run.provenance["seed"] == 3
    event = run.events[0]
    assert (event.name, event.step, event.attempt) == ("resumed", None, 1)
    assert event.detail == {"provenance": {"seed": 4}}


def test_the_later_attempt_wins_and_the_earlier_one_is_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    writer = begun(path, 500)
    state = json.loads(json.dumps(writer.state_dict()))
    writer.event("alert", step=499)
    train(writer, range(500, 731), 0.0)
    writer.event("alert", step=600)  # died at 730
    with RunWriter(path, {}, resume=True) as again:
        again.load_state_dict(state)
        train(again, range(500, 620), 1.0)
        live = again.run
    run = load_run(path)
    for found in (run, live):
        assert found.steps.tolist() == list(range(620))  # nothing of steps 620 .. 730, which belong to another training
        np.testing.assert_array_equal(found["loss"] >= 1.0, found.steps >= 500)
        assert [row.step for row in found.superseded] == list(range(500, 731))
        assert all(row.values["loss"] < 1.0 for row in found.superseded)
        assert [event.attempt for event in found.events] == [0, 0, 1]
        assert found.attempts == 2
        assert found.gaps == 0
    assert "231 rows superseded" in str(run)
    assert numbers(path) == list(range(len(numbers(path))))


def test_a_third_attempt_may_go_back_further_or_less_far(tmp_path):
    path = tmp_path / "run.jsonl"
    writer = begun(path, 4)
    early = writer.state_dict()
    train(writer, range(4, 8), 0.0)
    for state, steps, attempt in ((early, range(4, 9), 1.0), (None, range(9, 11), 2.0), (early, range(4, 6), 3.0)):
        writer = RunWriter(path, {}, resume=True)
        if state is not None:
            writer.load_state_dict(state)
        train(writer, steps, attempt)
    run = load_run(path)
    np.testing.assert_allclose(run["loss"], [0.0, 0.001, 0.002, 0.003, 3.004, 3.005], rtol=1e-12)
    assert [int(row.values["loss"]) for row in run.superseded] == [0] * 4 + [1] * 5 + [2] * 2
    assert run.attempts == 4


def test_an_attempt_that_measured_nothing_wins_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    writer = begun(path)
    with RunWriter(path, {}, resume=True) as again:
        again.load_state_dict(writer.state_dict(step=2))
        again.event("started")
    run = load_run(path)
    assert run.steps.tolist() == list(range(8))
    assert len(run.superseded) == 0


def test_steps_between_the_checkpoint_and_the_first_row_of_an_attempt_are_taken_back_too(tmp_path):
    path = tmp_path / "run.jsonl"
    writer = begun(path)
    with RunWriter(path, {}, resume=True) as again:
        again.load_state_dict(writer.state_dict(step=4))
        train(again, range(6, 8), 1.0)  # it measures every other step
    run = load_run(path)
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert [row.step for row in run.superseded] == [5, 6, 7]


def test_without_a_step_the_first_row_says_where_an_attempt_begins(tmp_path):
    path = tmp_path / "run.jsonl"
    begun(path)
    with RunWriter(path, {}, resume=True) as again:
        train(again, range(5, 7), 1.0)
    assert load_run(path).steps.tolist() == list(range(7))
    assert len(load_run(path).superseded) == 3


def test_rows_at_the_same_step_of_one_attempt_all_count(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}) as writer:
        writer.row(3, {"loss": 1.0})
        writer.row(3, {"sharpness": 2.0})
    assert load_run(path).steps.tolist() == [3, 3]


def test_a_training_may_go_back_without_ending(tmp_path):
    path = tmp_path / "run.jsonl"
    with begun(path, 4) as writer:
        state = writer.state_dict()
        train(writer, range(4, 8), 0.0)
        writer.load_state_dict(state)
        train(writer, range(4, 6), 1.0)
        assert writer.run.steps.tolist() == list(range(6))
    run = load_run(path)
    assert run.steps.tolist() == list(range(6))
    assert len(run.superseded) == 4


@QUICK
@given(st.lists(st.tuples(st.integers(0, 25), st.integers(1, 12)), min_size=1, max_size=6))
def test_whatever_is_taken_back_each_step_is_that_of_the_last_attempt_at_it(tmp_path_factory, attempts):
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    expected: dict[int, int] = {}
    written = 0
    for attempt, (start, count) in enumerate(attempts):
        start = min(start, max(expected, default=-1) + 1)  # no checkpoint is of a step that was not reached
        with RunWriter(path, {}, resume=True) as writer:
            if attempt:
                writer.load_state_dict({**writer.state_dict(), "step": start - 1 if start else None})
            expected = {step: a for step, a in expected.items() if step < start}
            for step in range(start, start + count):
                writer.row(step, {"attempt": attempt})
                expected[step] = attempt
            written += count
            live = writer.run
    run = load_run(path)
    assert dict(zip(run.steps.tolist(), run["attempt"].tolist(), strict=True)) == expected
    assert len(run) + len(run.superseded) == written
    assert live.rows == run.rows
    assert live.superseded == run.superseded
    assert run.gaps == 0


@pytest.mark.parametrize("kept", [1, 0.3, 0.9, -1])
def test_a_torn_tail_is_closed_off_not_cut_and_counted_as_what_it_is(tmp_path, kept):
    path = tmp_path / "run.jsonl"
    begun(path).close()
    lines = path.read_bytes().splitlines(keepends=True)
    last = lines[-1].rstrip(b"\n")
    piece = last[: int(kept * len(last))] if isinstance(kept, float) else last[:kept]
    path.write_bytes(b"".join(lines[:-1]) + piece)
    with RunWriter(path, {}, resume=True) as writer:
        train(writer, range(7, 9), 1.0)
        live = writer.run
    assert path.read_bytes().startswith(b"".join(lines[:-1]) + piece + b"\n")
    for run in (load_run(path), live):
        assert run.steps.tolist() == list(range(9))
        assert (run.torn, run.gaps, run.quarantined) == (1, 0, ())


def test_a_last_record_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    begun(path).close()
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with RunWriter(path, {}, resume=True) as writer:
        train(writer, range(8, 9), 1.0)
    run = load_run(path)
    assert run.steps.tolist() == list(range(9))
    assert (run.torn, run.gaps, run.quarantined) == (0, 0, ())


def test_a_writer_that_died_within_its_header(tmp_path):
    path = tmp_path / "run.jsonl"
    begun(path).close()
    header = path.read_bytes().splitlines()[0]
    for end in (1, 20, 60, len(header) - 1):
        path.write_bytes(header[:end])
        with RunWriter(path, {}, resume=True) as writer:
            train(writer, range(2), 0.0)
        run = load_run(path)
        assert (run.steps.tolist(), run.torn, run.quarantined, run.gaps) == ([0, 1], 1, (), 0)
    path.write_bytes(b"")
    with RunWriter(path, {}, resume=True) as writer:
        train(writer, range(2), 0.0)
    assert len(load_run(path)) == 2


@pytest.mark.parametrize("content", [b"precious", b"{}\n", b'{"kind":"header","schema":1}\n', b"\x00" * 50])
def test_what_is_no_run_is_not_continued(tmp_path, content):
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunFileError, match="not a recorded run"):
        RunWriter(path, {}, resume=True)
    assert path.read_bytes() == content


@pytest.mark.parametrize("path", ["/dev/full", "/dev/zero", "."])
def test_what_is_no_file_is_not_continued(path):
    with pytest.raises(RunFileError, match="no ordinary file"):
        RunWriter(path, {}, resume=True)


def test_a_newer_format_and_a_sequence_number_at_its_end_are_not_continued(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"kind":"header","seq":0,"schema":2,"run":"a"}\n')
    with pytest.raises(RunFileError, match="newer"):
        RunWriter(path, {}, resume=True)
    path.write_bytes(b'{"kind":"header","seq":%d,"schema":1,"run":"a"}\n' % (2**63 - 1))
    with pytest.raises(RunFileError, match="damage"):
        RunWriter(path, {}, resume=True)


def test_without_resume_a_file_that_is_there_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "run.jsonl"
    begun(path).close()
    with pytest.raises(RunFileError, match="exists"):
        RunWriter(path, {})


def test_a_foreign_checkpoint_is_refused_where_there_are_rows_and_a_fork_where_there_are_none(tmp_path):
    ours, theirs, fork = (tmp_path / name for name in ("ours.jsonl", "theirs.jsonl", "fork.jsonl"))
    state = begun(theirs).state_dict()
    writer = begun(ours)
    with pytest.raises(RunFileError, match=rf"{state['run']}.*would mix"):
        writer.load_state_dict(state)
    with pytest.raises(RunFileError, match="would mix"):
        RunWriter(ours, {}, resume=True).load_state_dict(state)
    with RunWriter(fork, {}) as writer:
        writer.load_state_dict(state)
        train(writer, range(8, 10), 0.0)
    run = load_run(fork)
    assert run.id != state["run"]
    assert run.steps.tolist() == [8, 9]
    assert run.events[0].detail["of"] == state["run"]
    assert run.events[0].step == 7


def test_the_state_is_json_and_holds_no_folder(tmp_path):
    path = tmp_path / "run.jsonl"
    writer = begun(path)
    state = writer.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert str(tmp_path) not in json.dumps(state)
    assert state == {"version": 1, "run": writer.id, "rank": 0, "seq": 9, "step": 7, "path": "run.jsonl"}
    assert writer.state_dict(step=9)["step"] == 9
    assert RunWriter(None, {}).state_dict()["path"] is None


def test_what_a_power_cut_took_away_is_a_gap(tmp_path):
    path = tmp_path / "run.jsonl"
    state = begun(path).state_dict()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]))  # the system had not brought the rest to the disk
    with RunWriter(path, {}, resume=True) as writer:
        writer.load_state_dict(state)
        train(writer, range(8, 10), 1.0)
    run = load_run(path)
    assert run.steps.tolist() == [0, 1, 2, 3, 8, 9]
    assert run.gaps == 1


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"run": None}, {"seq": -1}, {"seq": "3"}, {"step": -1}, {"step": 1.5}, {"seq": 2**63}],
    ids=repr,
)
def test_a_state_that_is_none_is_refused(tmp_path, change):
    writer = begun(tmp_path / "run.jsonl")
    with pytest.raises(InvalidArgumentError, match="state_dict"):
        writer.load_state_dict({**writer.state_dict(), **change})
    with pytest.raises(InvalidArgumentError, match="state_dict"):
        writer.load_state_dict([])


def test_columns_and_what_is_assumed_are_said_again(tmp_path):
    path = tmp_path / "run.jsonl"
    for attempt in range(2):
        with RunWriter(path, {}, resume=True) as writer:
            writer.assume(mode="train")
            writer.declare("loss", unit="nat")
            train(writer, range(2 * attempt, 2 * attempt + 2), attempt)
    kinds = [json.loads(line)["kind"] for line in path.read_bytes().splitlines()]
    assert kinds == ["header", *["assumed", "column", "row", "row"], "resumed", *["assumed", "column", "row", "row"]]


def test_the_random_state_of_the_training_is_not_touched(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    begun(tmp_path / "run.jsonl")
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_provenance_summarises_the_optimizer_and_names_no_machine(tmp_path):
    model = torch.nn.Linear(3, 2)
    groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "lr": torch.tensor(0.5)}]
    found = provenance(optimizer=torch.optim.AdamW(groups, lr=0.25), seed=3)
    with RunWriter(tmp_path / "run.jsonl", found):
        pass
    run = load_run(tmp_path / "run.jsonl")
    summary = run.provenance["optimizer"]
    assert summary["class"] == "AdamW"
    assert [(g["lr"], g["weight_decay"], g["tensors"], g["parameters"]) for g in summary["groups"]] == [
        (0.25, 0.1, 1, 6),
        (0.5, 0.01, 1, 2),
    ]
    assert summary["groups"][0]["betas"] == [0.9, 0.999]
    assert {"versions", "platform", "created", "seed"} <= run.provenance.keys()
    assert str(tmp_path) not in json.dumps(found)
