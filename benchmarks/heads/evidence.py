"""What `suggest_heads` says of every group, before it is compared with the brute force; resumable.

    python benchmarks/heads/evidence.py [--half tune|test] [--only GLOB] [--nice N]

The batches are those of the brute force's trainings with fresh seeds, so that nothing is judged on what it has seen.
Every group is appended at once to benchmarks/heads/.cache/evidence.jsonl, under a hash of its definition and of the
code's version: it may be killed at any time. `--pack` writes results/evidence.json, which a machine without a cache
goes on from. Half a minute for a small group, some three for a large one.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import fnmatch
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dyntune
from benchmarks.heads.workloads import HEADS, Cell, Group, groups, loss_fn

HERE = Path(__file__).resolve().parent
FOUND = HERE / ".cache" / "evidence.jsonl"
VERSION = 2  # of the rule and of what it is given: a change makes recorded answers stale
SEED, BATCHES, NUM_SEEDS = 1000, 120, 3


def adamw(params: Any) -> torch.optim.Optimizer:
    """As the brute force trains."""
    return torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)


def asked(group: Group) -> dict[str, Any]:
    """The answer for a group, as plain types."""
    data = Cell(group, HEADS[0]).batches(SEED)

    def make(heads: int) -> torch.nn.Module:
        return Cell(group, heads).new_model(int(torch.randint(2**31, (1,))))  # from the seed that dyntune has set

    began = time.process_time()
    found = dyntune.suggest_heads(
        make,
        list(itertools.islice(data, BATCHES)),
        loss_fn,
        head_counts=HEADS,
        optimizer=adamw if group.optimizer == "adamw" else "momentum",
        seeds=NUM_SEEDS,
        curvature=False,  # nothing that is judged depends on it
        seed=SEED,
    )
    return found.to_dict() | {"seconds": round(time.process_time() - began, 1)}


PACKED = HERE / "results" / "evidence.json"
# What the judge and the trainings with fresh seeds read.
KEPT = ("value", "verdict", "margin", "reason", "effects", "edges", "cost", "seconds")
KEPT_OF_ROWS = (
    "heads",
    "head_dim",
    "lr",
    "critical_lr",
    "own_critical_lr",
    "loss",
    "step_seconds",
    "flags",
    "admitted",
)


def pack() -> None:
    """Write what is known, without what nothing reads."""
    found = {
        group: {name: told[name] for name in KEPT if name in told}
        | {"table": [{name: row[name] for name in KEPT_OF_ROWS} for row in told["table"]]}
        for group, told in known().items()
    }
    lines = [f"{json.dumps(name)}: {json.dumps(told, separators=(',', ':'))}" for name, told in sorted(found.items())]
    PACKED.write_text(f'{{"version": {VERSION},\n "groups": {{\n' + ",\n".join(lines) + "\n}}\n")
    print(f"{PACKED.name}: {PACKED.stat().st_size / 1e3:.0f} kB, {len(found)} groups")


def known() -> dict[str, dict[str, Any]]:
    """Answers that were recorded for this version, by group; a line that a kill cut short is passed over."""
    found: dict[str, dict[str, Any]] = {}
    if PACKED.exists() and (packed := json.loads(PACKED.read_text()))["version"] == VERSION:
        found |= packed["groups"]
    for line in FOUND.read_text().splitlines() if FOUND.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["version"] == VERSION:
            found[row["group"]] = row["found"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tune", "test"))
    parser.add_argument("--only", metavar="GLOB", help="groups whose names match")
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--pack", action="store_true", help=f"write {PACKED.name}")
    options = parser.parse_args()
    if options.pack:
        pack()
        return
    os.nice(options.nice)
    torch.set_num_threads(1)
    there = known()
    FOUND.parent.mkdir(exist_ok=True)
    for group in groups(half=options.half):
        if group.name in there or not fnmatch.fnmatch(group.name, options.only or "*"):
            continue
        found = asked(group)
        with FOUND.open("a") as file:
            file.write(json.dumps({"group": group.name, "version": VERSION, "found": found}) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {group.name}: {found['value']} heads, {found['verdict']}", flush=True)


if __name__ == "__main__":
    main()
