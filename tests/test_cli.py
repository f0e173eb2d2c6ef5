"""The command line and the demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dyntune import __version__
from dyntune.cli import main
from dyntune.demo import Size, demo_page, tour
from dyntune.demo.data import english
from dyntune.demo.model import CharTransformer, loss_fn
from dyntune.demo.page import with_sweep
from dyntune.plots.recommendation import recommendation_data
from dyntune.report import render
from tests.report.reading import assert_self_contained


@pytest.fixture(scope="module")
def result():
    return tour(size=Size.quick(), seed=3)


def test_demo_writes_a_page_and_says_where(tmp_path, capsys):
    target = tmp_path / "demo.html"
    state = torch.random.get_rng_state()
    assert main(["demo", "--quick", "--seed", "3", "--out", str(target)]) == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    said = capsys.readouterr().out
    assert str(target) in said
    assert "Suggested learning rate" in said
    reading = assert_self_contained(target.read_text(encoding="utf-8"))
    assert reading.tags.count("svg") == 4


def test_same_seed_same_bytes(result):
    again = tour(size=Size.quick(), seed=3)
    assert render(demo_page(again)) == render(demo_page(result))


def test_the_sweep_is_in_the_figure_of_the_suggestion(result):
    curves = {curve.kind: curve for curve in recommendation_data(with_sweep(result)).curves}
    assert curves["sweep"].x == result.sweep.lrs
    assert curves["sweep"].y == pytest.approx(result.sweep.losses, nan_ok=True)


def test_the_page_compares_with_the_best_of_the_sweep(result):
    section = demo_page(result).sections[1]
    assert f"{min(result.sweep.losses):.3f}" in section.finding
    assert section.table is not None
    assert [row for row in section.table.rows if row[-1] == "suggested"]


def test_the_text_is_english_and_its_parts_do_not_overlap():
    text = english()
    assert len(text.train) > 100_000
    words = "".join(text.characters[i] for i in text.train[:2000].tolist())
    assert " the " in words
    inputs, targets = text.batches(text.train, 2, size=3, length=5, seed=0)[1]
    assert inputs.shape == targets.shape == (3, 5)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_the_model_does_not_see_what_follows():
    model = CharTransformer(11, width=8, layers=1, length=6)
    text = torch.arange(6)[None]
    changed = text.clone()
    changed[0, -1] = 9
    assert torch.allclose(model(text)[:, :-1], model(changed)[:, :-1])
    assert loss_fn(model, (text, changed)).shape == ()


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dyntune {__version__}\n"


def test_nothing_asked_shows_what_there_is(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_wrong_usage_is_2(capsys):
    assert main(["juggle"]) == 2
    assert "juggle" in capsys.readouterr().err


def test_a_missing_folder_is_found_before_the_work(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(monkeypatch, capsys, tmp_path):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dyntune.demo.tour", interrupted)
    assert main(["demo", "--out", str(tmp_path / "page.html")]) == 130
    assert capsys.readouterr().err == "dyntune: interrupted\n"


def test_plain_where_rich_is_not_installed(monkeypatch, capsys):
    from dyntune import cli

    monkeypatch.setattr(cli, "find_spec", lambda _: None)
    cli._say("[bold]as it is[/]")
    assert capsys.readouterr().out == "[bold]as it is[/]\n"


def test_help_loads_no_matplotlib():
    code = (
        "import sys; from dyntune.cli import main; main(['--help']); "
        "sys.exit(bool({'matplotlib', 'rich', 'jinja2'} & set(sys.modules) - known))"
    )
    # torch may bring jinja2 itself, which is no concern of ours
    setup = "import sys, torch; known = set(sys.modules); "
    run = subprocess.run(
        [sys.executable, "-c", setup + code], check=False, capture_output=True, cwd=Path(__file__).parents[1]
    )
    assert run.returncode == 0, run.stderr
