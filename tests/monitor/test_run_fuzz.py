"""Files that are damaged in every way: a run or a typed error, and never a record that nobody wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyntune.errors import DyntuneError
from dyntune.monitor.lines import encode
from dyntune.monitor.load import load_run
from dyntune.monitor.run import Run
from dyntune.monitor.writer import RunWriter

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = st.sampled_from(["header", "row", "column", "event", "assumed", "resumed", "lost", "other"])
SMALL = st.none() | st.booleans() | st.integers(-2, 12) | st.floats() | st.text(max_size=3) | st.just(2**63)
NAMES = (
    "schema step values status labels name unit detail count reason torn of run rank world provenance level nonfinite"
)
FIELDS = st.dictionaries(
    st.sampled_from(NAMES.split()),
    SMALL | st.dictionaries(st.text(max_size=3), SMALL | st.lists(SMALL, max_size=2), max_size=2),
    max_size=6,
)
LINES = st.lists(
    st.builds(lambda kind, seq, more: {"kind": kind, "seq": seq, **more}, KINDS, st.integers(0, 9), FIELDS), max_size=8
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> list[bytes]:
    """Lines of two attempts, with everything that a file may hold."""
    path = tmp_path_factory.mktemp("sound") / "run.jsonl"
    with RunWriter(path, {"seed": 3}) as writer:
        writer.assume(mode="train")
        writer.declare("loss", unit="nat")
        for step in range(6):
            writer.row(step, {"loss": step / 2, "nan": float("nan")}, labels={"file": "a"})
        state = writer.state_dict(step=3)
    with RunWriter(path, {"seed": 4}, resume=True) as writer:
        writer.load_state_dict(state)
        writer.event("alert", step=4, why=float("inf"))
        for step in range(4, 8):
            writer.row(step, {"loss": step / 2 + 100}, status={"loss": ("LOW", "few")})
    return path.read_bytes().splitlines(keepends=True)


def read(folder: Path, data: bytes) -> Run | None:
    """As a person would use it; None where it is refused with a typed error."""
    path = folder / "run.jsonl"
    path.write_bytes(data)
    try:
        run = load_run(path)
    except DyntuneError:
        return None
    str(run)
    assert len(run.steps) == len(run.rows) == len(list(run.rows))
    for name in run.names:
        steps, values = run.series(name)
        assert len(steps) == len(values) == len(run.limit(name)) == len(run.interval(name)[0])
    for row in run.superseded:
        assert row.step >= 0
    return run


@FUZZ
@given(st.data())
def test_lines_taken_away_repeated_or_in_another_order_invent_nothing(tmp_path_factory, sound, data):
    chosen = data.draw(st.lists(st.integers(0, len(sound) - 1), max_size=2 * len(sound)))
    run = read(tmp_path_factory.mktemp("run"), b"".join(sound[i] for i in chosen))
    if run is None:
        return
    rows = [row.step for row in (*run.rows, *run.superseded)]
    assert len(rows) == sum(sound[i].startswith(b'{"kind":"row"') for i in chosen)
    assert run.quarantined == ()
    if chosen != sorted(set(chosen)):
        assert run.gaps > 0


@FUZZ
@given(st.data())
def test_pieces_spliced_together_keep_every_line_that_is_whole(tmp_path_factory, sound, data):
    whole = b"".join(sound)
    cuts = data.draw(
        st.lists(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole))), min_size=1, max_size=4)
    )
    spliced = b"".join(whole[min(cut) : max(cut)] for cut in cuts)
    run = read(tmp_path_factory.mktemp("run"), spliced)
    lines = spliced.split(b"\n")
    intact = {line.rstrip(b"\n") for line in sound}
    expected = sum(line in intact and line.startswith(b'{"kind":"row"') for line in lines)
    if run is None:
        assert expected == 0
    else:
        assert expected <= len(run) + len(run.superseded) <= expected + len(cuts)  # two pieces may make a line


@FUZZ
@given(st.data(), st.binary(max_size=30))
def test_arbitrary_bytes_put_anywhere(tmp_path_factory, sound, data, junk):
    whole = b"".join(sound)
    at = data.draw(st.integers(0, len(whole)))
    run = read(tmp_path_factory.mktemp("run"), whole[:at] + junk + whole[at:])
    assert run is not None
    assert len(run) + len(run.superseded) >= 9  # of ten rows, the one that it hit may be gone


@FUZZ
@given(st.binary(max_size=300))
def test_arbitrary_bytes_alone(tmp_path_factory, data):
    read(tmp_path_factory.mktemp("run"), data)


@settings(FUZZ, max_examples=500)
@given(LINES)
def test_records_whose_fields_make_no_sense(tmp_path_factory, records):
    read(tmp_path_factory.mktemp("run"), b"".join(map(encode, records)))


@FUZZ
@given(LINES, st.binary(max_size=20))
def test_whatever_is_there_a_writer_continues_it_or_refuses(tmp_path_factory, records, tail):
    folder = tmp_path_factory.mktemp("run")
    path = folder / "run.jsonl"
    before = b"".join(map(encode, records)) + tail
    path.write_bytes(before)
    try:
        with RunWriter(path, {}, resume=True) as writer:
            writer.row(10**6, {"loss": 1.5})
    except DyntuneError:
        assert path.read_bytes() == before
        return
    assert path.read_bytes().startswith(before)
    run = load_run(path)
    assert run.rows[-1].step == 10**6
    assert run.rows[-1].values == {"loss": 1.5}
