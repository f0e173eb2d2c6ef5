"""The record of a run: what is written can be read, whatever happens to the file in between."""

from __future__ import annotations

import json
import math
import os
import signal
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dyntune
from dyntune.errors import DyntuneError, InvalidArgumentError, RunFileError
from dyntune.monitor.lines import decode, encode
from dyntune.monitor.load import load_run
from dyntune.monitor.run import Row, Run
from dyntune.monitor.writer import RunWriter, provenance
from dyntune.records import Estimate, Status

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(max_size=12) | st.sampled_from(["a/b", "~0", "x.low", "\n", "\ud800", "\x00", "NaN"])
NUMBERS = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**400), 10**400) | st.none()
PLAIN = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**60), 2**60) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.tuples(st.integers(0, 10**12), st.dictionaries(TEXT, NUMBERS, max_size=4)), max_size=6)


def estimate(value: float | None, low: float, high: float, status: Status = Status.OK, reason: str = "") -> Estimate:
    return Estimate(
        value=value,
        low=low,
        high=high,
        level=0.9,
        unit="u",
        method="by hand",
        covers="both",
        status=status,
        reason=reason,
    )


def written(path: Path | None, rows: list[tuple[int, dict[str, float | None]]]) -> Run:
    with RunWriter(path, {"seed": 3}) as writer:
        for step, values in rows:
            writer.row(step, values)
        return writer.run


def same(a: float | None, b: float | None) -> bool:
    """Equal to the last bit, NaN to itself."""
    return repr(a) == repr(b)


def same_rows(a: Run, b: Run) -> bool:
    return [r.step for r in a.rows] == [r.step for r in b.rows] and all(
        x.values.keys() == y.values.keys() and all(same(x.values[k], y.values[k]) for k in x.values)
        for x, y in zip(a.rows, b.rows, strict=True)
    )


# -- what is written is read -------------------------------------------------------------------------------------------


def test_a_run_has_columns_steps_intervals_events_and_provenance(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, provenance(seed=7)) as writer:
        writer.assume(mode="train")
        writer.row(10, {"loss": 2.5, "sharp": estimate(4.0, 3.5, 5.0)}, labels={"checkpoint": "a.pt"})
        writer.event("restart", step=15, why="power")
        writer.row(20, {"loss": 1.5})
        writer.row(30, {"sharp": estimate(None, -math.inf, math.inf, Status.REFUSED, "no gradient")})
    run = load_run(path)
    assert run.steps.tolist() == [10, 20, 30]
    assert run.names == ("loss", "sharp")
    np.testing.assert_array_equal(run["loss"], [2.5, 1.5, np.nan])
    steps, values = run.series("sharp")
    assert steps.tolist() == [10, 30]
    np.testing.assert_array_equal(values, [4.0, np.nan])
    np.testing.assert_array_equal(run.interval("sharp"), [[3.5, -np.inf], [5.0, np.inf]])
    assert run.columns["sharp"].unit == "u"
    assert run.columns["sharp"].level == 0.9
    assert run.rows[2].status == {"sharp": ("REFUSED", "no gradient")}
    assert run.rows[0].labels == {"checkpoint": "a.pt"}
    assert (run.events[0].name, run.events[0].step, run.events[0].detail) == ("restart", 15, {"why": "power"})
    assert run.provenance["seed"] == 7
    assert run.provenance["schema"] == 1
    assert run.provenance["versions"]["dyntune"] == dyntune.__version__
    assert run.assumed == {"mode": "train"}
    assert (run.gaps, run.torn, run.quarantined, run.unknown) == (0, False, (), 0)
    assert "event at step 15: restart" in str(run)


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    run = Run(rows=(Row(step=0, values={"loss": 1.0}),))
    with pytest.raises(InvalidArgumentError, match=r"'los'.*loss"):
        run["los"]


@QUICK
@given(ROWS)
def test_reading_gives_back_what_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    in_memory = written(path, rows)
    run = load_run(path)
    assert same_rows(run, in_memory)
    assert same_rows(run, Run(rows=tuple(Row(step=s, values=v) for s, v in rows)))
    for name in run.names:
        assert run[name].dtype == np.float64


@QUICK
@given(st.dictionaries(TEXT, PLAIN, max_size=4))
def test_every_line_is_strict_json_and_gives_back_its_detail(detail):
    line = encode({"kind": "event", "seq": 0, "name": "e", "detail": detail})
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = decode(line[:-1])["detail"]
    assert repr(found) == repr(detail)  # NaN, signs of zero and all


