"""``dyntune watch``: a file that grows, and what of it is shown."""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from dyntune.cli import main
from dyntune.commands.glance import glance, printable, sparkline
from dyntune.commands.live import LiveScreen
from dyntune.commands.watch import Lines, follow
from dyntune.errors import RunFileError
from dyntune.monitor.lines import encode
from dyntune.monitor.load import load_run
from dyntune.monitor.run import Event, Row, Run
from dyntune.monitor.tail import Tail
from tests.report.runs import monitored
from tests.test_cli_report import write_log


def row(seq: int, step: int, loss: float) -> bytes:
    return encode({"kind": "row", "seq": seq, "step": step, "values": {"train/loss": loss}})


def event(seq: int, name: str, **detail: object) -> bytes:
    return encode({"kind": "event", "seq": seq, "name": name, "step": 1, "detail": detail})


class Script:
    """In the place of waiting: each call does the next of what it was given, then Ctrl-C."""

    def __init__(self, *actions) -> None:
        self.actions = list(actions)

    def __call__(self) -> None:
        if not self.actions:
            raise KeyboardInterrupt
        self.actions.pop(0)()


class Seen:
    def __init__(self) -> None:
        self.glances = []

    def show(self, seen) -> None:
        self.glances.append(seen)


def append(path, data: bytes):
    def act() -> None:
        with path.open("ab") as file:
            file.write(data)

    return act


def test_what_is_appended_is_shown_until_the_run_ends(tmp_path):
    log = tmp_path / "run.jsonl"
    seen = Seen()
    first, second = row(0, 0, 2.0), row(1, 5, 1.0)
    script = Script(
        append(log, first),
        append(log, second[:10]),  # torn: nothing to show yet
        append(log, second[10:]),
        append(log, b"no json\n"),
        append(log, event(2, "closed")),
    )
    run = follow(Tail(log), seen, script)
    assert [g.step for g in seen.glances] == [0, 5, 5]
    assert [g.ended for g in seen.glances] == [False, False, True]
    assert run.steps.tolist() == [0, 5]
    assert len(run.quarantined) == 1
    assert not script.actions


def test_a_tail_reads_what_load_run_reads(tmp_path):
    log = write_log(tmp_path / "run.jsonl")  # without NaN, which equals nothing
    data, tail = log.read_bytes(), Tail(log)
    log.write_bytes(b"")
    for start in range(0, len(data), 777):  # in pieces that end anywhere
        append(log, data[start : start + 777])()
        tail.poll()
    whole, followed = load_run(log), tail.run()
    assert followed.rows == whole.rows
    assert followed.events == whole.events
    assert followed.provenance == whole.provenance


def test_a_file_that_is_replaced_or_cut_is_read_anew(tmp_path):
    log = tmp_path / "run.jsonl"
    tail = Tail(log)
    assert not tail.poll()
    log.write_bytes(row(0, 1, 1.0) + row(1, 2, 1.0))
    assert tail.poll()
    log.write_bytes(row(0, 9, 1.0))
    assert tail.poll()
    assert tail.run().steps.tolist() == [9]
    other = tmp_path / "other"
    other.write_bytes(row(0, 3, 1.0) + row(1, 4, 1.0) + row(2, 5, 1.0))
    os.replace(other, log)
    tail.poll()
    assert tail.run().steps.tolist() == [3, 4, 5]
    log.unlink()
    assert not tail.poll()
    assert tail.run().steps.tolist() == [3, 4, 5]  # what was seen stays


def test_of_several_processes_the_first_is_followed_and_a_folder_may_be_empty_yet(tmp_path):
    tail, folder = Tail(tmp_path / "run.jsonl"), Tail(tmp_path)
    assert not tail.poll()
    assert not folder.poll()
    (tmp_path / "run.rank1.jsonl").write_bytes(row(0, 8, 1.0))
    (tmp_path / "run.rank0.jsonl").write_bytes(row(0, 7, 1.0))
    assert tail.poll()
    assert folder.poll()
    assert tail.run().steps.tolist() == folder.run().steps.tolist() == [7]


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(RunFileError, match="no ordinary file"):
        Tail(os.devnull).poll()
    newer = tmp_path / "run.jsonl"
    newer.write_bytes(encode({"kind": "header", "seq": 0, "schema": 99}))
    with pytest.raises(RunFileError, match="99"):
        Tail(newer).poll()


def test_lines_say_each_alert_once(tmp_path):
    log, out = tmp_path / "run.jsonl", io.StringIO()
    alert = {"severity": "critical", "text": "it grows", "advice": "lower the rate"}
    script = Script(
        append(log, row(0, 0, 2.0)),
        append(log, event(1, "alert", **alert)),
        append(log, row(2, 1, 1.0)),
        append(log, event(3, "blind", signal="a", reason="b")),
        append(log, event(4, "closed")),
    )
    follow(Tail(log), Lines(out), script)
    assert out.getvalue().splitlines() == [
        "step 0  loss 2  undetermined",
        "alert at step 1 (critical): it grows What to change: lower the rate",
        "step 1  loss 1  undetermined",
    ]


