"""Every block of code in the README runs, every command exists, every link leads somewhere."""

from __future__ import annotations

import re

import pytest

import dyntune
from dyntune.cli import main
from tests.documents import ROOT, blocks, readers_names, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(ROOT / "README.md")


@pytest.fixture
def names():
    return readers_names()


def test_there_is_code_to_run():
    assert [language for language, _ in BLOCKS] == ["diff", "console", "python", "python"]


def test_the_code_runs_from_top_to_bottom(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(ROOT / "README.md", names)
    assert names["rec"].value is not None
    assert names["found"].converged
    assert (tmp_path / "density.png").stat().st_size > 1000
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert dyntune.load_run(tmp_path / "run.jsonl").series("train/loss")[0].size > 0
    assert "rule:" in capsys.readouterr().out


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for language, body in BLOCKS:
        if language != "console":
            continue
        for line in body.splitlines():
            command = line.split("#")[0].split()
            if command[0] == "make":
                assert re.search(rf"^{command[1]}:", makefile, flags=re.MULTILINE), line
            elif command[0] == "dyntune":
                assert main([*command[1:], "--help"]) == 0
            else:
                assert command[:2] == ["pip", "install"], line


def test_the_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert "docs/_static/demo.svg" in targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_peers_table_has_its_place():
    assert README.count("<!-- table:peers:begin -->") == README.count("<!-- table:peers:end -->") == 1
