"""``dyntune report`` as a person in a shell meets it."""

from __future__ import annotations

import pytest

from dyntune.cli import main
from dyntune.monitor.lines import encode
from dyntune.report import render, run_page
from tests.documents import ROOT
from tests.documents import run as run_document
from tests.report.runs import monitored
from tests.report.test_run_page import assert_harmless


def write_log(path, *, kind="edge", steps=100, words=""):
    """The log of a run made by hand."""
    run = monitored(kind, steps=steps, words=words)
    records = [{"kind": "header", "schema": 1, "run": "abc", "rank": 0, "world": 1, "provenance": dict(run.provenance)}]
    records += [
        {"kind": "row", "step": row.step, "values": dict(row.values), "labels": dict(row.labels)} for row in run.rows
    ]
    records += [{"kind": "event", "name": e.name, "step": e.step, "detail": dict(e.detail)} for e in run.events]
    path.write_bytes(b"".join(encode(record | {"seq": seq}) for seq, record in enumerate(records)))
    return path


def test_the_how_to_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for said, printed in run_document(ROOT / "docs" / "how-to" / "report.md", {}):
        assert said == printed
    assert (tmp_path / "report.html").is_file()


@pytest.fixture
def log(tmp_path):
    return write_log(tmp_path / "run.jsonl")


def test_it_writes_a_page_and_says_what_it_comes_to(log, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", str(log), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "At the edge of stability" in said
    assert str(out) in said.replace("\n", "")  # a long path is wrapped
    reading = assert_harmless(out.read_text(encoding="utf-8"))
    assert "run.jsonl" in reading.text


def test_the_page_is_the_one_that_python_makes_and_a_second_one_is_the_same(log, tmp_path, capsys):
    from dyntune import load_run

    out = tmp_path / "report.html"
    assert main(["report", str(log), "-o", str(out), "--title", "<mine>"]) == 0
    first = out.read_bytes()
    assert first.decode() == render(run_page(load_run(log), title="<mine>"))
    assert main(["report", str(log), "-o", str(out), "--title", "<mine>"]) == 0
    assert out.read_bytes() == first


def test_without_a_name_it_is_report_html_here(log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "run.jsonl"]) == 0
    assert (tmp_path / "report.html").is_file()


def test_a_log_is_never_overwritten(log, tmp_path, capsys):
    before = log.read_bytes()
    assert main(["report", str(log), "-o", str(log)]) == 1
    assert log.read_bytes() == before
    assert "no HTML page" in capsys.readouterr().err
    assert main(["report", str(log), "-o", str(tmp_path)]) == 1


def test_what_cannot_be_read_or_written_is_said(log, tmp_path, capsys):
    assert main(["report", str(tmp_path / "absent.jsonl"), "-o", str(tmp_path / "a.html")]) == 1
    assert "absent.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()
    assert main(["report", str(log), "-o", str(tmp_path / "no" / "a.html")]) == 1
    assert "make it first" in capsys.readouterr().err
    assert main(["report"]) == 2


def test_a_full_disk_is_said(log, tmp_path, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dyntune.report.write", full)
    assert main(["report", str(log), "-o", str(tmp_path / "a.html")]) == 1
    assert "No space left" in capsys.readouterr().err


def test_the_terminal_gets_no_control_character(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", kind="diverging", steps=90, words="\x1b[31m\x07[red]evil[/red]")
    assert main(["report", str(log), "-o", str(tmp_path / "a.html")]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\x07" not in said