def test_a_glance_holds_verdict_ratio_loss_rate_norm_overhead():
    seen = glance(monitored("edge"))
    assert [s.name for s in seen.signals] == [
        "ratio (deterministic)",
        "ratio (stochastic)",
        "ratio (along the step)",
        "loss",
        "lr",
        "gradient norm",
        "overhead",
    ]
    assert seen.line.endswith("at the edge, self-stabilising")
    assert seen.ended
    text = "\n".join(seen.lines())
    assert seen.verdict.sentence in text
    assert "▁" in text


def test_a_run_that_was_resumed_after_it_was_closed_has_not_ended():
    closed, resumed = (Event(name=name, step=None, detail={}) for name in ("closed", "resumed"))
    assert glance(Run(rows=(), events=(closed,))).ended
    assert not glance(Run(rows=(), events=(closed, resumed))).ended


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([1.0], ""),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 7.0, 3.0], "▁█▄"),
        ([math.nan, math.inf], "××"),
        ([-1e308, 1e308, math.nan], "▁█×"),
    ],
)
def test_sparklines(values, line):
    assert sparkline(np.array(values)) == line


def test_a_long_series_has_a_short_sparkline():
    assert len(sparkline(np.arange(100_000.0))) == 40


def test_no_control_character_and_no_markup_reaches_the_terminal():
    words = "\x1b]0;evil\x07\x1b[2J[bold red]x[/] \u202e\r\n"
    seen = glance(monitored("diverging", steps=90, words=words))
    texts = [*seen.lines(), seen.line]
    assert all(text.isprintable() for text in texts)
    out = io.StringIO()
    with LiveScreen(alerts=3, console=Console(file=out, force_terminal=True, width=100, color_system=None)) as screen:
        screen.show(seen)
    drawn = out.getvalue()
    assert "[bold red]x[/]" in drawn.replace("\n", "")
    for evil in ("\x1b]0", "\x07", "\x1b[2J", "\u202e"):
        assert evil not in drawn
    assert drawn.endswith("\x1b[?25h")  # the cursor is back


def test_the_live_screen_shows_the_latest_alerts_and_counts_the_others():
    events = tuple(Event(name="alert", step=i, detail={"text": f"number {i}"}) for i in range(8))
    out = io.StringIO()
    with LiveScreen(alerts=3, console=Console(file=out, width=100)) as screen:
        screen.show(glance(Run(rows=[Row(step=9, values={"train/loss": 1.0})], events=events)))
    assert "5 earlier alerts" in out.getvalue()
    assert "number 7" in out.getvalue()
    assert "number 4" not in out.getvalue()


def test_long_texts_are_cut():
    assert len(printable("a" * 10_000)) == 300


def test_once_shows_how_it_stands(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", steps=60)
    assert main(["watch", str(log), "--once"]) == 0
    said = capsys.readouterr().out
    assert "run.jsonl, step 59" in said
    assert "overhead" in said


def test_a_run_that_has_ended_is_shown_and_that_is_it(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", steps=60)
    assert main(["watch", str(log), "--plain"]) == 0
    assert "The run has ended." in capsys.readouterr().out


def test_wrong_usage_is_said(tmp_path, capsys):
    for interval in ("0", "-1", "nan", "1e30"):
        assert main(["watch", str(tmp_path / "run.jsonl"), "--interval", interval]) == 1
        assert "--interval" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "no" / "run.jsonl")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "absent.jsonl"), "--once"]) == 1
    assert main(["watch"]) == 2


def test_ctrl_c_ends_it_without_a_trace(tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_bytes(row(0, 3, 1.0))
    program = (  # a shell starts what it puts in the background with SIGINT ignored, and children inherit that
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from dyntune.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "watch", str(log), "--interval", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "step 3" in process.stdout.readline()  # it waits for more from here on
        process.send_signal(signal.SIGINT)
        assert "the training goes on" in process.stdout.read()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_ctrl_c_while_waiting_for_a_run_that_never_comes(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("threading.Event.wait", interrupted)
    assert main(["watch", str(tmp_path / "run.jsonl"), "--plain"]) == 0
    said = capsys.readouterr().out
    assert "Waiting for" in said
    assert "No longer waiting." in said


@pytest.mark.slow
def test_a_reader_who_has_enough_is_no_error(tmp_path):
    log = write_log(tmp_path / "run.jsonl", steps=60)
    ends = os.pipe()
    os.close(ends[0])
    found = subprocess.run(
        [sys.executable, "-m", "dyntune.cli", "watch", str(log), "--once"],
        stdout=ends[1],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    os.close(ends[1])
    assert (found.returncode, found.stderr) == (0, "")
