"""The page on frameworks runs as a reader would run it, its loops also over two processes, and trains as without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from dyntune.monitor.load import load_run
from tests.documents import ROOT, blocks, readers_names, run
from tests.integrations import test_lightning as lightning
from tests.integrations.test_monitor_lightning import Plain
from tests.integrations.test_monitor_transformers import made

PAGE = ROOT / "docs" / "how-to" / "monitor-frameworks.md"

pytestmark = lightning.pytestmark

CPU = {"ACCELERATE_USE_CPU": "true", "LT_ACCELERATOR": "cpu", "LT_DEVICES": "2"}
ENDED = "accelerator.end_training()"
# What a process has at the end: weights, and where its random numbers are.
SHOW = """
import hashlib, os, pathlib
digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
for p in model.parameters():
    digest.update(p.detach().numpy().tobytes())
pathlib.Path("digest" + os.environ["RANK"]).write_text(digest.hexdigest())
"""


def program(framework: str) -> str:
    (found,) = [body for language, body in blocks(PAGE) if language == "python" and f"{framework} import" in body]
    return found


def launched(code: str, folder: Path) -> list[str]:
    """What the processes leave behind."""
    folder.mkdir()
    (folder / "program.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"],
        cwd=folder,
        env=os.environ | CPU | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(folder / f"digest{rank}").read_text() for rank in range(2)]


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = readers_names() | {
        "module": Plain(),
        "hf_trainer": made(tmp_path, max_steps=20),
        "Trainer": Trainer,
        "quiet": {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    run(PAGE, names)
    for name, steps in (("lightning", 60), ("transformers", 20), ("accelerate", 30), ("fabric", 60)):
        assert load_run(f"{name}.jsonl").series("train/loss")[0].tolist() == list(range(steps))
    assert "metric,train/loss," in Path("run.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "steps"), [("accelerate", 15), ("lightning.fabric", 30)])
def test_two_processes_train_as_without_and_write_a_log_each(framework: str, steps: int, tmp_path: Path) -> None:
    """480 rows in batches of 8 over two processes; Accelerate takes two batches a step."""
    # overhead=0.9: bursts and probes run as often as they can, so that what they might disturb is disturbed
    code = program(framework).replace("criterion=criterion, ", "criterion=criterion, overhead=0.9, ")
    watched = code.replace(ENDED, "") + SHOW
    bare = re.sub(r"with dyntune\.Monitor\(.*\) as monitor:", "if True:", watched)
    bare = re.sub(r" *(monitor\.observe|print\(f\"rank).*\n", "", bare)
    assert "overhead=0.9" in watched
    assert "monitor." not in bare
    end = ENDED if framework == "accelerate" else ""
    assert launched(watched + end, tmp_path / "a") == launched(bare + end, tmp_path / "b")

    found = load_run(tmp_path / "a" / f"{framework.rpartition('.')[2]}.jsonl")
    assert (found.world, sorted(found.ranks), found.missing) == (2, [0, 1], ())
    losses = [found.ranks[rank].series("train/loss")[1].tolist() for rank in (0, 1)]
    assert len(losses[0]) == len(losses[1]) == steps
    assert losses[0] != losses[1]  # each of its own batches
