"""What a measurement over several processes costs in memory and communication: formulas, and the table made of them.

    python benchmarks/distributed_cost.py            write the tables into docs/how-to/distributed.md
    python benchmarks/distributed_cost.py --check    fail if the page differs from what the formulas say

The formulas are derived from the code and compared with counts at torch's dispatcher (gloo, 2 and 4 processes, a toy
model) in tests/distributed/test_cost.py. The table applies them to models and jobs that were not run.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from dyntune.curvature.eigenvalues import BASIS_BYTES, BASIS_MOST

__all__ = ["LAYOUTS", "Cost", "basis_rows", "cost"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "distributed.md"
LAYOUTS = ("replicas", "gathered", "sharded")
FLOAT64 = 8
# Numbers that tell of failures, in the dtype of the vectors: dyntune.objective.layout.KINDS.
REPORT = 4
PRODUCTS = 15  # the middle of the 8 to 25 that networks need at the default tolerance


@dataclass(frozen=True)
class Cost:
    """Of one process, in bytes, activations and graphs of the batch apart.

    Args:
        buffers: Whole buffers of the large collectives of one product.
        sent: What a process sends for them with ring algorithms.
        step: Buffers of the small collectives of one Lanczos step.
        step_calls: How many of those there are.
        basis: The Lanczos vectors.
        product: The most that a product needs besides.
    """

    buffers: float
    sent: float
    step: float
    step_calls: int
    basis: float
    product: float

    @property
    def memory(self) -> float:
        """Peak extra memory."""
        return self.basis + self.product


def basis_rows(vector_bytes: float, k: int = 1) -> int:
    """Lanczos vectors kept by default, with the one that is being made: as in dyntune.curvature.eigenvalues."""
    return int(max(2 * k + 10, min(BASIS_MOST, BASIS_BYTES // vector_bytes))) + 1


def cost(
    layout: str,
    parameters: int,
    processes: int,
    *,
    itemsize: int = 4,
    rows: int | None = None,
    unit: int = 0,
    j: int = 0,
) -> Cost:
    """Cost of one product and of Lanczos step `j` (from 0).

    Args:
        layout: ``replicas``, ``gathered`` (both exact) or ``sharded`` (finite differences).
        parameters: How many the model has.
        processes: How many take part.
        itemsize: Bytes of an entry of a vector.
        rows: Vectors in the basis; default what `eigenvalues` chooses for k = 1.
        unit: Parameters in the largest module that FSDP gathers at once.
        j: Which step.
    """
    vector, w = float(parameters * itemsize), processes
    part = vector / w
    ring = (w - 1) / w  # share of a gathered or scattered buffer that leaves a process; an all-reduce is both
    if layout == "replicas":
        # One flat all-reduce. Besides the basis: the gradient with its graph, the copy that shows whether parameters
        # changed, H v, and the flat buffer.
        report = REPORT * itemsize
        buffers, sent = vector + report, 2 * ring * (vector + report)
        step, calls = FLOAT64 * (j + 2), 1
        held, product = vector, 4 * vector
    elif layout == "gathered":
        # v gathered, H v scattered. Whole: parameters, their gradient, v, H v, and H v on its way; of shards: the copy
        # that shows changes, and what comes back.
        buffers = 2 * vector + w * REPORT * itemsize
        sent = ring * buffers
        step, calls = FLOAT64 * (2 * (j + 1) + 1), 3
        held, product = part, 5 * vector + 2 * part
    elif layout == "sharded":
        # Four gradients, each with two all-gathers and a reduce-scatter of FSDP's own. Five shards of vectors, and
        # what FSDP needs for one gradient.
        buffers, sent = 12 * vector, 12 * ring * vector
        step, calls = FLOAT64 * (2 * (j + 1) + 1), 3
        held, product = part, 5 * part + (2 + 2 / w) * unit * itemsize
    else:
        raise ValueError(f"layout={layout!r}: one of {LAYOUTS}.")
    return Cost(buffers, sent, step, calls, (basis_rows(held) if rows is None else rows) * held, product)


# -- the table -------------------------------------------------------------------------------------------------------

MODELS = {"1B": 10**9, "7B": 7 * 10**9, "70B": 70 * 10**9}
PROCESSES = (8, 16, 32, 64, 128, 256, 512)
# Transformers of these sizes have 16, 32 and 80 blocks; FSDP gathers one at a time.
UNITS = {"1B": 16, "7B": 32, "70B": 80}


def _size(nbytes: float) -> str:
    """Two significant digits, in GB (10^9 bytes)."""
    value = float(f"{nbytes / 1e9:.2g}")
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def table() -> str:
    """Per model, layout and job, in GB for each process."""
    header = [
        "parameters",
        "layout",
        "processes",
        "sent per product",
        "sent in all",
        "Lanczos vectors",
        "peak extra memory",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---|---|--:|--:|--:|--:|--:|"]
    for name, parameters in MODELS.items():
        for layout in LAYOUTS:
            for processes in PROCESSES:
                found = cost(layout, parameters, processes, unit=parameters // UNITS[name])
                cells = [found.sent, PRODUCTS * found.sent, found.basis, found.memory]
                lines.append(f"| {name} | {layout} | {processes} | " + " | ".join(map(_size, cells)) + " |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the table between its markers."""
    begin, end = "<!-- table:cost:begin -->", "<!-- table:cost:end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{table()}\n\n{end}", page, flags=re.DOTALL)


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is not what the formulas say")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    if check:
        return int(written(page) != page)
    PAGE.write_text(written(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
