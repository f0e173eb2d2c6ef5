"""``dyntune lr package.module:setup`` as a person in a shell meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dyntune
from dyntune.cli import main

COMMON = """
import torch
from torch import nn

def parts():
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    rows = [torch.randn(32, 8, generator=g) for _ in range(24)]
    return model, [(x, x[:, :4].argmax(1)) for x in rows]
"""

SETUPS = """
import os
from parts import parts, nn, torch

def mapping():
    model, batches = parts()
    return {"model": model, "batches": batches, "criterion": nn.CrossEntropyLoss(), "optimizer": "sgd"}

def three():
    return (*parts(), lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))

def two():
    return parts()

def one_batch():
    model, batches = parts()
    return model, batches[0]

def hopeless():
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model, [(torch.eye(3),)] * 4, lambda m, b: (m(b[0]) ** 2).mean() + 1.0

def a_list():
    return list(parts())

def five():
    return (*parts(), None, None, None)

def lacking():
    return {"model": parts()[0], "loss": None, "progress": True}

def raising():
    return {}["no such key"]

def raising_later():
    def loss_fn(model, batch):
        raise ZeroDivisionError("in the loss")
    return (*parts(), loss_fn)

def exiting():
    raise SystemExit(3)

def interrupted():
    raise KeyboardInterrupt

number = 3
"""


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in a folder with the user's code: status, standard output, standard error."""
    (tmp_path / "parts.py").write_text(COMMON)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "lr.py").write_text(SETUPS)
    (tmp_path / "broken.py").write_text("import parts\nimport no_such_package_at_all\n")
    monkeypatch.chdir(tmp_path)
    mine = ("parts", "work", "broken")

    def run(*arguments: str) -> tuple[int, str, str]:
        before = list(sys.path)
        status = main(["lr", *arguments])
        assert sys.path == before
        said = capsys.readouterr()
        return status, said.out, said.err

    yield run
    for name in [name for name in sys.modules if name.split(".")[0] in mine]:
        del sys.modules[name]


def test_a_recommendation_with_its_reasons(shell: Any, tmp_path: Path) -> None:
    status, out, err = shell("work.lr:mapping", "--max-gradients", "100", "--seed", "4", "--json", "found.json")
    assert status == 0
    sys.path.insert(0, str(tmp_path))
    try:
        from work.lr import mapping  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    rec = dyntune.suggest_lr(**mapping(), max_gradients=100, seed=4)
    assert out.split() == rec.explain().split()  # lines are wrapped
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(rec.to_dict()))
    assert ("dyntune: " in err) == (rec.status is not dyntune.Status.OK)


@pytest.mark.parametrize("name", ["two", "three"])
def test_tuples(shell: Any, name: str) -> None:
    status, out, _ = shell(f"work.lr:{name}", "--max-gradients", "60")
    assert status == 0
    assert out.startswith("learning rate: ")


def test_an_uncertain_value_says_so_and_is_no_failure(shell: Any) -> None:
    status, out, err = shell("work.lr:one_batch", "--max-gradients", "60")
    assert status == 0
    assert "status: ONE_BATCH" in out
    assert err.startswith("dyntune: one_batch: ")


def test_a_refusal_is_a_failure_and_is_written(shell: Any, tmp_path: Path) -> None:
    status, out, err = shell("work.lr:hopeless", "--max-gradients", "60", "--json", "found.json")
    assert status == 1
    assert "refused" in out
    assert err.startswith("dyntune: refused: ")
    assert json.loads((tmp_path / "found.json").read_text())["value"] is None


@pytest.mark.parametrize(
    ("target", "fragment"),
    [
        ("work.lr", "'work.lr' is not package.module:function. Write, say, work.lr:setup"),
        ("work/lr.py:two", "Write, say, work.lr:two"),
        ("work.lr:", "not package.module:function"),
        ("elsewhere.lr:two", "no module 'elsewhere'"),
        ("work.nothing:two", "no module 'work.nothing'"),
        ("work.lr:setup", "has no function 'setup'"),
        ("work.lr:number", "has no function 'number'"),
        ("work.lr:a_list", "returned a list; it has to return a mapping with"),
        ("work.lr:five", "returned a tuple of 5;"),
        ("work.lr:lacking", "lacks batches and has loss, progress, which suggest_lr does not take"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(shell: Any, target: str, fragment: str) -> None:
    status, out, err = shell(target)
    assert (status, out) == (1, "")
    assert fragment in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("target", "line", "end"),
    [
        ("work.lr:raising", 'return {}["no such key"]', "work.lr:raising() raised KeyError"),
        ("work.lr:exiting", "raise SystemExit(3)", "work.lr:exiting() raised SystemExit"),
        ("work.lr:raising_later", "in the loss", "measuring what work.lr:raising_later() returned raised ZeroDiv"),
        ("broken:setup", "import no_such_package_at_all", "importing broken raised ModuleNotFoundError"),
    ],
)
def test_errors_of_the_users_code_come_with_their_traceback(shell: Any, target: str, line: str, end: str) -> None:
    status, out, err = shell(target, "--max-gradients", "60")
    assert (status, out) == (1, "")
    assert err.startswith("Traceback")
    assert line in err
    assert end in err.splitlines()[-1]
    assert "target.py" not in err.split("raise ")[0]  # it begins in the user's code, or in the measurement


def test_an_interrupt_ends_it(shell: Any) -> None:
    assert shell("work.lr:interrupted")[::2] == (130, "dyntune: interrupted\n")


def test_options_are_checked_before_the_work(shell: Any) -> None:
    status, _, err = shell("work.lr:raising", "--json", "no/such/folder.json")
    assert status == 1
    assert "the folder no/such does not exist" in err
    assert shell("work.lr:two", "--max-gradients", "many")[0] == 2
    assert "at least 60" in shell("work.lr:two", "--max-gradients", "10")[2]


def test_the_file_cannot_be_written(shell: Any, tmp_path: Path) -> None:
    status, out, err = shell("work.lr:two", "--max-gradients", "60", "--json", str(tmp_path))
    assert status == 1
    assert out.startswith("learning rate: ")  # what was measured is not lost
    assert "could not be written" in err


def test_help_says_what_setup_returns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lr", "--help"]) == 0
    said = capsys.readouterr().out
    assert "(model, batches, loss_fn)" in said
    assert "Exit status" in said


@pytest.mark.slow
def test_as_a_program(tmp_path: Path) -> None:
    """The installed command, in a folder that Python would not look into by itself."""
    (tmp_path / "mine.py").write_text(COMMON + "\ndef setup():\n    return parts()\n")
    command = [str(Path(sys.executable).with_name("dyntune")), "lr", "mine:setup", "--max-gradients", "60"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("learning rate: ")
    assert "|" not in done.stderr  # no bar where nobody watches
