"""Sinks: what was written is read back with the framework's own reader; a broken one reaches nobody."""

from __future__ import annotations

import builtins
import csv
import json
import math
import os
import random
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dyntune
from dyntune.cli import main
from dyntune.errors import InvalidArgumentError, MissingDependencyError, RunFileError
from dyntune.integrations.csv_file import CSVSink
from dyntune.integrations.mlflow import MLflowSink
from dyntune.integrations.parquet import ParquetSink
from dyntune.integrations.tensorboard import TensorBoardSink
from dyntune.integrations.trackio import TrackioSink
from dyntune.integrations.wandb import WandbSink
from dyntune.monitor.load import load_run
from dyntune.monitor.run import Event, Row, Run
from dyntune.monitor.sink import GuardedSink, Sink, SinkWarning, export
from dyntune.monitor.writer import RunWriter

Numbers = dict[tuple[int, str], float]

WHY = "not installed: make test-full brings the extra [sinks]"

LAMBDA, NORM = "curvature/lambda_max", "grad/norm"
HOSTILE = (
    "grad/log_rms/λ_ℓ.weight",
    "grad/log_rms/<script>alert(1)</script>",
    "a//b",
    "/etc/passwd",
    "../../escape",
    "=HYPERLINK(1)",
    "line\nbreak\x1b[31m",
    'quo"te,comma',
    "",
    "." * 3,
    "x" * 400,
    "x" * 400 + "y",
    "\ud800 lone surrogate",
    "step",
)
ALERT = Event(name="alert", step=3, detail={"kind": "diverging", "text": "λ `x` </script>", "ratio": math.inf})


class Board:
    """A framework: how a sink is made, and how its own reader gives back metrics and the text of events."""

    def __init__(
        self,
        make: Callable[[], Sink],
        read: Callable[[], tuple[Numbers, list[str]]],
        finish: Callable[[], object],
        prefix: str,
        kept: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.make, self.read, self.finish, self.prefix = make, read, finish, prefix
        self.kept = kept  # whether a name is stored as it is


def tensorboard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    def read() -> tuple[Numbers, list[str]]:
        from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE as ALL
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder / "tb"), ALL)
        found.Reload()
        texts = [e.tensor_proto.string_val[0].decode() for t in found.Tags()["tensors"] for e in found.Tensors(t)]
        return {(e.step, tag): e.value for tag in found.Tags()["scalars"] for e in found.Scalars(tag)}, texts

    return Board(
        lambda: TensorBoardSink(folder / "tb", resume=True), read, lambda: None, "", lambda name: "\ud800" not in name
    )


