"""Every block of code in the README runs, every command exists, every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dyntune.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def code(language: str, body: str) -> str:
    """A diff as it is once applied; anything else as it is."""
    if language != "diff":
        return body
    kept = [line for line in body.splitlines() if not line.startswith("-")]
    assert all(line[:2] in ("+ ", "  ", "") for line in kept)
    return "\n".join(line[2:] for line in kept)


@pytest.fixture
def names():
    """What a reader has: a model, data and a loss."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    x = torch.randn(256, 8, generator=generator)
    y = x[:, :3].argmax(dim=1)
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, generator=generator)
    return {
        "torch": torch,
        "model": model,
        "loader": loader,
        "batch": (x[:32], y[:32]),
        "criterion": torch.nn.CrossEntropyLoss(),
    }


def test_there_is_code_to_run():
    assert [language for language, _ in BLOCKS] == ["diff", "console", "python"]


def test_the_code_runs_from_top_to_bottom(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for language, body in BLOCKS:
        if language in ("diff", "python"):
            exec(compile(code(language, body), f"README.md ({language})", "exec"), names)  # our own text
    assert names["rec"].value is not None
    assert names["found"].converged
    assert (tmp_path / "density.png").stat().st_size > 1000
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
