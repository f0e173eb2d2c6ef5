"""``dyntune explain`` as a person in a shell meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dyntune
from dyntune.cli import main
from tests.test_cli_report import write_log


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "run.jsonl", kind="diverging", steps=200)


def test_it_prints_the_story(log: Path, capsys: Any) -> None:
    assert main(["explain", str(log)]) == 0
    said = capsys.readouterr().out
    assert " ".join(said.split()) == " ".join(dyntune.explain(log).text.split())
    assert "At step 152 something went wrong: Curvature along the step is above its limit." in " ".join(said.split())


def test_a_run_without_an_alarm_is_no_error(tmp_path: Path, capsys: Any) -> None:
    log = write_log(tmp_path / "run.jsonl")
    assert main(["explain", str(log)]) == 0
    said = capsys.readouterr().out
    assert "No alarm was raised in 100 steps" in said
    assert "  grad/noise_scale: no batch could be cut in two" in said


def test_the_evidence_is_drawn(log: Path, tmp_path: Path, capsys: Any) -> None:
    svg, png = tmp_path / "a.svg", tmp_path / "a.PNG"
    assert main(["explain", str(log), "--plot", str(svg)]) == 0
    assert str(svg) in capsys.readouterr().out.replace("\n", "")
    first = svg.read_text(encoding="utf-8")
    assert first.startswith("<svg")
    assert "gradient norm" in first
    assert main(["explain", str(log), "--plot", str(svg)]) == 0  # again, over its own
    assert svg.read_text(encoding="utf-8") == first
    assert main(["explain", str(log), "--plot", str(png)]) == 0
    with Image.open(png) as image:
        assert image.width > 600


def test_nothing_else_is_overwritten(log: Path, tmp_path: Path, capsys: Any) -> None:
    before = log.read_bytes()
    named = tmp_path / "run.svg"
    log.rename(named)
    assert main(["explain", str(named), "--plot", str(named)]) == 1
    assert named.read_bytes() == before
    assert "is not overwritten" in capsys.readouterr().err
    assert main(["explain", str(named), "--plot", str(tmp_path / "a.pdf")]) == 1
    assert "ends in .svg or .png" in capsys.readouterr().err
    assert main(["explain", str(named), "--plot", str(tmp_path / "no" / "a.svg")]) == 1
    assert "make it first" in capsys.readouterr().err
    assert main(["explain"]) == 2


def test_what_cannot_be_read_or_written_is_said(
    log: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["explain", str(tmp_path / "absent.jsonl")]) == 1
    assert "absent.jsonl" in capsys.readouterr().err

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main(["explain", str(log), "--plot", str(tmp_path / "a.png")]) == 1
    said = capsys.readouterr()
    assert "No space left" in said.err
    assert "something went wrong" in said.out  # the text comes first


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.999])
def test_a_log_that_was_cut_anywhere_is_told_as_far_as_it_goes(log: Path, keep: float, capsys: Any) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole[: int(keep * len(whole))])
    assert main(["explain", str(log)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "The record was not closed" in said


def test_the_terminal_gets_no_control_character(tmp_path: Path, capsys: Any) -> None:
    log = write_log(tmp_path / "run.jsonl", kind="diverging", steps=90, words="\x1b[31m\x07[red]evil[/red]")
    assert main(["explain", str(log)]) == 0
    said = capsys.readouterr().out
    assert "[red]evil[/red]" in said
    assert "\x1b" not in said
    assert "\x07" not in said