def csv_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    def read() -> tuple[Numbers, list[str]]:
        with (folder / "run.csv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        metrics = {(int(r["step"]), r["name"]): float(r["value"]) for r in lines if r["kind"] == "metric"}
        return metrics, [r["detail"] for r in lines if r["kind"] == "event"]

    def kept(name: str) -> bool:
        return name.isprintable() and not name.startswith("=")

    return Board(lambda: CSVSink(folder / "run.csv", resume=True), read, lambda: None, "", kept)


def parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    table = pytest.importorskip("pyarrow.parquet", reason=WHY)

    def read() -> tuple[Numbers, list[str]]:
        lines = table.read_table(folder / "run.parquet").to_pylist()
        metrics = {(r["step"], r["name"]): r["value"] for r in lines if r["kind"] == "metric"}
        return metrics, [r["detail"] for r in lines if r["kind"] == "event"]

    def kept(name: str) -> bool:
        return "\ud800" not in name

    return Board(lambda: ParquetSink(folder / "run.parquet", resume=True), read, lambda: None, "", kept)


def mlflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # 3.17 takes one only where this is said
    flow = pytest.importorskip("mlflow", reason=WHY)
    uri = (folder / "mlruns").as_uri()
    client = flow.MlflowClient(tracking_uri=uri)
    run = client.create_run(client.create_experiment("dyntune")).info.run_id

    def read() -> tuple[Numbers, list[str]]:
        data = client.get_run(run).data
        found = {(m.step, name): m.value for name in data.metrics for m in client.get_metric_history(run, name)}
        return found, [text for tag, text in sorted(data.tags.items()) if tag.startswith("dyntune.event.")]

    def kept(name: str) -> bool:
        return name in (LAMBDA, NORM, "loss", "step", HOSTILE[0])

    return Board(lambda: MLflowSink(run, tracking_uri=uri), read, lambda: None, "dyntune/", kept)


def trackio(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    board = pytest.importorskip("trackio", reason=WHY)
    storage = board.sqlite_storage.SQLiteStorage
    monkeypatch.setattr(board.sqlite_storage, "TRACKIO_DIR", folder / "trackio")  # read when it was imported
    monkeypatch.setattr(board.utils, "TRACKIO_DIR", folder / "trackio")
    run = board.init(project="p", name="n", embed=False, auto_log_cpu=False, auto_log_gpu=False)

    def read() -> tuple[Numbers, list[str]]:
        rows = storage.get_logs("p", "n")
        metrics = {(r["step"], n): v for r in rows for n, v in r.items() if n not in ("step", "timestamp")}
        return metrics, [alert["text"] for alert in storage.get_alerts("p")]

    def kept(name: str) -> bool:
        return "\ud800" not in name

    return Board(lambda: TrackioSink(run), read, run.finish, "dyntune/", kept)


def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def wandb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    board = pytest.importorskip("wandb", reason=WHY)
    quiet(monkeypatch)
    run = board.init(project="p", mode="offline", dir=str(folder))

    def read() -> tuple[Numbers, list[str]]:
        from wandb.proto.wandb_internal_pb2 import Record

        metrics: Numbers = {}
        texts = []
        for raw in offline_records(next(folder.glob("wandb/offline-run-*/*.wandb"))):
            record = Record()
            record.ParseFromString(raw)
            if record.WhichOneof("record_type") != "history":
                continue
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = row.pop("dyntune/step")
            for name, value in row.items():
                if name.startswith("dyntune/events/"):
                    texts.append(value)
                elif not name.startswith("_"):
                    metrics[step, name] = float(value)  # NaN is text there
        return metrics, texts

    def kept(name: str) -> bool:
        return "\ud800" not in name and name != "step"

    def finish() -> None:
        run.finish()
        board.teardown()  # waits for the process that writes the file

    return Board(lambda: WandbSink(run), read, finish, "dyntune/", kept)


def offline_records(path: Path) -> Iterator[bytes]:
    """Records of a LevelDB log with a header of seven bytes, which is what W&B keeps offline."""
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # blocks end in padding where no header fits
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


BOARDS = {f.__name__: f for f in (csv_file, tensorboard, parquet, mlflow, trackio, wandb)}


@pytest.fixture(params=BOARDS.values(), ids=BOARDS)
def board(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of frameworks that are imported
        made: Board = request.param(tmp_path, monkeypatch)
    yield made
    made.finish()


def same(a: float, b: float) -> bool:
    """Equal, in single precision: TensorBoard stores no more."""
    return np.array_equal(np.float32(a), np.float32(b), equal_nan=True)


def test_numbers_and_events_come_back(board: Board) -> None:
    sink = board.make()
    assert isinstance(sink, Sink)
    given = [(0, {LAMBDA: 12.5, NORM: 0.1}), (3, {LAMBDA: math.inf}), (7, {NORM: math.nan, LAMBDA: -math.inf})]
    for step, values in given:
        sink.write(step, values, (ALERT,) if step == 3 else ())
    sink.close()
    sink.close()
    board.finish()
    metrics, texts = board.read()
    expected = {(step, board.prefix + name): value for step, values in given for name, value in values.items()}
    assert metrics.keys() == expected.keys()
    assert all(same(metrics[key], expected[key]) for key in expected)
    (text,) = texts
    assert "diverging" in text
    assert "λ `x` </script>" in json.loads(text)["text"]


def test_hostile_names_stay_apart(board: Board, tmp_path: Path) -> None:
    sink = board.make()
    values = {name: float(i) for i, name in enumerate(HOSTILE)}
    outside = set(tmp_path.parent.iterdir())
    sink.write(5, values, ())
    sink.close()
    board.finish()
    metrics, _ = board.read()
    assert sorted(metrics.values()) == sorted(values.values())  # none lost, none under another's name
    for name, value in values.items():
        if board.kept(name):
            assert metrics[5, board.prefix + name] == value
    assert set(tmp_path.parent.iterdir()) == outside


def test_resuming_appends(board: Board) -> None:
    first = board.make()
    for step in range(6):
        first.write(step, {NORM: float(step)}, (ALERT,) if step == 2 else ())
    first.close()
    second = board.make()
    for step in range(4, 9):  # from the checkpoint of step 3
        second.write(step, {NORM: 10.0 + step}, (ALERT,) if step == 8 else ())
    second.close()
    board.finish()
    metrics, texts = board.read()
    name = board.prefix + NORM
    assert sorted(step for step, n in metrics if n == name) == list(range(9))
    assert [metrics[step, name] for step in (0, 3, 8)] == [0.0, 3.0, 18.0]
    assert len(texts) == 2


def test_ten_thousand_steps(board: Board) -> None:
    sink = board.make()
    for step in range(10_000):
        sink.write(step, {NORM: step / 7, LAMBDA: -float(step)}, ())
    sink.close()
    board.finish()
    metrics, _ = board.read()
    assert len(metrics) == 20_000
    for step in (0, 4_999, 9_999):
        assert same(metrics[step, board.prefix + NORM], step / 7)


def test_random_states_are_left_alone(board: Board) -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    sink = board.make()
    sink.write(0, {NORM: 1.0}, (ALERT,))
    sink.close()
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_closed_sink_says_so(board: Board) -> None:
    sink = board.make()
    sink.close()
    with pytest.raises(InvalidArgumentError, match="closed"):
        sink.write(0, {NORM: 1.0}, ())


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboard", lambda: TensorBoardSink("x")),
        ("pyarrow", lambda: ParquetSink("x.parquet")),
        ("wandb", WandbSink),
        ("mlflow", MLflowSink),
        ("trackio", lambda: TrackioSink(None)),
    ],
)
def test_a_missing_package_is_named(package: str, make: Callable[[], Sink], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dyntune\["):
        make()


def test_importing_sinks_imports_no_framework() -> None:
    names = ("csv_file", "mlflow", "parquet", "tensorboard", "trackio", "wandb")
    code = f"import importlib, sys; [importlib.import_module('dyntune.integrations.' + n) for n in {names}]; "
    code += "print(sorted({'mlflow', 'pyarrow', 'tensorboard', 'trackio', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    for make, name in ((CSVSink, "a.csv"), (ParquetSink, "a.parquet")):
        path = tmp_path / name
        path.write_text("mine")
        if make is ParquetSink:
            pytest.importorskip("pyarrow", reason=WHY)
        with pytest.raises(RunFileError, match="resume=True"):
            make(path).write(0, {NORM: 1.0}, ())
        assert path.read_text() == "mine"


def test_csv_of_something_else_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(RunFileError, match="no file of this sink"):
        CSVSink(path, resume=True).write(0, {NORM: 1.0}, ())
    assert path.read_text() == "epoch,loss\n1,2\n"


def test_csv_survives_a_kill_at_any_byte(tmp_path: Path) -> None:
    whole = tmp_path / "whole.csv"
    sink = CSVSink(whole)
    for step in range(3):
        sink.write(step, {"line\nbreak": 1.0, NORM: 2.0}, (ALERT,))
    sink.close()
    data = whole.read_bytes()
    for cut in range(len(data) + 1):
        path = tmp_path / "cut.csv"
        path.write_bytes(data[:cut])
        sink = CSVSink(path, resume=True)
        sink.write(9, {NORM: 3.0}, ())
        sink.close()
        kept = data[: data.rfind(b"\n", 0, cut) + 1] or data[: data.index(b"\n") + 1]
        assert path.read_bytes() == kept + b"9,metric,grad/norm,3.0,\n"


def test_csv_numbers_are_exact_and_no_cell_is_a_formula(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    values = {"=1+1": 0.1 + 0.2, "@x": 1e-310, "+y": math.nan, "-z": -math.inf}
    sink = CSVSink(tmp_path / "a.csv")
    sink.write(1, values, ())
    sink.close()
    table = pandas.read_csv(tmp_path / "a.csv")
    assert table["name"].tolist() == [f"'{name}" for name in values]
    assert np.array_equal(table["value"], list(values.values()), equal_nan=True)


def test_parquet_appears_when_it_is_closed(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason=WHY)
    sink = ParquetSink(tmp_path / "a.parquet")
    sink.write(0, {NORM: 1.0}, ())
    assert not (tmp_path / "a.parquet").exists()
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_parquet_of_something_else_is_not_resumed(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason=WHY)
    from pyarrow import parquet as files

    files.write_table(pa.table({"epoch": [1]}), tmp_path / "a.parquet")
    with pytest.raises(RunFileError, match="columns epoch"):
        ParquetSink(tmp_path / "a.parquet", resume=True).write(0, {NORM: 1.0}, ())
    assert files.read_table(tmp_path / "a.parquet").to_pydict() == {"epoch": [1]}


# --- runs of the user's -----------------------------------------------------------------------------------------------


def test_a_writer_of_the_user_stays_open(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tb")) as writer:
        writer.add_scalar("loss", 1.0, 0)
        sink = TensorBoardSink(writer, prefix="dyntune/")
        sink.write(0, {"loss": 2.0}, ())
        sink.close()
        writer.add_scalar("loss", 0.5, 1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [e.value for e in found.Scalars("loss")] == [1.0, 0.5]
    assert [e.value for e in found.Scalars("dyntune/loss")] == [2.0]
    with pytest.raises(InvalidArgumentError, match="purge_step"):
        TensorBoardSink(writer, resume=True)


def test_without_an_active_run_there_is_nowhere_to_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in (("wandb", WandbSink), ("mlflow", MLflowSink), ("trackio", lambda: TrackioSink(object()))):
        pytest.importorskip(name, reason=WHY)
        with pytest.raises(InvalidArgumentError, match="nowhere to log"):
            make()


def test_wandb_keeps_an_axis_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = pytest.importorskip("wandb", reason=WHY)
    quiet(monkeypatch)
    run = board.init(project="p", mode="offline", dir=str(tmp_path))
    run.log({"mine": 1.0}, step=500)
    sink = WandbSink(run)
    sink.write(3, {NORM: 1.0}, ())  # lower than the training's step, and yet kept
    sink.close()
    run.finish()
    board.teardown()
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for raw in offline_records(next(tmp_path.glob("wandb/offline-run-*/*.wandb"))):
        records.append(Record())
        records[-1].ParseFromString(raw)
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert axes["dyntune/*"] == "dyntune/step"
    keys = [{"/".join(i.nested_key) or i.key for i in r.history.item} for r in records]
    assert any({"dyntune/step", "dyntune/grad/norm"} <= row for row in keys)


# --- the guard --------------------------------------------------------------------------------------------------------


class Kept:
    """Keeps what it is given, and fails when told to."""

    def __init__(self, *, fail_at: int | None = None, fail_close: bool = False) -> None:
        self.rows: list[tuple[int, Mapping[str, float], list[Event]]] = []
        self.closed = 0
        self.fail_at, self.fail_close = fail_at, fail_close

    def write(self, step: int, values: Mapping[str, float], events: Sequence[Event]) -> None:
        if step == self.fail_at:
            raise OSError("no space left")
        self.rows.append((step, values, list(events)))

    def close(self) -> None:
        self.closed += 1
        if self.fail_close:
            raise OSError("gone")


def test_a_sink_that_fails_is_disabled_with_one_warning() -> None:
    sink = Kept(fail_at=2)
    guarded = GuardedSink(sink)
    for step in range(2):
        guarded.write(step, {"loss": 1.0})
    with pytest.warns(SinkWarning, match=r"Kept failed at step 2.*no space left"):
        guarded.write(2, {"loss": 1.0})
    for step in range(3, 5):
        guarded.write(step, {"loss": 1.0})  # a second warning would be an error here
    guarded.close()
    guarded.close()
    assert [step for step, _, _ in sink.rows] == [0, 1]
    assert guarded.trouble == "OSError: no space left"
    assert sink.closed == 1


@pytest.mark.parametrize("sink", [Kept(fail_at=0), Kept(fail_close=True)])
def test_nothing_reaches_the_training_even_where_warnings_are_errors(sink: Kept) -> None:
    guarded = GuardedSink(sink)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded.write(0, {})
        guarded.close()
    assert guarded.trouble is not None


def test_interrupts_pass() -> None:
    class Interrupted(Kept):
        def write(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuardedSink(Interrupted()).write(0, {})


def test_a_monitor_feeds_its_sinks(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kept, broken = Kept(), Kept(fail_at=0)
    sinks = [CSVSink(tmp_path / "run.csv"), broken, kept]
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        with dyntune.Monitor(model, optimizer, log=tmp_path / "run.jsonl", sinks=sinks) as monitor:
            for _ in range(40):
                loss = model(torch.ones(4, 3)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                monitor.observe(loss)
    assert [w.category for w in given] == [SinkWarning]
    assert kept.closed == broken.closed == 1
    run = monitor.run
    passed_on = {(step, name): value for step, values, _ in kept.rows for name, value in values.items()}
    recorded = {(row.step, name): v for row in run.rows for name, v in row.values.items() if v is not None}
    assert passed_on == {key: recorded[key] for key in passed_on}
    assert {step for step, name in passed_on if name == "train/loss"} == set(range(40))
    assert [e.name for _, _, events in kept.rows for e in events] == [e.name for e in run.events]


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_replays_the_rows_that_count() -> None:
    events = tuple(Event(name=n, step=s, detail={}) for n, s in (("a", None), ("b", 1), ("c", 5), ("d", None)))
    rows = (
        Row(step=0, values={"loss": None}),
        Row(step=2, values={"loss": math.inf, "grad/norm": None}),
        Row(step=4, values={"loss": 1.0}),
    )
    sink = Kept()
    export(Run(rows=rows, events=events, superseded=(Row(step=9, values={"loss": 7.0}),)), sink)
    assert [(step, dict(values), [e.name for e in found]) for step, values, found in sink.rows] == [
        (0, {}, ["a"]),
        (2, {"loss": math.inf}, ["b"]),
        (4, {"loss": 1.0}, []),
        (4, {}, ["c", "d"]),
    ]
    assert sink.closed == 1


def test_export_closes_what_fails() -> None:
    sink = Kept(fail_at=0)
    with pytest.raises(OSError, match="no space"):
        export(Run(rows=(Row(step=0, values={"loss": 1.0}),)), sink)
    assert sink.closed == 1


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    with RunWriter(path, {}) as writer:
        for step in range(5):
            writer.row(step, {"loss": 1.0 / (1 + step), LAMBDA: None if step == 3 else float(step)})
        writer.event("alert", step=2, kind="diverging")
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "tensorboard"])
def test_the_command_exports(log: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason=WHY)
    out = tmp_path / {"csv": "run.csv", "parquet": "run.parquet", "tensorboard": "tb"}[kind]
    assert main(["export", str(log), "--to", kind, "-o", str(out)]) == 0
    assert "9 numbers and 1 event" in capsys.readouterr().out
    monkeypatch = pytest.MonkeyPatch()
    reader = {"csv": csv_file, "parquet": parquet, "tensorboard": tensorboard}[kind](tmp_path, monkeypatch)
    metrics, texts = reader.read()
    run = load_run(log)
    expected = {(r.step, n): v for r in run.rows for n, v in r.values.items() if v is not None}
    assert metrics.keys() == expected.keys()
    assert all(same(metrics[key], expected[key]) for key in expected)
    assert len(texts) == 1


def test_the_command_does_not_write_over_or_mix(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "there"
    out.mkdir()
    (out / "x").write_text("")
    for kind in ("csv", "tensorboard"):
        assert main(["export", str(log), "--to", kind, "-o", str(out)]) == 1
        assert "exists" in capsys.readouterr().err
    assert os.listdir(out) == ["x"]
    assert main(["export", str(tmp_path / "none.jsonl"), "--to", "csv", "-o", str(tmp_path / "a.csv")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    assert main(["export", str(log), "--to", "csv", "-o", str(tmp_path / "no" / "a.csv")]) == 1
    assert "folder" in capsys.readouterr().err