def test_what_is_not_plain_is_not_written(tmp_path):
    with RunWriter(tmp_path / "run.jsonl", {}) as writer:
        with pytest.raises(TypeError):
            writer.row(0, {"loss": object()})
        writer.row(1, {"loss": 1.0})
    assert load_run(tmp_path / "run.jsonl").steps.tolist() == [1]
    assert load_run(tmp_path / "run.jsonl").gaps == 0


def test_one_record_is_one_system_call_on_a_descriptor_that_appends(tmp_path, monkeypatch):
    calls: list[bytes] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(data) or write(fd, data))
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}) as writer:
        writer.row(0, {"loss": 1.0})
        before = path.read_bytes()
        with path.open("ab") as other:  # somebody else's line in between is not overwritten
            other.write(b"note\n")
        writer.row(1, {"loss": 2.0})
    assert [data.count(b"\n") for data in calls] == [1, 1, 1]
    assert path.read_bytes() == before + b"note\n" + calls[-1]


def test_a_write_that_is_cut_short_is_continued_where_it_stopped(tmp_path, monkeypatch):
    path, write = tmp_path / "run.jsonl", os.write
    with RunWriter(path, {}) as writer:
        writer.row(0, {"loss": 1.0})
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
        writer.row(1, {"loss": 2.0})
        monkeypatch.setattr(os, "write", write)
        writer.row(2, {"loss": 3.0})
        assert same_rows(load_run(path), writer.run)
    run = load_run(path)
    assert run.steps.tolist() == [0, 1, 2]
    assert (run.gaps, run.torn, run.quarantined) == (0, 0, ())


def test_a_log_that_exists_is_not_touched(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"precious")
    with pytest.raises(RunFileError, match="exists"):
        RunWriter(path, {})
    assert path.read_bytes() == b"precious"
    with pytest.raises(RunFileError, match="cannot be created"):
        RunWriter(tmp_path / "absent" / "run.jsonl", {})


def test_pandas_gets_the_rows(tmp_path):
    pytest.importorskip("pandas")
    with RunWriter(None, {}) as writer:
        writer.row(5, {"loss": 1.0}, labels={"checkpoint": "a.pt"})
        writer.row(6, {"other": 2.0})
    frame = writer.run.to_pandas()
    assert frame.index.tolist() == [5, 6]
    assert frame["other"].tolist()[1] == 2.0
    assert frame["checkpoint"].tolist()[0] == "a.pt"


# -- what happens to files ---------------------------------------------------------------------------------------------

FIVE = [(step, {"loss": 10.0 - step, "other": math.nan}) for step in range(5)]


def file_of_five(folder: Path) -> Path:
    path = folder / "run.jsonl"
    written(path, FIVE)
    return path


def test_cut_anywhere_only_the_torn_record_is_lost(tmp_path):
    path = file_of_five(tmp_path)
    data = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(data) if byte == ord("\n"))]
    for end in range(starts[1] - 1, len(data) + 1):
        path.write_bytes(data[:end])
        run = load_run(path)
        # A record is whole once its closing brace is there, its newline or not.
        whole = sum(start - 1 <= end for start in starts[1:])
        assert len(run) == whole - 1
        assert run.torn == (end not in starts and end + 1 not in starts)
        assert (run.gaps, run.quarantined) == (0, ())


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"nonsense",
        b"\xff\xfe\x00",
        b"[1]",
        b"{}",
        b'{"kind":"row"}',
        b'{"kind":"row","seq":-1,"step":1}',
        b'{"kind":"row","seq":true,"step":1}',
        b'{"kind":"row","seq":3,"step":1,"values":{"loss":NaN}}',
        b'{"kind":"row","seq":3,"step":1,"values":{"loss":"1"}}',
        b'{"kind":"row","seq":3,"step":1,"values":[1]}',
        b'{"kind":"row","seq":3,"step":1.5}',
        b'{"kind":"row","seq":3,"step":' + b"9" * 30 + b"}",
        b'{"kind":"row","seq":3,"step":' + b"9" * 5000 + b"}",
        b'{"kind":"row","seq":3,"step":1,"status":{"loss":"bad"}}',
        b'{"kind":"row","seq":3,"step":1,"values":{"loss":1},"nonfinite":{"/values/loss":"nan"}}',
        b'{"kind":"row","seq":3,"step":1,"values":{"loss":null},"nonfinite":{"/values/other":"nan"}}',
        b'{"kind":"row","seq":3,"step":1,"values":{"loss":null},"nonfinite":{"/values/loss":"zero"}}',
        b'{"kind":"row","seq":3,"step":1,"nonfinite":{"":"nan"}}',
        b'{"kind":"row","seq":3,"step":1,"labels":{"a":1}}',
        b'{"kind":"column","seq":3,"name":1}',
        b'{"kind":"column","seq":3,"name":"a","level":"x"}',
        b'{"kind":"event","seq":3,"name":"a","detail":3}',
        b'{"kind":"header","seq":3}',
        b"[" * 100_000,
    ],
    ids=lambda line: line[:60].decode("latin1"),
)
def test_a_bad_line_is_set_aside_and_everything_else_kept(tmp_path, line):
    path = file_of_five(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[3] = line  # in the place of the row of step 2
    path.write_bytes(b"\n".join(lines))
    run = load_run(path)
    assert run.steps.tolist() == [0, 1, 3, 4]
    assert [bad.number for bad in run.quarantined] == [4]
    assert run.quarantined[0].reason
    assert run.gaps == 0  # the record is not missing, it is there and bad
    assert "1 bad lines set aside" in str(run)


def test_missing_records_are_noticed_and_a_wild_sequence_number_harms_nothing(tmp_path):
    path = file_of_five(tmp_path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:2] + lines[3:]))
    assert load_run(path).gaps == 1
    wild = lines.copy()
    wild[2] = wild[2].replace(b'"seq":2', b'"seq":999999999999')
    path.write_bytes(b"\n".join(wild))
    run = load_run(path)
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    assert run.gaps == 2  # there and back


