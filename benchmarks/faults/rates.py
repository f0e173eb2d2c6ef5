"""Learning rates of the workloads: a sweep of short runs.

    python benchmarks/faults/rates.py [--only GLOB]

Trains each workload at its learning rate times 1/9, 1/3, 1, 3, 9 and 27 with two seeds and prints the clean loss at
the end. The rates in `workloads.py` were read off this table (README.md has it): near the best loss, and about nine
times or more below the first rate that fails, which is where somebody ends who swept once.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import argparse
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.faults.training import Training
from benchmarks.faults.workloads import WORKLOADS

FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0, 27.0)
SEEDS = (8000, 8001)  # used nowhere else


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'workload':30} {'lr':>8} {'ms':>6} | loss at lr x 1/9, 1/3, 1, 3, 9, 27 (mean of {len(SEEDS)} seeds)")
    for name, workload in WORKLOADS.items():
        if not fnmatch(name, args.only):
            continue
        row, began, steps = [], time.thread_time(), 0
        for factor in FACTORS:
            found = []
            for seed in SEEDS:
                training = Training(workload.changed(lr=workload.lr * factor), seed)
                training.loop()
                found.append(training.evaluate())
                steps += training.step
            row.append(sum(found) / len(found))
        cost = 1e3 * (time.thread_time() - began) / steps
        print(f"{name:30} {workload.lr:8.1e} {cost:6.2f} |", " ".join(f"{x:8.4f}" for x in row), flush=True)


if __name__ == "__main__":
    main()
