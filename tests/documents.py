"""Code in documents: found, and run as a reader would."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and body of every fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code(language: str, body: str) -> str:
    """A diff as it is once applied; anything else as it is."""
    if language != "diff":
        return body
    kept = [line for line in body.splitlines() if not line.startswith("-")]
    assert all(line[:2] in ("+ ", "  ", "") for line in kept)
    return "\n".join(line[2:] for line in kept)


def readers_names() -> dict[str, Any]:
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


def run(path: Path, names: dict[str, Any]) -> list[tuple[str, str]]:
    """Run a document's code from top to bottom in `names`; (said, printed) for every block that says what is printed.

    A ``text`` block right after a ``python`` one says it.
    """
    pairs, printed = [], ""
    for language, body in blocks(path):
        if language in ("diff", "python"):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code(language, body), f"{path.name} ({language})", "exec"), names)  # our own text
            printed = out.getvalue()
            sys.stdout.write(printed)  # for tests that capture it
        elif language == "text":
            pairs.append((body, printed))
    return pairs


def numbers(text: str) -> list[float]:
    """Every number in a text."""
    return [float(x) for x in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", text)]


def without_numbers(text: str) -> str:
    """The text with a hash for every number, and one space for many."""
    return " ".join(re.sub(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", "#", text).split())
