"""Where a result comes from: enough to repeat it, nothing about whose machine it was."""

from __future__ import annotations

import datetime as dt
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "pyhessian",
    "hessian-eigenthings",
    "curvlinops-for-pytorch",
    "dyntune",
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _command() -> str:
    """The command line; of a path only its last part, the rest says where somebody keeps their files."""
    arguments = (Path(argument).name if "/" in argument else argument for argument in sys.argv[1:])
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def provenance() -> dict[str, Any]:
    """Date, versions, machine, threads, commit and command line."""
    changes = _git("status", "--porcelain", "--", "dyntune", "benchmarks", ":!benchmarks/results")
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": _git("rev-parse", "--verify", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "cpu": _cpu_model(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "clock": "time.process_time (CPU time of the process)",
    }