def test_kinds_and_fields_of_later_versions_are_passed_over(tmp_path):
    path = file_of_five(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"kind":"alert","seq":6,"level":3}\n{"kind":"row","seq":7,"step":9,"values":{},"colour":"red"}\n')
    run = load_run(path)
    assert run.unknown == 1
    assert run.steps[-1] == 9
    assert (run.gaps, run.quarantined) == (0, ())


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"kind":"header","seq":0,"schema":2}\n')
    with pytest.raises(RunFileError, match="newer"):
        load_run(path)


@pytest.mark.parametrize("content", [b"", b"\n", b"loss,step\n1,2\n", b"\x80\x04K\x01."], ids=repr)
def test_what_is_no_run_is_refused(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(RunFileError, match="not a recorded run"):
        load_run(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RunFileError, match="absent"):
        load_run(tmp_path / "absent.jsonl")
    with pytest.raises(RunFileError):
        load_run(tmp_path)


@QUICK
@given(st.binary(max_size=400))
def test_any_bytes_at_all_give_a_run_or_a_typed_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    path.write_bytes(data)
    try:
        run = load_run(path)
    except DyntuneError:
        return
    str(run)


MUTATIONS = st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=0, max_size=6), st.integers(0, 6)), max_size=3)


@settings(QUICK, max_examples=250)
@given(MUTATIONS)
def test_damage_stays_in_the_lines_that_it_hits(tmp_path_factory, mutations):
    path = file_of_five(tmp_path_factory.mktemp("run"))
    lines = path.read_bytes().split(b"\n")
    hit = set()
    for position, inserted, removed in mutations:
        row = position % 5 + 1  # the lines of the rows; newlines would make new lines
        at = position // 5 % (len(lines[row]) + 1)
        lines[row] = lines[row][:at] + inserted.replace(b"\n", b"") + lines[row][at + removed :]
        hit.add(row)
    path.write_bytes(b"\n".join(lines))
    run = load_run(path)
    str(run)
    untouched = [FIVE[row - 1] for row in range(1, 6) if row not in hit]
    found = [(r.step, dict(r.values)) for r in run.rows]
    for step, values in untouched:
        assert any(s == step and all(same(v.get(k), x) for k, x in values.items()) for s, v in found)


KILLED = """
import os, sys
from dyntune.monitor.writer import RunWriter
writer = RunWriter(sys.argv[1], {})
step = 0
while True:
    writer.row(step, {"loss": 1.0 / (step + 1)})
    step += 1
    if step == 200:
        print("go", flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_a_file_without_inner_damage(tmp_path):
    path = tmp_path / "run.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    run = load_run(path)
    assert len(run) >= 200
    assert run.steps.tolist() == list(range(len(run)))
    assert (run.gaps, run.quarantined) == (0, ())


def test_names_in_the_file_are_ascii(tmp_path):
    path = tmp_path / "run.jsonl"
    written(path, [(0, {"λ\x1b[31m": 1.0})])
    assert set(path.read_text("ascii")) <= set(string.printable)
    assert load_run(path).names == ("λ\x1b[31m",)
    assert "\x1b" not in str(load_run(path))
