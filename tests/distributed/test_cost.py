"""What a product and a Lanczos step send and hold is what `benchmarks/distributed_cost.py` says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

import dyntune
from benchmarks.distributed_cost import LAYOUTS, PAGE, REPORT, cost, written
from tests.distributed.counting import Memory, Traffic
from tests.distributed.problem import WIDE_LAYERS, data, laid_out

SETTINGS = {
    "replicas": ("DDP", "exact"),
    "gathered": ("FSDP2", "exact"),
    "sharded": ("FSDP2", "finite-difference"),
    "parallel": ("TP", "exact"),
}
FROM, BASIS = 4, 12


def operator(layout: str) -> dyntune.HessianOperator:
    """One row per process: the parameters are all that counts."""
    kind, method = SETTINGS[layout]
    x, y = data("wide")
    rank = 0 if kind == "TP" else dist.get_rank()
    batch = (x[rank : rank + 1], y[rank : rank + 1])
    return dyntune.hessian(laid_out("wide", kind), batch, criterion=nn.CrossEntropyLoss(), method=method)


def traffic(layout: str) -> dict[str, Any]:
    h = operator(layout)
    vector = h.space.normal(1)
    with h.session() as product:
        product(vector)  # FSDP's first backward pass gathers once too often, after forward passes without one
        with Traffic() as one:
            product(vector)
    runs = []
    for count in (FROM, FROM + 1):
        with Traffic() as run:
            dyntune.eigenvalues(h, max_products=count, rtol=1e-12, basis=BASIS)
        runs.append(run)
    return {
        "numel": h.numel,
        "product": one.nbytes,
        "product calls": one.calls,
        "step": runs[1].nbytes - runs[0].nbytes - one.nbytes,
        "step calls": runs[1].calls - runs[0].calls - one.calls,
    }


def memory(layout: str) -> tuple[int, float, float]:
    h = operator(layout)
    vector = h.space.normal(1)
    with h.session() as product:
        product(vector)
    with Memory() as one, h.session() as product:
        product(vector)
    with Memory() as all_:
        dyntune.eigenvalues(h, max_products=FROM, rtol=1e-12, basis=BASIS)
    return h.numel, one.peak, all_.peak


# Whole FSDP units: every layer is gathered for the forward and for the backward pass, reduced once, four times over.
LARGE = {
    "replicas": {"all-reduce": 1},
    "gathered": {"all-gather": 1, "reduce-scatter": 1},
    "sharded": {"all-gather": 8 * WIDE_LAYERS, "reduce-scatter": 4 * WIDE_LAYERS},
}
# Telling of failures, and three norms.
SMALL = {"replicas": {}, "gathered": {}, "sharded": {"all-reduce": 1 + 3}}
# Projections, twice, and the norm; replicas do these alone and agree on the outcome.
STEP = {"replicas": {"broadcast": 1}, "gathered": {"all-reduce": 3}, "sharded": {"all-reduce": 3}}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic(jobs, layout, size):
    for found in jobs[size].run(traffic, layout):
        said = cost(layout, found["numel"], size, j=FROM)
        assert found["product calls"] == Counter(LARGE[layout]) + Counter(SMALL[layout])
        assert found["step calls"] == Counter(STEP[layout])
        assert sum(found["step"].values()) == said.step
        small = REPORT * 4 + 3 * 8 if layout == "sharded" else 0
        assert sum(found["product"].values()) == said.buffers + small


@pytest.mark.slow
def test_tensor_parallel_traffic(jobs):
    """The product's own is the model's: one all-reduce per pair of layers and pass, of activations."""
    for found in jobs[2].run(traffic, "parallel"):
        assert found["step calls"] == Counter(STEP["sharded"])
        assert found["product calls"]["all-reduce"] == 1 + 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory(jobs, layout, size):
    for numel, product, whole in jobs[size].run(memory, layout):
        said = cost(layout, numel, size, rows=BASIS + 1, unit=numel // WIDE_LAYERS)
        # Activations of one row, and small vectors of Lanczos, are 3% here.
        assert said.product <= product < said.product + 0.03 * 4 * numel
        assert said.memory <= whole < said.memory + 0.03 * 4 * numel


def test_the_page_says_what_the_formulas_say():
    page = PAGE.read_text(encoding="utf-8")
    assert "<!-- table:cost:begin -->" in page
    assert written(page) == page


def test_an_unknown_layout_has_no_cost():
    with pytest.raises(ValueError, match="replicas"):
        cost("pipeline", 10, 2)
