"""The program on the how-to page runs under torchrun and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.documents import ROOT, blocks, numbers, without_numbers

PAGES = ROOT / "docs" / "how-to"
PROGRAM = PAGES / "distributed_example.py"


def printed(*arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(PROGRAM), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def said() -> str:
    console = next(body for language, body in blocks(PAGES / "distributed.md") if language == "console")
    return "\n".join(line for line in console.splitlines() if not line.startswith("$"))


@pytest.mark.slow
def test_data_parallel():
    found = printed()
    assert without_numbers(found) == without_numbers(said())
    # Sums come out in another order with other kernels, training carries that on, and a product more may be needed.
    values, expected = (numbers(re.sub(r"\d+ products", "", text)) for text in (found, said()))
    assert values == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_sharded():
    found = printed("--fsdp")
    assert "gathered on 2 processes" in found
    first, expected = (re.search(r"step  0: (\S+)", text) for text in (found, said()))
    assert first is not None
    assert expected is not None
    assert float(first[1]) == pytest.approx(float(expected[1]), rel=1e-2)


def test_the_page_shows_the_program_and_is_listed():
    page = (PAGES / "distributed.md").read_text(encoding="utf-8")
    assert PROGRAM.name in page
    index = (PAGES / "index.md").read_text(encoding="utf-8").split()
    assert [path.stem for path in PAGES.glob("*.md") if path.stem not in (*index, "index")] == []
